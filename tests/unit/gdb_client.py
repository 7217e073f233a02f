"""As much of gdb as the tests of the stub need, and a toy guest for it."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from typing import Any

from kvm_kit import Running, Toy

from posada.kvm.exits import ExitData
from posada.vmm.gdb.layout import REGISTERS
from posada.vmm.gdb.packet import Decoder, encode
from posada.vmm.gdb.server import GdbServer
from posada.vmm.loop import Loop
from posada.vmm.vcpu import VcpuThread


class Client:
    """One connection. Waits at most ten seconds for an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(10)
        self._decoder = Decoder()
        self._waiting: list[bytes] = []

    def send(self, payload: str | bytes) -> None:
        self.socket.sendall(encode(payload.encode() if isinstance(payload, str) else payload))

    def receive(self) -> str:
        while not self._waiting:
            data = self.socket.recv(65536)
            assert data, "the stub has closed the connection"
            for event in self._decoder.feed(data):
                if isinstance(event, bytes):
                    with suppress(BrokenPipeError):  # after the last reply the stub has gone
                        self.socket.sendall(b"+")
                    self._waiting.append(event)
        return self._waiting.pop(0).decode()

    def ask(self, payload: str | bytes) -> str:
        self.send(payload)
        return self.receive()

    def register(self, name: str) -> int:
        number = [register.name for register in REGISTERS].index(name)
        return int.from_bytes(bytes.fromhex(self.ask(f"p{number:x}")), "little")


class Debugged:
    """A toy, its loop on a thread, and a stub with a client connected."""

    def __init__(self, toy: Toy) -> None:
        self.loop = Loop()
        self.machine = Running(toy, ends=self.exited, lock=self.loop.lock)
        self.other: list[Any] = []
        self.server: GdbServer | None = None
        self.gone = threading.Event()
        self.machine.vcpus.start()
        self.runner = threading.Thread(target=self.loop.run, daemon=True)
        self.runner.start()
        self.ours, theirs = socket.socketpair()
        attached = threading.Event()

        def attach() -> None:
            self.server = GdbServer(self.loop, self.machine.vcpus, toy.memory, theirs.detach(), self.gone.set)
            attached.set()

        self.loop.soon(attach)
        assert attached.wait(10)
        self.client = Client(self.ours)

    def exited(self, thread: VcpuThread, what: ExitData | Exception) -> bool:
        answer = self.server.exited(thread, what) if self.server else None
        if answer is None:
            self.other.append(what)
        return bool(answer)

    def readable(self) -> bool:
        return bool(select.select([self.ours], [], [], 0)[0])

    def close(self) -> None:
        self.ours.close()
        assert self.gone.wait(10)
        self.loop.stop()
        self.runner.join(10)
        self.machine.close()
        self.loop.close()
