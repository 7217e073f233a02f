"""A kernel of a hundred bytes for the kvm engine's tests: it says ``toy``, and does what is typed on the serial port.

``+`` adds one to a counter in memory, ``?`` prints it (a digit), ``q`` powers off, ``r`` resets, ``!`` triple-faults,
``^`` runs on where there is no memory, anything else is echoed. It works wherever /dev/kvm can be opened, also where the
host emulates it.
"""

from __future__ import annotations

import asyncio
import os
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest

from posada.engine.base import Launch
from posada.engine.common import process
from posada.model.machine import make_spec
from posada.model.records import Process

LOAD = 0x10_0000
COUNTER = 0x20_0000
NOWHERE = 0xC800_0000
"""No memory and no device is there."""


def kvm_opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


needs_kvm = pytest.mark.skipif(not kvm_opens(), reason="/dev/kvm cannot be opened here")


class Code:
    """Machine code with labels for short jumps."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def put(self, *parts: bytes) -> Code:
        self._bytes += b"".join(parts)
        return self

    def label(self, name: str) -> Code:
        self._labels[name] = len(self._bytes)
        return self

    def jump(self, opcode: bytes, to: str) -> Code:
        self._bytes += opcode + b"\0"
        self._jumps.append((len(self._bytes), to))
        return self

    def finish(self) -> bytes:
        for after, to in self._jumps:
            struct.pack_into("<b", self._bytes, after - 1, self._labels[to] - after)
        return bytes(self._bytes)


JMP, JZ = b"\xeb", b"\x74"
OUT, IN = b"\xee", b"\xec"


def _dx(port: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", port)


def _al(value: int) -> bytes:
    return bytes((0xB0, value))


def program() -> bytes:
    """32-bit protected mode, flat, as PVH begins."""
    code = Code()
    for letter in b"toy\n":
        code.put(_dx(0x3F8), _al(letter), OUT)
    code.label("loop").put(_dx(0x3FD), IN, b"\xa8\x01").jump(JZ, "loop")  # test al, 1
    code.put(_dx(0x3F8), IN)
    for letter, label in (
        (b"+", "add"),
        (b"?", "tell"),
        (b"q", "off"),
        (b"r", "reset"),
        (b"!", "fault"),
        (b"^", "lost"),
    ):
        code.put(b"\x3c" + letter).jump(JZ, label)  # cmp al, letter
    code.put(OUT).jump(JMP, "loop")
    code.label("add").put(b"\xff\x05", struct.pack("<I", COUNTER)).jump(JMP, "loop")  # inc dword [COUNTER]
    code.label("tell").put(b"\xa1", struct.pack("<I", COUNTER), b"\x04\x30", OUT).jump(JMP, "loop")
    code.label("off").put(_dx(0x601), _al(0x34), OUT, b"\xf4")
    code.label("reset").put(_dx(0x603), _al(1), OUT, b"\xf4")
    code.label("fault").put(b"\x0f\x01\x1d", struct.pack("<I", 0x9000), b"\xcc")  # lidt of zeros; int3
    code.label("lost").put(b"\xb8", struct.pack("<I", NOWHERE), b"\xff\xe0")  # jump to where there is no memory
    return code.finish()


def kernel() -> bytes:
    """An ELF with a PVH note, one segment, entry at its beginning."""
    code = program()
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD)
    headers = 64 + 2 * 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    at = headers + len(note)
    load = struct.pack("<IIQQQQQQ", 1, 7, at, LOAD, LOAD, len(code), len(code), 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, headers, 0, 0, len(note), len(note), 4)
    return header + load + notes + note + code


ME = process.find(os.getpid())


class Kit:
    """Launches toys below one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = folder / "kernel"
        self.kernel.write_bytes(kernel())

    def launch(self, *, owner: Process | None = ME, **spec: Any) -> Launch:
        id = str(uuid.uuid4())
        runtime = self.folder / "run" / id
        runtime.mkdir(mode=0o700, parents=True)
        fields = {"memory": "64MiB", "nics": [], "engine": "kvm", "boot": {"kernel": str(self.kernel)}, **spec}
        return Launch(
            uuid=id,
            name="toy",
            spec=make_spec(fields),
            runtime=runtime,
            log=runtime / "console.log",
            kernel=self.kernel,
            owner=owner,
            generation_id=str(uuid.uuid4()),
        )


class Console:
    """One client of a console."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, runtime: Path) -> Console:
        return cls(*await asyncio.open_unix_connection(runtime / "console.sock"))

    async def until(self, text: bytes) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.readuntil(text)

    def type(self, text: bytes) -> None:
        self.writer.write(text)

    def close(self) -> None:
        self.writer.close()


async def say(runtime: Path, text: bytes) -> bytes:
    """Type something; what the guest answers, the recent output before it."""
    mark = uuid.uuid4().hex.translate(str.maketrans("0123456789", "ghijklmnop")).encode()[:8]
    console = await Console.open(runtime)
    try:
        console.type(text + mark)
        return (await console.until(mark))[: -len(mark)]
    finally:
        console.close()


async def count(runtime: Path, text: bytes = b"") -> int:
    """Type something; the guest's counter then."""
    return int((await say(runtime, text + b"?"))[-1:])
