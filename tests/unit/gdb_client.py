"""As much of gdb as the tests of the stub need."""

from __future__ import annotations

import socket
from contextlib import suppress

from posada.vmm.gdb.layout import REGISTERS
from posada.vmm.gdb.packet import Decoder, encode


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
