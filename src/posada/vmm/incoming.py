"""Live migration, the destination's side. What comes is as untrusted as a snapshot: see `posada.vmm.snapshot`."""

from __future__ import annotations

import _socket
from typing import Any

from posada.errors import EngineError, StateError
from posada.proto import cbor, migration
from posada.proto.migration import Kind, MigrationError
from posada.vmm import handover, memfile, state
from posada.vmm.builder import prepare, wire
from posada.vmm.config import MonitorConfig
from posada.vmm.link import Link
from posada.vmm.machine import Machine
from posada.vmm.memory import GuestMemory
from posada.vmm.snapshot import check_processors, wake

PATIENCE = 60.0
"""Seconds without a byte from the source."""


class Incoming:
    """One migration. `receive`, then whatever else must succeed here, then `take_over`, then start it, then `running`."""

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``, a connected stream."""
        self._socket = _socket.socket(fileno=fd)
        self._socket.settimeout(PATIENCE)
        self._link = Link(self._socket)

    def receive(self, config: MonitorConfig) -> Machine:
        """The machine, BUILT: it is still the source's. Raises StateError, EngineError, KvmError, OSError."""
        try:
            memory = self._hello(config)
            while True:
                kind, length = self._link.expect(Kind.PAGES, Kind.STATE)
                if kind is Kind.STATE:
                    break
                self._pages(memory, length)
            return self._load(config, memory, self._link.read(length))
        except Exception as error:
            self.fail(error)
            raise

    def take_over(self) -> None:
        """From here on the machine is ours. Raises EngineError if the source has changed its mind; then it is not."""
        self._link.send(self._link.frame(Kind.READY))
        self._link.expect(Kind.GO)

    def running(self) -> None:
        """Best effort: the machine is ours whether the source hears it or not."""
        try:
            self._link.send(self._link.frame(Kind.RUNNING))
        except EngineError:
            pass
        self._socket.close()

    def fail(self, error: Exception) -> None:
        """Tell the source, whose machine goes on."""
        try:
            self._link.send(self._link.frame(Kind.FAILED, str(error).encode(errors="replace")[: migration.MAX_TEXT]))
        except EngineError:
            pass
        self._socket.close()

    def _hello(self, config: MonitorConfig) -> GuestMemory:
        _, length = self._link.expect(Kind.HELLO)
        hello = _document(self._link.read(length))
        size = state.integer(hello, "size", 0, 1 << 62)
        cpus = state.integer(hello, "cpus", 0, 1 << 16)
        if (size, cpus) != (config.memory, config.cpus):
            raise StateError(
                f"the machine has {cpus} vcpus and {size} bytes of memory, "
                f"and was announced with {config.cpus} and {config.memory}"
            )
        return GuestMemory.anonymous(size, config.hugepages)

    def _pages(self, memory: GuestMemory, length: int) -> None:
        if length < 4:
            raise EngineError("an empty PAGES frame")
        count = int.from_bytes(self._link.read(4), "little")
        content = length - 4 - count * migration.RUN.size
        if count > migration.MAX_RUNS or content < 0:
            raise EngineError(f"a PAGES frame of {count} runs in {length} bytes")
        try:
            runs = migration.read_runs(self._link.read(count * migration.RUN.size), count, content, memory.size)
        except MigrationError as error:
            raise EngineError("the migration failed", detail=str(error)) from error
        ram, _ = memfile.linear(memory)
        for at, size in runs:
            self._link.read_into(ram[at : at + size])

    def _load(self, config: MonitorConfig, memory: GuestMemory, data: bytes) -> Machine:
        document = _document(data)
        machine = prepare(config, memory)
        handover.check(machine, document)
        check_processors(machine, document)
        wire(machine)
        machine.load(document)
        wake(machine)
        return machine


def _document(data: bytes) -> dict[str, Any]:
    try:
        return cbor.decode_map(data)
    except cbor.CborError as error:
        raise StateError(f"the migrated state is damaged: {error}") from None
