"""The socket device, driven by a guest in Python over real unix sockets: streams, and what a guest may not do."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from vsock_kit import CID, PORT, Guest, clean_up

from posada.vmm.virtio.views import fill, split
from posada.vmm.virtio.vsock.device import FIRST_PORT, MAX_CLOSING, RX, TX
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
