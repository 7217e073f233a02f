"""The network card on socketpairs; `test_virtio_net_real` has real networks."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from posada.errors import StateError
from posada.vmm.net import open_backend
from posada.vmm.net.backend import HEADER, MAX_FRAME, Feature
from posada.vmm.net.bucket import Bucket
from posada.vmm.virtio.mmio import Register
from posada.vmm.virtio.net import RX, TX, Net, parse_mac
from posada.vmm.virtio.testing import FakeDriver

MAC = "52:54:00:12:34:56"
NOTHING = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
PLAIN, VALID = HEADER.pack(0, 0, 0, 0, 0, 0, 1), HEADER.pack(2, 0, 0, 0, 0, 0, 1)
FRAME = bytes.fromhex("ffffffffffff5254001234560800") + bytes(range(200))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Card:
    """A driver of a card on one end of a socketpair; ``peer`` is the other."""

    def __init__(self, stack: ExitStack, kind: int = socket.SOCK_STREAM, **options: int) -> None:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, kind)
        stack.enter_context(self.peer)
        self.peer.setblocking(False)
        buffers = options.pop("buffers", 8)
        self.size = options.pop("size", 1600)
        features = options.pop("features", (1 << 64) - 1)
        self.device = Net(MAC, open_backend("passt", ours.detach()), **options)
        self.driver = FakeDriver(self.device, features=features, memory_size=64 << 20)
        stack.callback(self.driver.loop.close)
        stack.callback(self.device.close)
        self.give(buffers)

    def give(self, count: int) -> None:
        for _ in range(count):
            self.driver.put(writable=[self.size], queue=RX)
        self.driver.kick(RX)

    def send(self, frame: bytes, header: bytes = NOTHING) -> None:
        self.driver.put([header, frame], queue=TX)
        self.driver.kick(TX)

    def received(self) -> list[bytes]:
        self.driver.spin()
        return [done.data for done in self.driver.collect(RX)]

    def sleeps(self) -> bool:
        """The loop has nothing to do."""
        return self.driver.loop._epoll.poll(0) == [] and not self.driver.loop._soon


def framed(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


def drain(peer: socket.socket, card: Card, size: int) -> bytes:
    data = b""

    def came() -> bool:
        nonlocal data
        try:
            data += peer.recv(1 << 20)
        except BlockingIOError:
            pass
        return len(data) >= size

    card.driver.until(came)
    return data


def test_the_configuration(stack: ExitStack) -> None:
    card = Card(stack, mtu=9000)
    assert card.driver.config() == struct.pack("<6sHHH", bytes.fromhex("525400123456"), 1, 1, 9000)
    assert card.driver.transport.acked & 0xFFFF_FFFF == (
        Feature.MAC | Feature.MTU | Feature.STATUS | Feature.MRG_RXBUF | Feature.GUEST_CSUM | 1 << 28 | 1 << 29
    )
    assert Net(MAC, None).features == Feature.MAC | Feature.STATUS | Feature.MRG_RXBUF


@pytest.mark.parametrize("text", ["", "52:54:00:12:34", "01:00:5e:00:00:01", "zz:54:00:12:34:56"])
def test_no_card_has_that_address(text: str) -> None:
    with pytest.raises(StateError):
        parse_mac(text)


def test_frames_go_both_ways_over_a_stream(stack: ExitStack) -> None:
    card = Card(stack)
    card.send(FRAME)
    card.send(FRAME[:60])
    assert drain(card.peer, card, len(FRAME) + 68) == framed(FRAME, FRAME[:60])
    assert len(card.driver.collect(TX)) == 2
    card.peer.send(framed(FRAME, FRAME[:14]))
    assert card.received() == [VALID + FRAME, VALID + FRAME[:14]]
    assert card.device.metrics() == {
        "sent_packets": 2, "sent_bytes": len(FRAME) + 60, "received_packets": 2, "received_bytes": len(FRAME) + 14,
        "dropped_packets": 0,
    }  # fmt: skip


def test_frames_go_both_ways_over_seqpacket(stack: ExitStack) -> None:
    card = Card(stack, socket.SOCK_SEQPACKET)
    card.send(FRAME)
    assert card.peer.recv(4096) == FRAME
    card.peer.send(FRAME)
    assert card.received() == [PLAIN + FRAME]


def test_frames_that_come_in_pieces(stack: ExitStack) -> None:
    card = Card(stack, buffers=60)
    data = framed(*[FRAME[: 14 + i] for i in range(50)])
    got: list[bytes] = []
    for at in range(0, len(data), 7):
        card.peer.send(data[at : at + 7])
        got += card.received()
    assert got == [VALID + FRAME[: 14 + i] for i in range(50)]


def test_a_long_frame_takes_several_buffers(stack: ExitStack) -> None:
    card = Card(stack, buffers=100)
    frame = os.urandom(MAX_FRAME)
    card.peer.send(framed(frame, FRAME))
    pieces = card.received()
    count = -(-(MAX_FRAME + 12) // 1600)
    assert len(pieces) == count + 1
    assert struct.unpack_from("<H", pieces[0], 10) == (count,)
    assert b"".join(pieces[:count])[12:] == frame
    assert pieces[count] == VALID + FRAME


def test_without_mergeable_buffers_what_does_not_fit_is_dropped(stack: ExitStack) -> None:
    card = Card(stack, features=~int(Feature.MRG_RXBUF | Feature.GUEST_CSUM))
    card.peer.send(framed(os.urandom(5000), FRAME))
    assert card.received() == [PLAIN + FRAME]
    assert card.device.metrics()["dropped_packets"] == 1


def test_the_network_waits_for_buffers(stack: ExitStack) -> None:
    card = Card(stack, buffers=1)
    card.peer.send(framed(FRAME, FRAME, FRAME))
    assert card.received() == [VALID + FRAME]
    assert card.sleeps()
    card.give(1)
    assert card.received() == [VALID + FRAME]
    card.give(2)
    assert card.received() == [VALID + FRAME]


def test_the_guest_waits_for_the_network(stack: ExitStack) -> None:
    card = Card(stack)
    frames = [bytes([i]) * 14 + os.urandom(60000) for i in range(20)]
    for frame in frames:
        card.send(frame)
    waiting = 20 - len(card.driver.collect(TX))
    assert waiting > 10
    assert card.sleeps()
    expected = framed(*frames)
    assert drain(card.peer, card, len(expected)) == expected
    card.driver.spin()
    assert len(card.driver.collect(TX)) == waiting
    assert card.device.metrics()["dropped_packets"] == 0


@pytest.mark.parametrize("another", [False, True])
def test_what_waits_for_a_network_that_goes(stack: ExitStack, another: bool) -> None:
    card = Card(stack)
    for _ in range(20):
        card.send(bytes(60000))
    waiting = 20 - len(card.driver.collect(TX))
    assert waiting > 5
    if another:
        ours, peer = socket.socketpair()
        stack.enter_context(peer)
        peer.setblocking(False)
        card.device.reopen({"kind": "passt", "fd": ours.detach()})
        drain(peer, card, waiting * 60004)
    else:
        card.peer.close()
    card.driver.until(lambda: not card.device._backend or not card.device._backend.waiting)
    card.driver.spin()
    assert len(card.driver.collect(TX)) == waiting
    assert card.driver.kick_wanted(TX)


def test_packets_that_are_none_are_dropped(stack: ExitStack) -> None:
    card = Card(stack)
    for frame in (b"", b"short", os.urandom(MAX_FRAME + 1)):
        card.driver.put([NOTHING + frame], queue=TX)
    card.driver.put([NOTHING[:5]], queue=TX)
    card.send(FRAME)
    assert card.peer.recv(1 << 17) == framed(FRAME)
    assert len(card.driver.collect(TX)) == 5
    assert card.device.metrics()["dropped_packets"] == 4


def test_a_packet_in_many_pieces(stack: ExitStack) -> None:
    card = Card(stack)
    packet = NOTHING + FRAME
    card.driver.put([packet[at : at + 1] for at in range(len(packet))], queue=TX, indirect=True)
    card.driver.put([packet[:5], packet[5:20], packet[20:]], queue=TX)
    card.driver.kick(TX)
    assert card.peer.recv(1 << 17) == framed(FRAME, FRAME)
    card.driver.put(writable=[3, 7, 50, 300], queue=RX)
    for _ in range(8):
        card.peer.send(framed(FRAME))
    assert len(card.received()) == 8
    card.driver.kick(RX)
    card.peer.send(framed(FRAME))
    assert card.received() == [VALID + FRAME]


@pytest.mark.parametrize("queue", [RX, TX])
def test_buffers_of_the_wrong_kind_stop_the_device(stack: ExitStack, queue: int) -> None:
    card = Card(stack, buffers=0)
    card.driver.put([NOTHING + FRAME], [100], queue=queue)
    card.peer.send(framed(FRAME))
    card.driver.kick(queue)
    assert card.driver.needs_reset
    card.driver.spin()
    assert card.sleeps()


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME + 1, 0xFFFFFFFF])
def test_a_network_that_talks_nonsense_is_unplugged(stack: ExitStack, size: int) -> None:
    card = Card(stack)
    card.peer.send(struct.pack(">I", size) + bytes(100))
    card.driver.spin()
    assert card.driver.config()[6] == 0
    card.send(FRAME)
    assert len(card.driver.collect(TX)) == 1
    assert card.sleeps()


def test_a_network_that_hangs_up(stack: ExitStack) -> None:
    card = Card(stack, buffers=0)
    before = card.driver.interrupts
    card.peer.send(framed(FRAME))
    card.driver.spin()
    card.peer.close()
    card.driver.spin()
    assert card.driver.config()[6] == 0
    assert card.driver.interrupts > before
    assert card.sleeps()
    card.send(FRAME)
    assert len(card.driver.collect(TX)) == 1


def test_the_rate_is_bounded_both_ways(stack: ExitStack) -> None:
    card = Card(stack, rate=1_000_000, buffers=200)
    frames = [bytes(1514)] * 150  # 227 KB: beyond the burst of 128 KiB, 0.1 s over it
    began = time.monotonic()
    for frame in frames:
        card.driver.put([NOTHING + frame], queue=TX)
    card.driver.kick(TX)
    drain(card.peer, card, 150 * 1518)
    assert time.monotonic() - began > 0.06
    began = time.monotonic()
    got: list[bytes] = []

    def all_came(count: int) -> bool:
        got.extend(card.received())
        return len(got) == count

    for frame in frames:
        card.peer.send(framed(frame))
        card.driver.spin()
    card.driver.until(lambda: all_came(150))
    card.peer.send(framed(FRAME))  # has to wait until the debt is paid
    card.driver.until(lambda: all_came(151))
    assert time.monotonic() - began > 0.06


def test_a_bucket_without_a_bound() -> None:
    bucket = Bucket(0)
    bucket.spend(1 << 40)
    assert bucket.delay() == 0


def test_a_reset_and_a_new_driver(stack: ExitStack) -> None:
    card = Card(stack)
    card.driver.write(0x70, 0)
    card.peer.send(framed(FRAME))
    assert card.received() == []
    assert card.sleeps()
    card.driver.start()
    card.give(2)
    assert card.received() == [VALID + FRAME]


def test_a_queue_that_is_taken_away_is_not_written_to(stack: ExitStack) -> None:
    card = Card(stack, socket.SOCK_SEQPACKET, size=600)
    card.peer.send(FRAME)  # needs three buffers to be held, and uses one
    assert len(card.received()) == 1
    card.driver.write(0x30, RX)
    card.driver.write(0x44, 0)
    card.peer.send(FRAME)
    assert card.received() == []
    assert card.sleeps()


def test_a_save_gives_back_the_buffers_that_are_held(stack: ExitStack) -> None:
    card = Card(stack, socket.SOCK_SEQPACKET, size=600)
    card.peer.send(FRAME)
    assert card.received() == [PLAIN + FRAME]
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.enter_context(peer)
    device = Net(MAC, open_backend("passt", ours.detach()))
    moved = card.driver.moved(device)
    stack.callback(moved.loop.close)
    stack.callback(device.close)
    for _ in range(5):
        peer.send(FRAME)
    moved.spin()
    assert [done.data for done in moved.collect(RX)] == [PLAIN + FRAME] * 5


def test_a_fork_gets_a_network_of_its_own(stack: ExitStack) -> None:
    card = Card(stack)
    old = card.peer
    ours, peer = socket.socketpair()
    stack.enter_context(peer)
    interrupts = card.driver.interrupts
    card.device.quiesce()
    card.device.reopen({"mac": "52:54:00:65:43:21", "kind": "passt", "fd": ours.detach(), "renew": True})
    assert card.driver.interrupts == interrupts + 1
    assert card.driver.config()[:8] == bytes.fromhex("525400654321") + b"\0\0"
    card.driver.spin()
    assert card.driver.interrupts == interrupts + 1  # the link stays down until the guest has noticed
    card.driver.write(Register.INTERRUPT_ACK, 2)
    card.driver.until(lambda: card.driver.interrupts == interrupts + 2)
    assert card.driver.config()[6] == 1
    assert old.recv(1) == b""
    card.send(FRAME)
    assert peer.recv(4096) == framed(FRAME)
    peer.send(framed(FRAME))
    assert card.received() == [VALID + FRAME]


def test_a_network_that_is_nobody_elses_goes_on_at_once(stack: ExitStack) -> None:
    card = Card(stack)
    ours, peer = socket.socketpair()
    stack.enter_context(peer)
    card.device.reopen({"kind": "passt", "fd": ours.detach()})
    assert card.driver.config()[6] == 1


def test_unplugged_after_a_fork(stack: ExitStack) -> None:
    card = Card(stack)
    card.device.reopen({})
    card.driver.transport.kick()
    assert card.driver.config()[6] == 0
    card.send(FRAME)
    assert len(card.driver.collect(TX)) == 1


def test_a_receive_buffer_for_a_header_and_nothing_more(stack: ExitStack) -> None:
    """Reading a packet into it would look like the network's end."""
    card = Card(stack, socket.SOCK_SEQPACKET, features=1 << 32, buffers=0)
    card.driver.put(writable=[12], queue=RX)
    card.driver.kick(RX)
    assert card.driver.needs_reset
    card.driver.start()
    card.give(1)
    card.peer.send(FRAME)
    assert card.received() == [PLAIN + FRAME]


