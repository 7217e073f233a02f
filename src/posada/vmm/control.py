"""The monitor's ear: requests on a SOCK_SEQPACKET socket, answered by handlers on the loop's thread.

The protocol is `posada.proto.monitor`. Only the user that started the monitor can connect (mode of the socket's file),
but what comes is checked all the same. Any number of clients; requests are handled one at a time.

`Op.CHILD` is handled here: what a fork's children get is collected, message by message, until `Op.FORK` uses it.
"""

from __future__ import annotations

import _socket
import array
import os
from collections.abc import Callable, Mapping
from typing import Any

from posada.errors import PosadaError
from posada.proto.monitor import (
    MAX_FDS,
    MAX_MESSAGE,
    Failure,
    MonitorProtocolError,
    Op,
    Reply,
    Request,
    decode_request,
    encode_reply,
)
from posada.vmm.loop import Loop

MAX_CLIENTS = 16
MAX_CHILDREN = 1024
_ANCILLARY = _socket.CMSG_SPACE(MAX_FDS * 4)

Result = Mapping[str, Any]


class Given:
    """Descriptors that came with a message. What nobody takes is closed."""

    def __init__(self, fds: list[int]) -> None:
        self._fds: list[int | None] = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self, index: int) -> int:
        """The descriptor at ``index``, which is the caller's from now on. Raises MonitorProtocolError: taken already."""
        fd = self._fds[index] if 0 <= index < len(self._fds) else None
        if fd is None:
            raise MonitorProtocolError(f"there is no descriptor {index} any more")
        self._fds[index] = None
        return fd

    def close(self) -> None:
        """Idempotent."""
        for fd in self._fds:
            if fd is not None:
                os.close(fd)
        self._fds = []


class Child:
    """What a machine that is about to be forked gets: a document, and the descriptors it speaks of by index."""

    def __init__(self, config: Mapping[str, Any], given: Given) -> None:
        self.config, self.given = config, given


class Call:
    """One request being answered. A handler returns the answer, or None and calls `done` or `fail` later."""

    def __init__(self, client: _Client, request: Request, given: Given) -> None:
        self._client, self._request = client, request
        self.args = request.args
        self.given = given

    def take_children(self) -> list[Child]:
        """What the client has given for children, in order; the caller's from now on."""
        children, self._client.children = self._client.children, []
        return children

    def expect_child(self) -> bool:
        """Keep what came with this request for a fork. False: there are too many already."""
        if len(self._client.children) >= MAX_CHILDREN:
            return False
        self._client.children.append(Child(self.args["config"], self.given))
        return True

    def done(self, result: Result) -> None:
        self._client.answer(Reply(self._request.id, ok=result))

    def fail(self, error: Exception) -> None:
        """``error``'s class goes to the other side by name, if it is one of posada's."""
        kind, text = described(error)
        switched = tuple(getattr(error, "switched", ()))
        self._client.answer(Reply(self._request.id, error=Failure(kind, text, switched)))


def described(error: Exception) -> tuple[str, str]:
    """(kind, text) of an error, as the other side gets it."""
    if isinstance(error, PosadaError):
        return type(error).__name__, str(error)
    if isinstance(error, OSError):
        return "HostError", error.strerror or str(error)
    return "EngineError", f"the monitor failed: {error!r}"


Handler = Callable[[Call], Result | None]


class Control:
    """``listener``: a listening SOCK_SEQPACKET socket, or -1 for none. ``note`` is told what is odd.

    A handler that forks returns in the child too: after `after_fork` its answer goes nowhere.
    """

    def __init__(
        self,
        loop: Loop,
        listener: int,
        handlers: Mapping[Op, Handler],
        note: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._loop, self._note = loop, note
        self._listener: _socket.socket | None = None
        self._handlers = {**handlers, Op.CHILD: self._child}
        self._clients: set[_Client] = set()
        self._listen(listener)

    def _listen(self, listener: int) -> None:
        if listener >= 0:
            self._listener = _socket.socket(fileno=listener)
            self._listener.setblocking(False)
            self._loop.watch(listener, self._accept)

    def close(self) -> None:
        """Idempotent."""
        for client in list(self._clients):
            self._drop(client)
        if self._listener is not None:
            self._loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def after_fork(self, listener: int) -> None:
        """In a forked child: the parent's clients, and what they gave for other children, are not ours."""
        self.close()
        self._listen(listener)

    def _accept(self, _: int) -> None:
        try:
            fd, _address = self._listener._accept()  # type: ignore[union-attr]
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            os.close(fd)
            return
        client = _Client(_socket.socket(fileno=fd))
        self._clients.add(client)
        self._loop.watch(fd, lambda _: self._ready(client))

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._loop.unwatch(client.fd)
        client.close()

    def _ready(self, client: _Client) -> None:
        try:
            received = client.receive()
            if received is not None:
                self._serve(client, *received)
                return
        except BlockingIOError:
            return
        except (OSError, MonitorProtocolError) as error:
            self._note(f"control: a client is dropped: {error}")
        self._drop(client)

    def _serve(self, client: _Client, request: Request, given: Given) -> None:
        call = Call(client, request, given)
        try:
            handler = self._handlers.get(request.op)
            if handler is None:
                raise MonitorProtocolError(f"this monitor does not know {request.op.value}")
            result = handler(call)
            if result is not None:
                call.done(result)
        except Exception as error:  # a guest must not end because a client asked for nonsense
            call.fail(error)
        finally:
            if request.op is not Op.CHILD:
                given.close()

    def _child(self, call: Call) -> Result:
        if not call.expect_child():
            call.given.close()
            raise MonitorProtocolError(f"more than {MAX_CHILDREN} children")
        return {}


class _Client:
    """One connection."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self.fd = sock.fileno()
        self.children: list[Child] = []
        sock.setblocking(False)

    def receive(self) -> tuple[Request, Given] | None:
        """None at its end. Raises BlockingIOError, OSError, MonitorProtocolError."""
        data, ancillary, flags, _ = self._sock.recvmsg(MAX_MESSAGE, _ANCILLARY, _socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, body in ancillary:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
                fds += array.array("i", body[: len(body) // 4 * 4])
        given = Given(fds)
        try:
            if not data:
                given.close()
                return None
            if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
                raise MonitorProtocolError("a message that is too long")
            return decode_request(data, len(fds)), given
        except BaseException:
            given.close()
            raise

    def answer(self, reply: Reply) -> None:
        """A client that does not read, or is gone, gets none."""
        if self._sock.fileno() < 0:
            return
        try:
            data = encode_reply(reply)
        except MonitorProtocolError as error:
            data = encode_reply(Reply(reply.id, error=Failure("EngineError", str(error))))
        try:
            self._sock.send(data)
        except OSError:
            pass

    def close(self) -> None:
        for child in self.children:
            child.given.close()
        self.children = []
        self._sock.close()
