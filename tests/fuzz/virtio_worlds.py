"""The devices that hostile drivers are let loose on (`virtio_hostile`), each with its host's side."""

from __future__ import annotations

import os
import socket
import struct
import tempfile

from virtio_hostile import Program, World

from posada.vmm.block.raw import RawDisk
from posada.vmm.net import open_backend
from posada.vmm.virtio.balloon import Balloon
from posada.vmm.virtio.blk import Blk
from posada.vmm.virtio.console import RECEIVE, TRANSMIT, Console
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.fs import IN_HEADER, OUT_HEADER, SILENT, Fs
from posada.vmm.virtio.net import Net
from posada.vmm.virtio.rng import Rng
from posada.vmm.virtio.testing import FakeDriver
from posada.vmm.virtio.vsock import Vsock
from posada.vmm.virtio.vsock.device import EVENT, RX, TX
from posada.vmm.virtio.vsock.packet import HEADER, HOST_CID, STREAM, Op, Packet


def drain(sock: socket.socket) -> bytes:
    """All that waits in a socket that does not block."""
    found = b""
    try:
        while piece := sock.recv(1 << 20):
            found += piece
    except OSError:
        pass
    return found


class RngWorld(World):
    def make(self) -> Device:
        return Rng()

    def honest(self, driver: FakeDriver) -> None:
        assert len(driver.send(writable=[20])) == 20


class BalloonWorld(World):
    def make(self) -> Device:
        return Balloon()

    def honest(self, driver: FakeDriver) -> None:
        driver.memory.write(0x1FF000, b"x")
        driver.send([b"\xff\1\0\0"])
        assert driver.memory.read(0x1FF000, 1) == b"\0"

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        if queue in (0, 1):  # numbers of pages, in and a little beyond memory
            return [b"".join((program.byte() << 1 | 1).to_bytes(4, "little") for _ in range(program.byte() % 20))], []
        return super().request(program, queue)

    def poke(self, program: Program) -> None:
        assert isinstance(self.device, Balloon)
        if program.byte() & 1:
            self.device.poll()
        else:
            self.device.set_target((program.byte() + 1) << 12)


class ConsoleWorld(World):
    host: socket.socket

    def make(self) -> Device:
        if hasattr(self, "host"):
            self.host.close()
        self.host, inner = socket.socketpair()
        self.host.setblocking(False)
        return Console(inner.detach())

    def honest(self, driver: FakeDriver) -> None:
        if self.host.fileno() < 0:
            return
        drain(self.host)
        driver.send([b"ping"], queue=TRANSMIT)
        assert drain(self.host) == b"ping"
        driver.put(writable=[1 << 16], queue=RECEIVE)
        try:
            self.host.send(b"pong")
        except BlockingIOError:  # a full socket: the honest driver never got to read
            pass
        driver.kick(RECEIVE)
        assert driver.collect(RECEIVE)

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        if queue == TRANSMIT and program.byte() & 1:
            return [bytes(program.byte() << 10)], []
        return super().request(program, queue)

    def poke(self, program: Program) -> None:
        what = program.byte()
        if self.host.fileno() < 0:
            return
        if what == 0:
            self.host.close()
        elif what < 100:
            drain(self.host)
        else:
            try:
                self.host.send(program.bytes(8) * 100 * (what & 3))
            except OSError:
                pass

    def close(self) -> None:
        super().close()
        self.host.close()


class BlkWorld(World):
    size = 256 << 10

    def make(self) -> Device:
        fd = os.memfd_create("disk")
        os.truncate(fd, self.size)
        return Blk(RawDisk(fd, self.size), "fuzz")

    def honest(self, driver: FakeDriver) -> None:
        assert driver.send([struct.pack("<IIQ", 1, 0, 7), b"\x5a" * 512], [1]) == b"\0"
        assert driver.send([struct.pack("<IIQ", 0, 0, 7)], [512, 1]) == b"\x5a" * 512 + b"\0"

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        kind = program.pick([0, 1, 4, 8, 11, 13, 99])
        readable = [struct.pack("<IIQ", kind, 0, program.pick([program.byte, program.number])())]
        writable = [1]
        if kind == 0:
            writable = [512 * (program.byte() % 20), program.byte(), 1]
        elif kind == 1:
            readable.append(program.bytes(1) * 512 * (program.byte() % 20))
        elif kind == 8:
            writable = [program.byte() % 30, 1]
        elif kind in (11, 13):
            for _ in range(program.byte() % 4):
                sectors = program.pick([program.byte, program.number])() & 0xFFFF_FFFF
                readable.append(struct.pack("<QII", program.byte() * 4, sectors, program.byte() % 3))
        if not program.byte() % 8:  # cut elsewhere: framing is the driver's own (section 2.7.4)
            joined, at = b"".join(readable), program.byte()
            readable = [joined[:at], joined[at:]]
        return readable, writable

    def poke(self, program: Program) -> None:
        assert isinstance(self.device, Blk)
        self.size += 512 * program.byte()
        self.device.resize(self.size)