def test_a_driver_that_is_reset_finds_the_link_up(stack: ExitStack) -> None:
    card = Card(stack)
    ours, peer = socket.socketpair()
    stack.enter_context(peer)
    card.device.reopen({"kind": "passt", "fd": ours.detach(), "renew": True})
    assert card.driver.config()[6] == 0
    card.driver.start()
    assert card.driver.config()[6] == 1


def test_no_frame_is_cut_in_the_socket(stack: ExitStack) -> None:
    """Whenever the peer looks, it finds whole frames: what passt needs (`posada.vmm.net.stream.ATOMIC`)."""
    card = Card(stack)
    sizes = [60, 1514, 9000, 1514, 32782, 20000, 1514, 35990] * 8
    for size in sizes:
        card.driver.put([NOTHING + bytes(size)], queue=TX)
    card.driver.transport.notify(TX)
    found = 0
    while found < len(sizes):
        data = card.peer.recv(1 << 24)  # as much as there is
        while data:
            (size,) = struct.unpack_from(">I", data)
            assert size == sizes[found] and len(data) >= 4 + size
            data = data[4 + size :]
            found += 1
        if found < len(sizes):
            card.driver.until(lambda: select.select([card.peer], [], [], 0)[0])


SYN_ACK = bytes.fromhex(
    "525400f85ca8525400d659b108004500003000004000400622b80a00020f0a000202"  # Ethernet, IP: 10.0.2.15 to 10.0.2.2
    "1b58902c5a7a82a3bd3d29ad7012ffb08296000002047fd801030306"  # TCP: port 7000 to 36908
)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def test_a_connection_to_the_guest_is_acknowledged(stack: ExitStack) -> None:
    """By the card: passt may not, and then a guest that is to speak first waits for ever."""
    card = Card(stack)
    card.send(SYN_ACK)
    assert card.peer.recv(4096) == struct.pack("!I", len(SYN_ACK)) + SYN_ACK
    card.driver.spin()
    (answer,) = card.received()
    answer = answer[HEADER.size :]
    assert answer[:14] == SYN_ACK[6:12] + SYN_ACK[:6] + b"\x08\0"
    assert checksum(answer[14:34]) == 0
    assert checksum(answer[26:34] + b"\0\x06\0\x14" + answer[34:]) == 0
    assert (answer[26:30], answer[30:34]) == (SYN_ACK[30:34], SYN_ACK[26:30])
    ports_and_numbers = struct.unpack("!HHIIBB", answer[34:48])
    assert ports_and_numbers == (36908, 7000, 0xBD3D29AD, 0x5A7A82A4, 0x50, 0x10)


@pytest.mark.parametrize(
    "frame",
    [
        SYN_ACK[:47] + b"\x10" + SYN_ACK[48:],
        SYN_ACK[:47] + b"\x02" + SYN_ACK[48:],
        SYN_ACK[:14] + b"\x46" + SYN_ACK[15:],
        SYN_ACK[:23] + b"\x11" + SYN_ACK[24:],
        SYN_ACK[:50],
    ],
)
def test_nothing_else_is(stack: ExitStack, frame: bytes) -> None:
    card = Card(stack)
    card.send(frame)
    card.driver.spin()
    assert card.received() == []


def test_what_nobody_takes_is_not_kept(stack: ExitStack) -> None:
    card = Card(stack, buffers=0)
    for _ in range(500):
        card.send(SYN_ACK)
        card.driver.collect(TX)
        card.peer.recv(4096)
    card.give(100)
    card.driver.spin()
    assert 0 < len(card.received()) < 100
