"""Where the host's clients come in: listening unix sockets that the engine made (the monitor opens nothing by path).

A *channel* belongs to one port of the guest: each connection is a stream to it, with no words before. On a *front door*
the client says which port it wants, as Firecracker has it: ``CONNECT <port>\\n``, answered by ``OK <host port>\\n``, or
by the end of the connection when nobody listens there.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from functools import partial
from select import EPOLLIN

from posada.vmm.loop import Timer
from posada.vmm.virtio.device import Device

MAX_GREETINGS = 16
"""Clients of the front door that have not said yet what they want; more wait in the socket's queue."""
GREETING_SECONDS = 5.0
_LINE = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")
_MAX_LINE = 21


class Door:
    """A listening socket of ``device``. ``enter`` gets each connection; ``full`` says when to take no more.

    The socket is looked at only while the door is open (`set_open`); clients that come meanwhile wait in the kernel.
    """

    def __init__(
        self, device: Device, fd: int, enter: Callable[[socket.socket], object], full: Callable[[], bool]
    ) -> None:
        self._device = device
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._enter = enter
        self._full = full
        self._open = False

    def set_open(self, wanted: bool) -> None:
        """Take connections, or cease to, as ``full`` says. Call it whenever that may have changed."""
        wanted = wanted and not self._full()
        if wanted and not self._open:
            self._device.loop.watch(self._sock.fileno(), self._device.guarded(self._ready), EPOLLIN)
        elif self._open and not wanted:
            self._device.loop.unwatch(self._sock.fileno())
        self._open = wanted

    def close(self) -> None:
        self.set_open(False)
        self._sock.close()

    def _ready(self, _events: int) -> None:
        self.set_open(self._device.active)
        while self._open:
            try:
                client, _ = self._sock.accept()
            except OSError:  # nobody there any more; or no descriptors left, and the next event tries again
                return
            client.setblocking(False)
            self._enter(client)
            self.set_open(self._device.active)


class FrontDoor(Door):
    """``connect`` gets each client together with the port it asked for."""

    def __init__(
        self,
        device: Device,
        fd: int,
        connect: Callable[[socket.socket, int], object],
        full: Callable[[], bool],
    ) -> None:
        super().__init__(device, fd, self._greet, lambda: len(self._greetings) >= MAX_GREETINGS or full())
        self._connect = connect
        self._greetings: dict[socket.socket, Timer] = {}

    def dismiss(self) -> None:
        """Close every connection that has not become a stream."""
        for client in list(self._greetings):
            self._leave(client).close()

    def close(self) -> None:
        self.dismiss()
        super().close()

    def _greet(self, client: socket.socket) -> None:
        device = self._device
        self._greetings[client] = device.loop.timer(GREETING_SECONDS, device.guarded(partial(self._late, client)))
        self._listen(client)

    def _listen(self, client: socket.socket) -> None:
        if client in self._greetings:
            self._device.loop.watch(client.fileno(), self._device.guarded(partial(self._said, client)), EPOLLIN)

    def _said(self, client: socket.socket, _events: int) -> None:
        """Only the line is taken: what follows it belongs to the guest."""
        try:
            said = client.recv(_MAX_LINE, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        line = _LINE.match(said)
        if line is not None and int(line[1]) <= 0xFFFF_FFFF:
            client.recv(line.end())
            self._connect(self._leave(client), int(line[1]))
        elif said and b"\n" not in said and len(said) < _MAX_LINE:
            # Half a line. What is only peeked at keeps the socket readable: look again in a moment rather than at once.
            self._device.loop.unwatch(client.fileno())
            self._device.loop.timer(0.01, self._device.guarded(partial(self._listen, client)))
        else:
            self._leave(client).close()
        self.set_open(self._device.active)

    def _late(self, client: socket.socket) -> None:
        if client in self._greetings:
            self._leave(client).close()
            self.set_open(self._device.active)

    def _leave(self, client: socket.socket) -> socket.socket:
        self._greetings.pop(client).cancel()
        self._device.loop.unwatch(client.fileno())
        return client
