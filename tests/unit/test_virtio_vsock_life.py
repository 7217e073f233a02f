"""The socket device: who comes in by which door, and what outlives a driver, a restore or a fork."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from vsock_kit import CID, PORT, Door, Guest, clean_up

from posada.errors import StateError
from posada.vmm.virtio.mmio import CONFIG
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.vsock import Vsock
from posada.vmm.virtio.vsock.device import EVENT, MAX_STREAMS
from posada.vmm.virtio.vsock.packet import Op


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    clean_up()


def test_a_client_is_served_once_somebody_listens() -> None:
    guest = Guest()
    client = guest.channel.connect()
    client.send(b"hello")
    request, _ = guest.next(Op.REQUEST)
    guest.send(Op.RST, request.src_port, buf_alloc=0)
    assert guest.quiet()
    guest.send(Op.REQUEST, PORT, 5555)  # the knock
    assert guest.next(Op.RST)[0].dst_port == 5555
    request, _ = guest.next(Op.REQUEST)
    guest.send(Op.RESPONSE, request.src_port)
    assert guest.next(Op.RW)[1] == b"hello"


def test_without_a_knock_it_is_tried_again() -> None:
    guest = Guest()
    _client = guest.channel.connect()
    first, _ = guest.next(Op.REQUEST)
    guest.send(Op.RST, first.src_port)
    second, _ = guest.next(Op.REQUEST)
    assert second == first


def test_a_client_that_gives_up_waiting() -> None:
    guest = Guest()
    client = guest.channel.connect()
    request, _ = guest.next(Op.REQUEST)
    guest.send(Op.RST, request.src_port)
    client.close()
    guest.driver.until(lambda: guest.device.metrics()["streams"] == 0)
    client = guest.channel.connect()
    request, _ = guest.next(Op.REQUEST)
    client.close()
    assert guest.next(Op.RST)[0].src_port == request.src_port


def test_firecrackers_convention() -> None:
    guest = Guest()
    client = guest.front.connect()
    client.send(b"CONNECT 77\nand this is the guest's")
    request, _ = guest.next(Op.REQUEST)
    assert request.dst_port == 77
    guest.send(Op.RESPONSE, request.src_port, 77)
    assert guest.next(Op.RW)[1] == b"and this is the guest's"
    banner = b"OK %d\n" % request.src_port
    assert guest.read(client, len(banner)) == banner


def test_firecrackers_convention_when_nobody_listens() -> None:
    guest = Guest()
    client = guest.front.connect()
    client.send(b"CONN")
    guest.driver.spin()
    client.send(b"ECT 77\n")
    request, _ = guest.next(Op.REQUEST)
    guest.send(Op.RST, request.src_port, 77)
    assert guest.ended(client)


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"CONNECT 4294967296\n", b"CONNECT x\n", b"C" * 40])
def test_another_language_is_not_spoken(line: bytes) -> None:
    guest = Guest()
    client = guest.front.connect()
    client.send(line)
    assert guest.ended(client)
    assert guest.quiet()


def test_the_front_door_leaves_places_to_channels() -> None:
    guest = Guest(buffers=60)
    clients = [guest.front.connect() for _ in range(60)]
    for client in clients:
        client.send(b"CONNECT 77\n")
    guest.driver.until(lambda: guest.device.metrics()["streams"] == MAX_STREAMS - 16)
    guest.quiet()
    guest.inbox.clear()
    assert guest.device.metrics()["streams"] == MAX_STREAMS - 16
    _client, port = guest.open()
    assert port
    assert guest.driver.loop._epoll.poll(0) == []
    clients[0].close()
    guest.driver.until(lambda: not guest.quiet())


def test_clients_that_say_nothing_are_bounded() -> None:
    guest = Guest()
    silent = [guest.front.connect() for _ in range(20)]
    guest.driver.spin()
    assert guest.driver.loop._epoll.poll(0) == []
    silent[0].close()
    silent[19].send(b"CONNECT 5\n")
    guest.driver.until(lambda: len(select.select(silent[1:2], [], [], 0)[0]) == 0)
    for client in silent[1:19]:
        client.close()
    assert guest.next(Op.REQUEST)[0].dst_port == 5


def test_a_reset_of_the_driver_ends_every_connection() -> None:
    guest = Guest()
    client, _ = guest.open()
    undecided = guest.front.connect()
    guest.driver.spin()
    guest.driver.write(0x70, 0)
    assert guest.ended(client)
    assert guest.ended(undecided)
    late = guest.channel.connect()
    guest.driver.spin()
    assert guest.driver.loop._epoll.poll(0) == []
    guest.driver.start()
    guest.inbox.clear()
    guest.give(4)
    assert guest.next(Op.REQUEST)[0].dst_port == PORT
    late.close()


def test_a_restored_guest_hears_that_its_connections_are_gone() -> None:
    guest = Guest()
    _client, port = guest.open()
    channel = Door()
    device = Vsock(7, [(PORT, channel.fd)])
    moved = guest.driver.moved(device)
    guest.driver = moved
    early = channel.connect()
    early.send(b"x")
    assert guest.quiet()  # no connection before the guest has acted
    (event,) = moved.collect(EVENT)
    assert event.data == bytes(4)
    assert moved.config() == (7).to_bytes(8, "little")
    moved.put(writable=[4], queue=EVENT)
    moved.kick(EVENT)
    request, _ = guest.next(Op.REQUEST)
    assert request.dst_cid == 7
    assert request.src_port > port  # no port of the old life
    assert moved.collect(EVENT) == []
    device.close()
    moved.loop.close()


def test_a_fork_leaves_the_parents_connections_alone() -> None:
    guest = Guest()
    client, port = guest.open()
    guest.device.quiesce()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            guest.driver.loop.after_fork()
            channel = Door()
            guest.device.reopen({"cid": 9, "listeners": [(PORT, channel.fd)], "connect": -1})
            _late = channel.connect()
            assert guest.quiet()
            assert len(guest.driver.collect(EVENT)) == 1
            guest.driver.put(writable=[4], queue=EVENT)
            guest.driver.kick(EVENT)
            assert guest.next(Op.REQUEST)[0].dst_cid == 9
            guest.send(Op.RW, port, data=b"old", src_cid=9)
            guest.next(Op.RST)
            status = 0
        finally:
            os.write(write, bytes([status]))
            os._exit(status)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"\0"
    guest.driver.kick(EVENT)
    guest.send(Op.RW, port, data=b"goes on")
    assert guest.read(client, 7) == b"goes on"
    client.send(b"too")
    assert guest.next(Op.RW)[1] == b"too"


def test_a_second_fork_before_the_event_was_seen() -> None:
    guest = Guest()
    guest.open()
    guest.device.quiesce()
    channel = Door()
    guest.device.reopen({"listeners": [(PORT, channel.fd)]})
    _client = channel.connect()
    guest.device.quiesce()  # the buffers the device had are given back, and are not the guest's answer
    guest.driver.kick(EVENT)
    assert guest.quiet()
    guest.driver.put(writable=[4], queue=EVENT)
    guest.driver.kick(EVENT)
    guest.next(Op.REQUEST)


@pytest.mark.parametrize("document", [{}, {"next_port": 5}, {"next_port": True}, {"next_port": 1 << 40}])
def test_forged_state_is_refused(document: dict[str, int]) -> None:
    driver = FakeDriver(Vsock(CID))
    with pytest.raises(StateError):
        driver.device.load(document)


def test_closing_is_idempotent() -> None:
    guest = Guest()
    client, _ = guest.open()
    guest.device.close()
    guest.device.close()
    assert guest.ended(client)


def test_a_fork_reads_its_new_address_as_soon_as_it_hears_of_the_reset() -> None:
    """The registers may be memory to the guest: whatever it is told, they must say it already."""
    guest = Guest()
    page = guest.driver.transport._page
    seen: list[int] = []
    raise_line = guest.driver.transport._interrupt

    def interrupted() -> None:
        guest.events += len(guest.driver.collect(EVENT))
        if guest.events:
            seen.append(int.from_bytes(page[CONFIG : CONFIG + 8], "little"))
        raise_line()

    guest.driver.transport._interrupt = interrupted
    channel = Door()
    guest.device.reopen({"cid": 9, "listeners": [(PORT, channel.fd)], "connect": -1})
    guest.driver.until(lambda: guest.events)
    assert set(seen) == {9}
