"""A guest's side of the socket device, for tests: packets in and out of a `FakeDriver`'s queues."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import deque
from contextlib import ExitStack
from typing import Any

from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.vsock import Vsock
from posada.vmm.virtio.vsock.device import EVENT, RX, TX
from posada.vmm.virtio.vsock.packet import HEADER, HOST_CID, STREAM, Op, Packet

CID = 3
PORT = 1024

_cleanup = ExitStack()


def clean_up() -> None:
    """Close what the test has opened. For a fixture."""
    _cleanup.close()


class Door:
    """A listening unix socket, as the engine makes one."""

    def __init__(self) -> None:
        folder = _cleanup.enter_context(tempfile.TemporaryDirectory())
        self.path = os.path.join(folder, "s")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        self.fd = listener.detach()

    def connect(self) -> socket.socket:
        client = _cleanup.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(self.path)
        client.setblocking(False)
        return client


class Guest:
    """Speaks on the queues as a guest's driver would. ``buffers`` receive buffers of 4 KiB are given at once."""

    def __init__(self, *, buffers: int = 32) -> None:
        self.channel, self.front = Door(), Door()
        self.device: Any = Vsock(CID, [(PORT, self.channel.fd)], self.front.fd)
        self.driver = FakeDriver(self.device, memory_size=64 << 20)
        _cleanup.callback(self.driver.loop.close)
        _cleanup.callback(self.device.close)
        self.buffers = buffers
        self.inbox: deque[tuple[Packet, bytes]] = deque()
        self.events = 0
        self.give(buffers)
        for _ in range(4):
            self.driver.put(writable=[4], queue=EVENT)
        self.driver.kick(EVENT)

    def give(self, count: int = 1, size: int = 4096) -> None:
        for _ in range(min(count, len(self.driver.rings[RX].free) // 2)):
            self.driver.put(writable=[HEADER.size, size], queue=RX)
        self.driver.kick(RX)

    def send(self, op: int, host_port: int, guest_port: int = PORT, data: bytes = b"", **fields: int) -> None:
        packet = Packet(
            fields.get("src_cid", CID), fields.get("dst_cid", HOST_CID), guest_port, host_port,
            fields.get("length", len(data)), fields.get("type", STREAM), op, fields.get("flags", 0),
            fields.get("buf_alloc", 256 << 10), fields.get("fwd_cnt", 0),
        )  # fmt: skip
        self.driver.put([HEADER.pack(*packet), data] if data else [HEADER.pack(*packet)], queue=TX)
        self.driver.kick(TX)
        self.driver.collect(TX)

    def collect(self, refill: bool = True) -> None:
        done = self.driver.collect(RX)
        for item in done:
            packet = Packet._make(HEADER.unpack_from(item.data))
            assert len(item.data) == HEADER.size + packet.length
            self.inbox.append((packet, item.data[HEADER.size :]))
        if refill and done:
            self.give(len(done))

    def next(self, op: Op) -> tuple[Packet, bytes]:
        """The next packet, which must be one of ``op``."""

        def came() -> bool:
            self.collect()
            return bool(self.inbox)

        self.driver.until(came)
        packet, data = self.inbox.popleft()
        assert packet.op == op, f"{Op(packet.op).name} came, and {op.name} was expected"
        return packet, data

    def quiet(self) -> bool:
        """Nothing (more) comes."""
        self.driver.spin()
        self.collect()
        return not self.inbox

    def open(self, **fields: int) -> tuple[socket.socket, int]:
        """A client of the channel, accepted: its socket, and the host's port."""
        client = self.channel.connect()
        request, _ = self.next(Op.REQUEST)
        assert (request.src_cid, request.dst_cid, request.dst_port, request.type) == (HOST_CID, CID, PORT, STREAM)
        self.send(Op.RESPONSE, request.src_port, **fields)
        return client, request.src_port

    def received(self, size: int) -> bytes:
        """Data of ``size`` bytes, however it is cut."""
        data = b""
        while len(data) < size:
            data += self.next(Op.RW)[1]
        return data

    def read(self, client: socket.socket, size: int) -> bytes:
        """Exactly ``size`` bytes at the host's client, or all until its end."""
        data = b""

        def came() -> bool:
            nonlocal data
            try:
                piece = client.recv(size - len(data))
            except BlockingIOError:
                return False
            except ConnectionResetError:  # ended, and something it sent was never read
                return True
            data += piece
            return not piece or len(data) == size

        if size:
            self.driver.until(came)
        return data

    def ended(self, client: socket.socket) -> bool:
        """The client reads the end (within `FakeDriver.until`'s time)."""
        return self.read(client, 1) == b""
