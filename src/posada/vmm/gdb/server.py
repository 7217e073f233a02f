"""`GdbServer`: a session on a descriptor that the caller gives (a connected stream socket), driven by the loop."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable

from posada.kvm.exits import ExitData
from posada.vmm.gdb.packet import Decoder, Mark, encode
from posada.vmm.gdb.session import Session
from posada.vmm.gdb.target import Memory, Stop, Target
from posada.vmm.loop import Loop
from posada.vmm.vcpu import Vcpus, VcpuThread

_SIGINT = 2
MAX_UNSENT = 1 << 20


class GdbServer:
    """From the moment it is made the machine stands still, until gdb lets it run; when gdb goes it runs as before.

    Whoever handles the vcpus' exits asks `exited` first. ``closed`` is called when it is over.
    """

    def __init__(
        self, loop: Loop, vcpus: Vcpus, memory: Memory, fd: int, closed: Callable[[], object] = lambda: None
    ) -> None:
        """Takes over ``fd``. Raises OSError if it cannot be watched; then the machine is untouched."""
        self._loop = loop
        self._fd = fd
        self._closed = closed
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._last = b""
        self._stops: deque[Stop] = deque()
        self._closing = False
        os.set_blocking(fd, False)
        loop.watch(fd, self._ready)
        self.target = Target(vcpus, memory)
        self.session = Session(self.target)
        self.target.halt()

    def exited(self, thread: VcpuThread, what: ExitData | Exception) -> bool | None:
        """On a vcpu's thread, the lock held: what `VcpuThread.on_exit` is to return, or None if it is no exit of ours."""
        if self._fd < 0:
            return None
        found = self.target.exited(thread, what)
        if isinstance(found, Stop):
            self._stops.append(found)
            self._loop.soon(self._stopped)
            return False
        return found

    def close(self) -> None:
        """Take the breakpoints out, let the machine run on if it ran before. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._loop.unwatch(self._fd)
        if not self.session.ended:
            self.target.release()  # a vcpu may run into a breakpoint until then: `exited` still answers for it
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._closed()

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._receive()

    def _receive(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        for event in self._decoder.feed(data):
            self._event(event)
            if self._closing:
                return

    def _event(self, event: bytes | Mark) -> None:
        match event:
            case Mark.INTERRUPT:
                self._interrupt()
            case Mark.NAK:
                self._send(self._last)
            case Mark.DAMAGED if not self.session.no_ack:
                self._send(b"-")
            case bytes():
                if not self.session.no_ack:
                    self._send(b"+")
                if not self.session.running:
                    self.target.halt()  # whoever let it run meanwhile: a vcpu that runs would not let itself be read
                reply = self.session.handle(event)
                if reply is not None:
                    self._reply(reply)
                elif self._stops:
                    self._loop.soon(self._stopped)
                if self.session.ended:
                    self.close()

    def _interrupt(self) -> None:
        if self.session.running:
            self._stop(Stop(self.target.stop.thread, _SIGINT))

    def _stopped(self) -> None:
        """On the loop's thread, after a vcpu's exit. Of several at once gdb hears of the first: the others come again,
        for their instruction is not done yet; only a watchpoint, which triggers afterwards, is told later."""
        if not self._closing and self.session.running and self._stops:
            self._stop(self._stops.popleft())

    def _stop(self, stop: Stop) -> None:
        self.target.halt()
        self._stops = deque(other for other in self._stops if "watch" in other.reason)
        self._reply(self.session.stop_reply(stop))

    def _reply(self, payload: bytes) -> None:
        self._last = encode(payload)
        self._send(self._last)

    def _send(self, data: bytes) -> None:
        self._unsent += data
        if len(self._unsent) > MAX_UNSENT:  # a debugger that asks and does not read
            self.close()
            return
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._fd, self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # the peer is gone: reading says so next
        if not self._closing:
            self._loop.modify(self._fd, select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0))