class VsockWorld(World):
    cid, port = 3, 1024

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clients: list[socket.socket] = []
        self.doors = 0
        super().__init__()

    def make(self) -> Device:
        self.doors += 1
        listeners = []
        for name in ("channel", "front"):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(self._path(name))
                listener.listen(8)
                listeners.append(os.dup(listener.fileno()))
        return Vsock(self.cid, [(self.port, listeners[0])], listeners[1])

    def honest(self, driver: FakeDriver) -> None:
        for _ in range(4):
            driver.put(writable=[HEADER.size, 512], queue=RX)
        driver.kick(RX)
        while self.clients:
            self.clients.pop().close()
        driver.spin()  # clients that were waiting at the door come and go
        driver.start()
        for _ in range(4):
            driver.put(writable=[HEADER.size, 512], queue=RX)
        driver.kick(RX)
        client = self._connect("channel")
        request = self._next(driver, Op.REQUEST)
        answer = Packet(self.cid, HOST_CID, self.port, request[0], 0, STREAM, Op.RESPONSE, 0, 1 << 16, 0)
        driver.send([HEADER.pack(*answer)], queue=TX)
        client.send(b"hello")
        assert self._next(driver, Op.RW)[-1] == b"hello"

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        if queue == RX:
            return [], [HEADER.size, program.byte() * 8] if program.byte() & 7 else [program.byte()]
        if queue == EVENT:
            return [], [4 if program.byte() & 7 else program.byte() % 8]
        data = program.bytes(program.byte() % 64)
        odd = not program.byte() % 8
        ports = [self.port, 1 << 30, (1 << 30) + 1, (1 << 30) + 2, (1 << 30) + 3]
        packet = Packet(
            program.byte() if odd else self.cid, HOST_CID, self.port, program.pick(ports),
            program.number() & 0xFFFF_FFFF if odd else len(data), program.byte() if odd else STREAM,
            program.pick([*Op, Op.RESPONSE, Op.RW, Op.RW, 200]), program.byte() % 4,
            program.pick([1 << 16, 0, 100, 0xFFFF_FFFF]), program.pick([0, program.byte(), 0xFFFF_FFFF]),
        )  # fmt: skip
        return [HEADER.pack(*packet), data] if program.byte() & 3 else [HEADER.pack(*packet) + data], []

    def poke(self, program: Program) -> None:
        what = program.byte()
        if what < 80 and len(self.clients) < 6:
            self._connect("front" if what & 1 else "channel")
        elif self.clients and what < 120:
            self.clients.pop(what % len(self.clients)).close()
        elif self.clients:
            client = self.clients[what % len(self.clients)]
            try:
                if what < 150:
                    client.recv(1 << 16)
                elif what < 170:
                    client.shutdown(what % 3)
                elif what < 210:
                    client.send(program.pick([b"CONNECT 1024\n", b"CONNECT ", b"CONNECT 99999999999\n"]))
                else:
                    client.send(program.bytes(16) * (what & 15))
            except OSError:
                pass

    def close(self) -> None:
        super().close()
        for client in self.clients:
            client.close()
        self.folder.cleanup()

    def _path(self, name: str) -> str:
        return f"{self.folder.name}/{name}{self.doors}"

    def _connect(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try:
            client.connect(self._path(name))
        except BlockingIOError:  # nobody takes connections: the device has failed
            pass
        self.clients.append(client)
        return client

    def _next(self, driver: FakeDriver, op: Op) -> tuple[int, bytes]:
        """Source port and data of the next packet of this kind."""
        for _ in range(20):
            driver.spin()
            for done in driver.collect(RX):
                driver.put(writable=[HEADER.size, 512], queue=RX)
                packet = Packet._make(HEADER.unpack_from(done.data))
                if packet.op == op:
                    return packet.src_port, done.data[HEADER.size :]
            driver.kick(RX)
        raise AssertionError(f"no {op.name} came")


class NetWorld(World):
    kind = socket.SOCK_SEQPACKET
    frame = bytes.fromhex("ffffffffffff525400123456 0800") + bytes(50)
    peer: socket.socket

    def make(self) -> Device:
        if hasattr(self, "peer"):
            self.peer.close()
        ours, self.peer = socket.socketpair(socket.AF_UNIX, self.kind)
        self.peer.setblocking(False)
        return Net("52:54:00:12:34:56", open_backend("passt", ours.detach()))

    def honest(self, driver: FakeDriver) -> None:
        if self.peer.fileno() < 0:
            return
        for _ in range(100):  # what is left from before
            drain(self.peer)
            driver.spin()
        driver.send([bytes(12), self.frame], queue=1)
        assert drain(self.peer).endswith(self.frame)
        for _ in range(200):
            driver.put(writable=[2000], queue=0)
            driver.kick(0)
            if any(done.data[12:] == self.frame for done in driver.collect(0)):
                return
            self._send(self.frame)
            driver.spin()
        raise AssertionError("no frame arrives")

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        if queue == 0:
            return [], [program.pick([program.byte(), 12, 60, 1526, 2000, 4096])]
        data = bytes(12) + program.bytes(4) * program.pick([0, 3, 20, 400, 5000])
        at = program.byte() % 16
        return [data] if program.byte() & 1 else [data[:at], data[at:]], []

    def poke(self, program: Program) -> None:
        what = program.byte()
        if self.peer.fileno() < 0:
            return
        if what == 0:
            self.peer.close()
        elif what < 100:
            drain(self.peer)
        else:
            for _ in range(what & 7):
                self._send((self.frame * 30)[: program.pick([14, 15, 60, 1400, 1600])])

    def _send(self, frame: bytes) -> None:
        try:
            self.peer.send((struct.pack(">I", len(frame)) if self.kind == socket.SOCK_STREAM else b"") + frame)
        except OSError:
            pass

    def close(self) -> None:
        super().close()
        self.peer.close()


class NetStreamWorld(NetWorld):
    kind = socket.SOCK_STREAM


class FsWorld(World):
    """The folder's server answers everything, late, with a header and some bytes."""

    peer: socket.socket

    def make(self) -> Device:
        if hasattr(self, "peer"):
            self.peer.close()
        self.peer, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.setblocking(False)
        return Fs("fuzz", inner.detach())

    def honest(self, driver: FakeDriver) -> None:
        if self.peer.fileno() < 0:
            return
        driver.put([IN_HEADER.pack(IN_HEADER.size, 3, 77, 1, 0, 0, 0, 0)], [OUT_HEADER.size, 50], queue=1)
        driver.kick(1)
        for _ in range(100):
            self._serve(20)
            driver.spin()
            for done in driver.collect(1):
                assert OUT_HEADER.unpack_from(done.data)[2] == 77
                return
        raise AssertionError("no answer of the folder's server arrives")

    def request(self, program: Program, queue: int) -> tuple[list[bytes], list[int]]:
        opcode = program.pick([1, 2, 3, 15, 16, 26, 36, 42, program.byte()])
        head = IN_HEADER.pack(program.byte(), opcode, program.byte(), 1, 0, 0, 0, 0)
        body = program.bytes(1) * program.pick([0, 1, 40, 5000, 140_000])
        at = program.byte() % 64
        readable = [head, body] if program.byte() & 1 else [(head + body)[:at], (head + body)[at:]]
        return readable, [program.pick([16, 16, 15, 4096]), program.byte()] if program.byte() & 7 else []

    def poke(self, program: Program) -> None:
        if program.byte() == 0:
            self.peer.close()
        elif self.peer.fileno() >= 0:
            self._serve(program.byte(), short=program.byte() < 8)

    def settle(self) -> None:
        if self.peer.fileno() >= 0:
            self._serve(0)

    def _serve(self, size: int, *, short: bool = False) -> None:
        try:
            while request := self.peer.recv(1 << 18):
                _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
                if opcode not in SILENT:
                    answer = OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique) + bytes(size)
                    self.peer.send(answer[:5] if short else answer)
        except OSError:
            pass

    def close(self) -> None:
        super().close()
        self.peer.close()


WORLDS: dict[str, type[World]] = {
    "rng": RngWorld,
    "balloon": BalloonWorld,
    "console": ConsoleWorld,
    "blk": BlkWorld,
    "vsock": VsockWorld,
    "fs": FsWorld,
    "net": NetWorld,
    "net-stream": NetStreamWorld,
}
