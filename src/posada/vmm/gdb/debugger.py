"""A running machine under a debugger: `Op.DEBUG` gives a listening socket, where one gdb at a time is served.

While one is attached its breakpoints lie in guest memory and its vcpus stand where it left them. So what copies the
machine is refused meanwhile; and a forked child does not inherit the socket that its parent listens on.
"""

from __future__ import annotations

import _socket
import os
from collections.abc import Mapping
from typing import Protocol

from posada.errors import EngineError
from posada.kvm.exits import ExitData
from posada.proto.monitor import Op
from posada.vmm.control import Call, Handler, Result
from posada.vmm.gdb.server import GdbServer
from posada.vmm.gdb.target import Memory
from posada.vmm.loop import Loop
from posada.vmm.vcpu import OnExit, Vcpus, VcpuThread

COPIES = (Op.CAPTURE, Op.FORK, Op.RESET, Op.MIGRATE)
"""Requests that look at all of a machine, or replace it."""


class Machine(Protocol):
    """What of a machine is needed: `posada.vmm.machine.Machine`."""

    loop: Loop
    vcpus: Vcpus

    @property
    def memory(self) -> Memory: ...


class Debugging:
    """One machine's. `handlers` goes around those of all others."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._listener: _socket.socket | None = None
        self._server: GdbServer | None = None
        self._before: list[OnExit] = []
        self._copying = 0
        """Copies asked for and not made yet: nobody attaches before they are."""
        os.register_at_fork(after_in_child=self._in_child)

    @property
    def attached(self) -> bool:
        return self._server is not None

    def handlers(self, others: Mapping[Op, Handler]) -> dict[Op, Handler]:
        """``others`` with `Op.DEBUG`, and with a guard before what copies the machine."""
        guarded = {op: self._guard(handler) for op, handler in others.items() if op in COPIES}
        return {**others, **guarded, Op.DEBUG: self._debug}

    def _debug(self, call: Call) -> Result:
        self._close_listener()
        self._listener = _socket.socket(fileno=call.given.take(call.args["listener"]))
        self._listener.setblocking(False)
        self._machine.loop.watch(self._listener.fileno(), self._accept)
        return {}

    def _guard(self, handler: Handler) -> Handler:
        def guarded(call: Call) -> Result | None:
            if self.attached:
                raise EngineError("a debugger is attached, and its breakpoints lie in memory", hint="detach it first")
            self._copying += 1
            try:
                return handler(call)
            finally:
                self._machine.loop.soon(self._copied)  # after what the handler itself puts off (`Loop.soon`)

        return guarded

    def _copied(self) -> None:
        self._copying -= 1

    def _in_child(self) -> None:
        """Right after fork(2): the loop's epoll is still the parent's, so the socket is given up when it has its own."""
        if self._listener is not None:
            self._machine.loop.soon(self._close_listener)

    def _accept(self, _: int) -> None:
        try:
            fd, _address = self._listener._accept()  # type: ignore[union-attr]
        except OSError:
            return
        if self.attached or self._copying:
            os.close(fd)
            return
        threads = self._machine.vcpus.threads
        self._before = [thread.on_exit for thread in threads]
        for thread in threads:
            thread.on_exit = self._exited
        self._server = GdbServer(self._machine.loop, self._machine.vcpus, self._machine.memory, fd, self._left)

    def _exited(self, thread: VcpuThread, what: ExitData | Exception) -> bool:
        answer = self._server.exited(thread, what) if self._server else None
        return self._before[thread.index](thread, what) if answer is None else answer

    def _left(self) -> None:
        """gdb has gone and every vcpu runs as before."""
        self._server = None
        for thread, before in zip(self._machine.vcpus.threads, self._before, strict=True):
            thread.on_exit = before

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._machine.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
