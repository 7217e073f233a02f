"""Sockets of guest and host against a model: whatever both sides do, bytes arrive in order, unchanged, each once.

`test_virtio_devices` lets hostile drivers at the device; here both sides keep to the rules most of the time, and then some
nonsense comes in between. ``POSADA_FUZZ=n`` runs n programs instead of a few.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from vsock_kit import CID, PORT, Guest, clean_up

from posada.vmm.virtio.vsock.packet import HOST_CID, Op, Packet, Shut
from posada.vmm.virtio.vsock.stream import BUFFER

PROGRAMS = int(os.environ.get("POSADA_FUZZ", "60"))
WINDOW = 3000
"""Bytes the guest has room for on each stream: little, so that credit runs out often."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    clean_up()


class Pair:
    """One connection as both ends see it. Bytes are counted by position, so each has its own value."""

    def __init__(self, client: socket.socket, port: int) -> None:
        self.client = client
        self.port = port
        self.to_guest = self.from_guest = self.at_guest = self.at_host = self.read = 0
        self.fwd = 0  # of the device, as last told
        self.guest_shut = self.told = 0
        self.client_wrote_all = self.client_closed = self.reset = False

    @staticmethod
    def pattern(start: int, size: int) -> bytes:
        return bytes((at * 7 + (at >> 8)) & 0xFF for at in range(start, start + size))


class World:
    def __init__(self) -> None:
        self.guest = Guest(buffers=3)
        self.pairs: dict[int, Pair] = {}
        self.waiting: list[socket.socket] = []
        self.taken = 0

    def sort_inbox(self) -> None:
        """The guest takes what has come."""
        self.guest.driver.spin()
        self.guest.collect(refill=False)
        inbox = self.guest.inbox
        while inbox:
            packet, data = inbox.popleft()
            self.taken += 1
            assert (packet.src_cid, packet.dst_cid, packet.dst_port) == (HOST_CID, CID, PORT)
            pair = self.pairs.get(packet.src_port)
            if packet.op == Op.REQUEST:
                assert pair is None
                self.accept(packet)
                continue
            if packet.op == Op.RST and (pair is None or packet.buf_alloc == 0):
                if pair is not None:
                    pair.reset = True
                continue
            assert pair is not None
            if pair.guest_shut == Shut.BOTH or pair.reset:
                continue  # crossed on the way
            pair.fwd = packet.fwd_cnt
            assert pair.fwd <= pair.from_guest
            if packet.op == Op.RW:
                assert data == Pair.pattern(pair.at_guest, len(data))
                pair.at_guest += len(data)
                assert pair.at_guest - pair.read <= WINDOW
                assert not pair.told & Shut.SEND, "data after the end"
            elif packet.op == Op.SHUTDOWN:
                pair.told |= packet.flags

    def accept(self, request: Packet) -> None:
        pair = self.pairs[request.src_port] = Pair(self.waiting.pop(0), request.src_port)
        # Little room in the socket, so that backlogs are common.
        stream = self.guest.device._streams.get((request.src_port, PORT))
        if stream is not None:
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.say(pair, Op.RESPONSE)

    def say(self, pair: Pair, op: Op, data: bytes = b"", **fields: int) -> None:
        self.guest.send(op, pair.port, data=data, buf_alloc=WINDOW, fwd_cnt=pair.read, **fields)

    # What may happen.

    def step(self, what: int, which: int, size: int) -> None:
        pairs = [pair for pair in self.pairs.values() if not pair.reset]
        if what == 0 and len(self.pairs) < 6:
            self.waiting.append(self.guest.channel.connect())
        elif what == 1:
            self.guest.give(1 + size % 4, 1 + size % 700)
        elif pairs:
            self.act(what, pairs[which % len(pairs)], size)
        self.sort_inbox()

    def act(self, what: int, pair: Pair, size: int) -> None:
        open_ = pair.guest_shut != Shut.BOTH
        if what == 2 and not (pair.client_wrote_all or pair.client_closed or pair.guest_shut & Shut.RECEIVE):
            try:
                pair.to_guest += pair.client.send(Pair.pattern(pair.to_guest, size))
            except (BlockingIOError, BrokenPipeError):
                pass
        elif what == 3 and not pair.client_closed:
            self.client_reads(pair, size)
        elif what == 4 and open_:
            pair.read = min(pair.at_guest, pair.read + size)
            self.say(pair, Op.CREDIT_UPDATE)
        elif what == 5 and open_ and not pair.guest_shut & Shut.SEND:
            room = min(size, BUFFER - (pair.from_guest - pair.fwd))
            if room > 0:
                data = Pair.pattern(pair.from_guest, room)
                pair.from_guest += room
                self.say(pair, Op.RW, data)
        elif what == 6 and not pair.client_closed:
            pair.client.shutdown(socket.SHUT_WR)
            pair.client_wrote_all = True
        elif what == 7 and size % 5 == 0 and not pair.client_closed:
            pair.client.close()
            pair.client_closed = True
        elif what == 8 and open_:
            pair.guest_shut |= size % 4
            self.say(pair, Op.SHUTDOWN, flags=size % 4)
        elif what == 9 and open_ and size % 7 == 0:
            pair.reset = True
            self.say(pair, Op(size % 8) if size % 8 else Op.RST, flags=3)

    def client_reads(self, pair: Pair, size: int) -> bytes | None:
        try:
            data = pair.client.recv(size)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""
        assert data == Pair.pattern(pair.at_host, len(data))
        pair.at_host += len(data)
        assert pair.at_host <= pair.from_guest
        return data

    def finish(self) -> None:
        """Both sides are willing now: whatever was sent must come out at the other end."""
        device = self.guest.device
        for _ in range(400):
            before = self.taken
            self.guest.give(4, 500)
            self.sort_inbox()
            quiet = self.taken == before
            for pair in self.pairs.values():
                if pair.reset:
                    continue
                if not pair.client_closed:
                    quiet = self.client_reads(pair, 1 << 20) in (None, b"") and quiet
                if pair.guest_shut != Shut.BOTH and pair.read != pair.at_guest:
                    pair.read = pair.at_guest
                    self.say(pair, Op.CREDIT_UPDATE)
                    quiet = False
            if quiet:
                break
        for pair in self.pairs.values():
            whole = not (pair.reset or pair.client_closed or pair.guest_shut & Shut.RECEIVE)
            if whole:
                assert pair.at_guest == pair.to_guest
            if whole and not pair.guest_shut:
                assert pair.at_host == pair.from_guest
                assert bool(pair.told & Shut.SEND) == pair.client_wrote_all
        for pair in self.pairs.values():
            pair.client.close()
        for client in self.waiting:
            client.close()
        for _ in range(20):
            self.guest.give(4, 500)
            self.sort_inbox()
        for pair in self.pairs.values():
            self.guest.send(Op.RST, pair.port)
        self.guest.driver.spin()
        assert not self.guest.driver.needs_reset
        assert device.metrics()["streams"] == 0
        assert self.guest.driver.loop._epoll.poll(0) == [], "the loop would spin"


@settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 40_000)), max_size=40))
def test_bytes_arrive_whatever_happens(steps: list[tuple[int, int, int]]) -> None:
    world = World()
    world.step(0, 0, 1)
    for what, which, size in steps:
        world.step(what, which, size)
    world.finish()
    clean_up()
