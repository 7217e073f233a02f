"""Live migration, the source's side: memory goes over while the guest runs, then what it changed meanwhile, and again,
until the rest fits into the pause it was promised; then the machine stops here and goes on there (`posada.proto.migration`).

Nothing here waits until the vcpus stand still: the loop sends when the socket takes it. The last part is waited for, with
a time limit. Until GO is sent any failure, on any side, leaves the machine running here. After it nobody but the
destination may run the machine: if its answer is lost, the machine stays paused here and a person must look.

Disks are not moved: they are on storage that both monitors see, and handed over while the machine stands still
(`posada.vmm.handover`). Host connections (vsock, console) end here.
"""

from __future__ import annotations

import _socket
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posada.errors import Cancelled, EngineError, PosadaError
from posada.proto import cbor, migration
from posada.proto.migration import Kind
from posada.vmm import handover, memfile
from posada.vmm.dirty import DirtyPages, as_runs
from posada.vmm.handover import Handover
from posada.vmm.link import Link
from posada.vmm.machine import Machine, State
from posada.vmm.memory import PAGE
from posada.vmm.pagemap import PageMap, Run, total

MAX_ROUNDS = 30
TURN = 4 << 20
"""Bytes sent before the loop looks after others."""
PATIENCE = 30.0
"""Seconds for the destination to load the state, and then to say that it runs."""
_ZERO = bytes(1 << 16)


@dataclass(frozen=True)
class Moved:
    """``pause``: seconds from the last instruction here to the destination's word; ``bytes``: memory sent."""

    pause: float
    bytes: int
    rounds: int


class Outgoing:
    """One migration of a running machine. ``done`` is called once, on the loop."""

    def __init__(
        self,
        machine: Machine,
        fd: int,
        pause: float,
        done: Callable[[Moved | Exception], object],
        pages: PageMap | None = None,
    ) -> None:
        """Takes over ``fd``, a connected stream. ``pause``: seconds that sending the rest may take.

        With ``pages`` only what was touched is sent, else all that is not zero. Raises Unsupported, Busy, OSError, KvmError.
        """
        self._machine, self._pause, self._done = machine, pause, done
        self._socket = _socket.socket(fileno=fd)
        self._link = Link(self._socket)
        try:
            self._disks = Handover(machine)
            with machine.loop.lock, machine.vcpus.quiesced():
                self._dirty = DirtyPages(machine)
                self._first = self._touched(pages)
        except BaseException:
            self._socket.close()
            raise
        self._sent = self._rounds = 0
        self._rest: list[int] = []
        self._pending: list[memoryview] = []
        self._frames = self._send_rounds()
        self._socket.setblocking(False)
        machine.loop.watch(fd, self._pump, select.EPOLLOUT)

    def cancel(self) -> None:
        """The machine stays here. Nothing, once it is over."""
        if self._socket.fileno() >= 0:
            self._fail(Cancelled("the migration was cancelled"))

    # While the guest runs.

    def _touched(self, pages: PageMap | None) -> list[Run]:
        ram, address = memfile.linear(self._machine.memory)
        if pages is not None and self._machine.layers is None:
            return pages.own(address, self._machine.memory.size)
        step = len(_ZERO)
        return [
            (at, min(step, len(ram) - at))
            for at in range(0, len(ram), step)
            if ram[at : at + step] != _ZERO[: len(ram) - at]
        ]

    def _send_rounds(self) -> Iterator[list[memoryview]]:
        machine = self._machine
        hello = {"size": machine.memory.size, "cpus": len(machine.vcpus.threads), "devices": list(machine.slots)}
        yield self._link.frame(Kind.HELLO, cbor.encode(hello))
        runs: Sequence[Run] = self._first
        for self._rounds in range(1, MAX_ROUNDS + 1):
            begun = time.monotonic()
            yield from self._pages(runs)
            rate = total(runs) / max(time.monotonic() - begun, 1e-6)
            self._rest = self._dirty.collect()
            if len(self._rest) * PAGE <= rate * self._pause:
                return
            runs = as_runs(self._rest)
        raise EngineError(
            f"the guest changes memory faster than it can be sent, also after {MAX_ROUNDS} rounds",
            hint="allow a longer pause",
        )

    def _pages(self, runs: Sequence[Run]) -> Iterator[list[memoryview]]:
        ram, _ = memfile.linear(self._machine.memory)
        for some in migration.split(runs):
            self._sent += total(some)
            yield [memoryview(migration.pages_head(some)), *(ram[at : at + length] for at, length in some)]

    def _pump(self, events: int) -> None:
        budget = TURN
        try:
            while budget > 0:
                if not self._pending:
                    frame = next(self._frames, None)
                    if frame is None:
                        self._hand_over()
                        return
                    self._pending = frame
                sent = self._socket.sendmsg(self._pending[:64])
                budget -= sent
                self._pending = _after(self._pending, sent)
        except BlockingIOError:
            pass
        except Exception as error:  # the machine must stay, whatever it is
            self._fail(self._link.reason(error))

    def _fail(self, error: Exception) -> None:
        self._end()
        self._done(error)

    def _stay(self, error: Exception, running: bool) -> None:
        """The machine goes on here, as soon as the destination has let go of its disks."""
        self._end()
        try:
            self._disks.take_back(handover.PATIENCE)
            if running:
                self._machine.resume()
        except (PosadaError, OSError) as stuck:
            hint = "see that the destination is gone, then resume the machine"
            error = EngineError(f"{error}; and it stays paused here: {stuck}", hint=hint)
        self._done(error)

    def _end(self) -> None:
        self._machine.loop.unwatch(self._socket.fileno())
        self._dirty.close()
        self._socket.close()

    # While it stands still.

    def _hand_over(self) -> None:
        machine, link = self._machine, self._link
        running = machine.state is State.RUNNING
        begun = time.monotonic()
        gone = False
        try:
            self._socket.settimeout(PATIENCE)
            self._disks.prepare()
            machine.pause()
            document = machine.save()
            document["disks"] = self._disks.release()
            for frame in self._pages(as_runs(sorted({*self._rest, *self._dirty.collect()}))):
                link.send(frame)
            link.send(link.frame(Kind.STATE, cbor.encode(document)))
            link.expect(Kind.READY)
            gone = True
            link.send(link.frame(Kind.GO))
            link.expect(Kind.RUNNING)
        except Exception as error:
            if gone:
                self._fail(
                    EngineError(
                        "the destination has the machine, but did not say that it runs: it stays paused here",
                        detail=str(error),
                        hint="look there first; resume it here only if it is not there",
                    )
                )
                return
            self._stay(error, running)
            return
        self._end()
        self._done(Moved(time.monotonic() - begun, self._sent, self._rounds))


def _after(buffers: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of ``buffers`` without their first ``sent`` bytes."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
