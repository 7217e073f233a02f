"""The socket device, driven by a guest in Python over real unix sockets."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from vsock_kit import CID, PORT, Door, Guest, clean_up

from posada.errors import StateError
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.views import fill, split
from posada.vmm.virtio.vsock import Vsock
from posada.vmm.virtio.vsock.device import EVENT, FIRST_PORT, MAX_CLOSING, MAX_STREAMS, RX, TX
from posada.vmm.virtio.vsock.packet import HEADER, Op, Packet, Shut, parse
from posada.vmm.virtio.vsock.sender import MAX_RESETS
from posada.vmm.virtio.vsock.stream import BUFFER


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    clean_up()


def test_config_is_the_cid() -> None:
    assert Guest().driver.config() == CID.to_bytes(8, "little")


def test_a_channel_is_a_stream_both_ways() -> None:
    guest = Guest()
    client, port = guest.open()
    client.send(b"to the guest")
    packet, data = guest.next(Op.RW)
    assert data == b"to the guest"
    assert (packet.src_port, packet.dst_port, packet.buf_alloc) == (port, PORT, BUFFER)
    guest.send(Op.RW, port, data=b"to the host", fwd_cnt=len(data))
    assert guest.read(client, 11) == b"to the host"
    assert guest.quiet()


def test_large_data_goes_through_in_order() -> None:
    guest = Guest(buffers=100)
    client, port = guest.open(buf_alloc=1 << 20)
    data = os.urandom(150_000)
    client.setblocking(True)
    client.settimeout(5)
    client.send(data)  # fits into the socket's buffer
    assert guest.received(len(data)) == data
    for at in range(0, 120_000, 60_000):
        guest.send(Op.RW, port, data=data[at : at + 60_000], buf_alloc=1 << 20, fwd_cnt=len(data))
    client.setblocking(False)
    assert guest.read(client, 120_000) == data[:120_000]


def test_data_that_waits_goes_when_the_guest_gives_buffers() -> None:
    guest = Guest(buffers=1)
    client = guest.channel.connect()
    guest.driver.until(lambda: (guest.collect(refill=False), guest.inbox)[1])
    port = guest.inbox.popleft()[0].src_port
    guest.send(Op.RESPONSE, port)
    client.send(b"x" * 5000)
    guest.driver.spin()
    guest.collect(refill=False)
    assert not guest.inbox
    guest.give(1)
    guest.collect(refill=False)
    assert len(guest.inbox.popleft()[1]) == 4096
    guest.give(1)
    assert guest.next(Op.RW)[1] == b"x" * 904


def test_the_loop_sleeps_while_the_guest_gives_no_buffers() -> None:
    guest = Guest(buffers=1)
    client = guest.channel.connect()
    guest.driver.until(lambda: (guest.collect(refill=False), guest.inbox)[1])
    guest.send(Op.RESPONSE, guest.inbox.popleft()[0].src_port)
    client.send(b"x")
    client.close()
    guest.driver.spin()
    assert guest.driver.loop._epoll.poll(0) == []


def test_credit_bounds_what_the_guest_is_sent() -> None:
    guest = Guest()
    client, port = guest.open(buf_alloc=100)
    client.send(b"x" * 250)
    assert len(guest.next(Op.RW)[1]) == 100
    guest.next(Op.CREDIT_REQUEST)
    assert guest.quiet()
    assert guest.driver.loop._epoll.poll(0) == []
    guest.send(Op.CREDIT_UPDATE, port, buf_alloc=100, fwd_cnt=60)
    assert len(guest.next(Op.RW)[1]) == 60
    guest.next(Op.CREDIT_REQUEST)
    guest.send(Op.CREDIT_UPDATE, port, buf_alloc=1000, fwd_cnt=160)
    assert len(guest.next(Op.RW)[1]) == 90
    assert guest.quiet()


def test_an_older_count_of_credit_is_not_believed() -> None:
    guest = Guest()
    client, port = guest.open(buf_alloc=100)
    client.send(b"x" * 300)
    guest.received(100)
    guest.next(Op.CREDIT_REQUEST)
    guest.send(Op.CREDIT_UPDATE, port, buf_alloc=100, fwd_cnt=100)
    guest.received(100)
    guest.next(Op.CREDIT_REQUEST)
    guest.send(Op.CREDIT_UPDATE, port, buf_alloc=100, fwd_cnt=50)
    assert guest.quiet()


def test_credit_for_more_than_was_sent_is_refused() -> None:
    guest = Guest()
    client, port = guest.open()
    guest.send(Op.CREDIT_UPDATE, port, fwd_cnt=1)
    guest.next(Op.RST)
    assert guest.ended(client)


def test_a_host_that_does_not_read_holds_up_nobody_else() -> None:
    guest = Guest()
    slow, slow_port = guest.open()
    fast, fast_port = guest.open()
    sent = 0
    piece = b"s" * 65536
    inflight = 0
    told = 0
    while inflight + len(piece) <= BUFFER:
        guest.send(Op.RW, slow_port, data=piece)
        sent += len(piece)
        while not guest.quiet():
            packet, _ = guest.next(Op.CREDIT_UPDATE)
            assert packet.src_port == slow_port
            told = packet.fwd_cnt
        inflight = sent - told
    assert sent > BUFFER
    guest.send(Op.RW, fast_port, data=b"me first")
    assert guest.read(fast, 8) == b"me first"
    assert guest.read(slow, sent) == b"s" * sent
    guest.driver.until(lambda: not guest.quiet())
    assert guest.inbox[-1][0].fwd_cnt > sent - BUFFER // 4


def test_more_than_the_credit_is_refused() -> None:
    guest = Guest()
    client, port = guest.open()
    for _ in range(10):  # beyond both the socket's buffer and ours
        guest.send(Op.RW, port, data=b"x" * 65536)
    guest.driver.spin()
    guest.collect()
    assert guest.inbox[-1][0].op == Op.RST
    assert guest.device.metrics()["malformed"] == 1
    assert len(guest.read(client, 655360)) > BUFFER  # what was within the credit arrives


def test_half_close_by_the_host() -> None:
    guest = Guest()
    client, port = guest.open()
    client.send(b"request")
    client.shutdown(socket.SHUT_WR)
    assert guest.next(Op.RW)[1] == b"request"
    assert guest.next(Op.SHUTDOWN)[0].flags == Shut.SEND
    guest.send(Op.RW, port, data=b"answer", fwd_cnt=7)
    assert guest.read(client, 6) == b"answer"
    guest.send(Op.SHUTDOWN, port, flags=Shut.BOTH, fwd_cnt=7)
    guest.next(Op.RST)
    assert guest.ended(client)
    assert guest.device.metrics()["streams"] == 0


def test_half_close_by_the_guest() -> None:
    guest = Guest()
    client, port = guest.open()
    guest.send(Op.RW, port, data=b"all")
    guest.send(Op.SHUTDOWN, port, flags=Shut.SEND)
    assert guest.read(client, 4) == b"all"
    client.send(b"still heard")
    assert guest.next(Op.RW)[1] == b"still heard"
    guest.send(Op.RW, port, data=b"but says it sends no more", fwd_cnt=11)
    guest.next(Op.RST)


def test_a_guest_that_reads_no_more() -> None:
    guest = Guest()
    client, port = guest.open()
    guest.send(Op.SHUTDOWN, port, flags=Shut.RECEIVE)
    with pytest.raises(BrokenPipeError):
        client.send(b"x")
    guest.send(Op.RW, port, data=b"still talks")
    assert guest.read(client, 11) == b"still talks"
    client.close()
    assert guest.next(Op.SHUTDOWN)[0].flags == Shut.BOTH


def test_a_client_that_goes() -> None:
    guest = Guest()
    client, port = guest.open()
    client.send(b"last words")
    client.close()
    assert guest.next(Op.RW)[1] == b"last words"
    flags = guest.next(Op.SHUTDOWN)[0].flags
    if flags != Shut.BOTH:
        assert guest.next(Op.SHUTDOWN)[0].flags == Shut.BOTH
    guest.send(Op.CREDIT_UPDATE, port, fwd_cnt=10)  # it reads what it has: no reason for an RST
    assert guest.quiet()
    guest.send(Op.RST, port, fwd_cnt=10)
    assert guest.device.metrics()["streams"] == 0
    assert guest.quiet()


def test_ends_that_the_guest_never_confirms_are_bounded() -> None:
    guest = Guest()
    ports = []
    for _ in range(MAX_CLOSING + 1):
        client, port = guest.open()
        ports.append(port)
        client.close()
        guest.driver.until(lambda: not guest.quiet() and guest.inbox[-1][0].flags == Shut.BOTH)
        resets = [packet.src_port for packet, _ in guest.inbox if packet.op == Op.RST]
        guest.inbox.clear()
    assert resets == ports[:1]


def test_what_the_guest_sent_before_it_ended_still_arrives() -> None:
    guest = Guest()
    client, port = guest.open()
    data = os.urandom(65536)
    for _ in range(4):
        guest.send(Op.RW, port, data=data)
    guest.send(Op.SHUTDOWN, port, flags=Shut.BOTH)
    assert guest.read(client, 5 * 65536) == 4 * data
    assert guest.device.metrics()["streams"] == 0


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


@pytest.mark.parametrize(
    "fields",
    [
        {"op": Op.REQUEST}, {"op": Op.RW, "data": b"x"}, {"op": Op.RESPONSE}, {"op": Op.SHUTDOWN, "flags": 3},
        {"op": Op.INVALID}, {"op": 99}, {"op": Op.REQUEST, "type": 2}, {"op": Op.REQUEST, "src_cid": 9},
        {"op": Op.REQUEST, "dst_cid": 9}, {"op": Op.CREDIT_REQUEST}, {"op": Op.CREDIT_UPDATE},
    ],
)  # fmt: skip
def test_what_belongs_to_no_connection_is_reset(fields: dict[str, int]) -> None:
    guest = Guest()
    guest.send(host_port=4, **fields)  # type: ignore[arg-type]
    packet, _ = guest.next(Op.RST)
    assert (packet.src_port, packet.dst_port) == (4, PORT)
    assert (packet.src_cid, packet.dst_cid) == (fields.get("dst_cid", 2), fields.get("src_cid", CID))
    guest.send(Op.RST, 4)
    assert guest.quiet()


@pytest.mark.parametrize(
    "fields",
    [
        {"op": Op.RESPONSE}, {"op": Op.INVALID}, {"op": 99}, {"op": Op.REQUEST},
        {"op": Op.RW, "data": b"x", "length": 2}, {"op": Op.RW, "length": 0xFFFFFFFF}, {"op": Op.RW, "data": b"x" * 65537},
    ],
)  # fmt: skip
def test_what_may_not_come_on_a_connection_ends_it(fields: dict[str, int]) -> None:
    guest = Guest()
    client, port = guest.open()
    guest.send(host_port=port, **fields)  # type: ignore[arg-type]
    guest.next(Op.RST)
    assert guest.ended(client)
    assert not guest.driver.needs_reset


def test_a_packet_without_a_header_stops_the_device() -> None:
    guest = Guest()
    client, _ = guest.open()
    guest.driver.put([b"x" * 43], queue=TX)
    guest.driver.kick(TX)
    assert guest.driver.needs_reset
    client.send(b"x")
    assert guest.ended(client)
    assert guest.driver.loop._epoll.poll(0) == []


def test_a_buffer_that_is_no_buffer_stops_the_device() -> None:
    for put in ({"writable": [43]}, {"readable": [b"x" * 44], "writable": [44]}, {"writable": [44]}):
        guest = Guest(buffers=0)
        guest.driver.put(**put, queue=RX)  # type: ignore[arg-type]
        client = guest.channel.connect()
        guest.driver.spin()
        if put == {"writable": [44]}:  # room for a header only
            guest.driver.collect(RX)
            guest.driver.put(**put, queue=RX)  # type: ignore[arg-type]
            guest.send(Op.RESPONSE, guest.device._next_port)
            client.send(b"x")
            guest.driver.spin()
        assert guest.driver.needs_reset


def test_answers_that_nobody_takes_hold_up_the_guest_and_nothing_else() -> None:
    guest = Guest(buffers=0)
    for at in range(MAX_RESETS + 10):
        guest.driver.put([HEADER.pack(CID, 2, PORT, at, 0, 1, Op.REQUEST, 0, 0, 0)], queue=TX)
        guest.driver.kick(TX)
        guest.driver.collect(TX)
    assert len(guest.device._sender._resets) == MAX_RESETS
    assert guest.driver.loop._epoll.poll(0) == []
    guest.give(60)
    for expected in range(MAX_RESETS + 10):
        assert guest.next(Op.RST)[0].src_port == expected


def test_headers_cut_into_pieces() -> None:
    guest = Guest(buffers=0)
    guest.driver.put(writable=[7, 30, 20, 100], queue=RX)
    guest.driver.put(writable=[44, 1, 3, 100], queue=RX)
    guest.driver.kick(RX)
    client = guest.channel.connect()
    guest.driver.until(lambda: (guest.collect(refill=False), guest.inbox)[1])
    port = guest.inbox.popleft()[0].src_port
    header = HEADER.pack(CID, 2, PORT, port, 0, 1, Op.RESPONSE, 0, 1 << 16, 0)
    guest.driver.put([header[:3], header[3:40], header[40:]], queue=TX)
    header = HEADER.pack(CID, 2, PORT, port, 5, 1, Op.RW, 0, 1 << 16, 0)
    guest.driver.put([header[:40], header[40:] + b"ab", b"cdef"], queue=TX)
    guest.driver.kick(TX)
    assert guest.read(client, 5) == b"abcde"
    client.send(b"0123456789")
    guest.driver.spin()
    guest.collect(refill=False)
    assert guest.inbox.popleft()[1] == b"0123456789"


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


def test_parse_split_fill() -> None:
    packet = Packet(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    data = bytearray(HEADER.pack(*packet) + b"rest")
    view = memoryview(data)
    for cut in range(len(data)):
        parsed = parse([view[:cut], view[cut:]])
        assert parsed is not None
        assert parsed[0] == packet
        assert b"".join(parsed[1]) == b"rest"
    assert parse([view[:43]]) is None
    assert parse([]) is None
    head, rest = split([view[:10], view[10:]], 0)
    assert (b"".join(head), b"".join(rest)) == (b"", data)
    fill([view[:1], view[1:1], view[1:4]], b"abcd")
    assert data[:4] == b"abcd"
    assert FIRST_PORT > 1 << 16
