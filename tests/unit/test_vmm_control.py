"""The control server on its loop, against clients that do as they please."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posada.errors import HostError
from posada.proto import cbor
from posada.proto.monitor import MAX_MESSAGE, Op, Reply, Request, decode_reply, encode_request
from posada.vmm.control import MAX_CLIENTS, Call, Control, Handler, Result
from posada.vmm.loop import Loop


class Server:
    """A control server on a loop of its own thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = Loop()
        self.taken: list[int] = []
        self.later: list[Call] = []
        self.noted: list[str] = []
        handlers: dict[Op, Handler] = {
            Op.INFO: lambda _: {"state": "running"},
            Op.PAUSE: self._fails,
            Op.RESUME: self._breaks,
            Op.NIC: self._takes,
            Op.POWERDOWN: self._later,
            Op.FORK: self._forks,
        }
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen(64)
        self.control = Control(self.loop, listener.detach(), handlers, self.noted.append)
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def _fails(self, _: Call) -> Result:
        error = HostError("no space", hint="make some")
        error.switched = ("root",)  # type: ignore[attr-defined]
        raise error

    def _breaks(self, _: Call) -> Result:
        raise ZeroDivisionError("a mistake of ours")

    def _takes(self, call: Call) -> Result:
        self.taken.append(call.given.take(call.args["fd"]))
        return {"left": len(call.given)}

    def _later(self, call: Call) -> None:
        self.later.append(call)

    def _forks(self, call: Call) -> Result:
        children = call.take_children()
        names = [child.config["name"] for child in children]
        for child in children:
            child.given.close()
        return {"names": names}

    def do(self, action: Callable[[], object]) -> None:
        """On the loop's thread, to its end."""
        done = threading.Event()
        self.loop.soon(lambda: (action(), done.set()))
        assert done.wait(10)

    def client(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock

    def close(self) -> None:
        self.do(self.control.close)
        self.loop.stop()
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    yield found
    for fd in found.taken:
        os.close(fd)
    found.do(lambda: None)
    assert len(os.listdir("/proc/self/fd")) <= before + len(found.control._clients), "a descriptor was lost"
    found.close()


def ask(sock: socket.socket, op: Op, *fds: int, id: int = 1, **args: Any) -> Reply:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([encode_request(Request(id, op, args), len(fds))], rights)
    return decode_reply(sock.recv(MAX_MESSAGE))


def refused(sock: socket.socket) -> bool:
    try:
        ask(sock, Op.INFO)
    except (OSError, ValueError):
        return True
    return False


def test_answers_and_errors(server: Server) -> None:
    with server.client() as sock:
        assert ask(sock, Op.INFO, id=7) == Reply(7, ok={"state": "running"})
        failed = ask(sock, Op.PAUSE).error
        assert failed is not None
        assert (failed.kind, failed.message, failed.switched) == ("HostError", "no space (make some)", ("root",))
        failed = ask(sock, Op.RESUME).error
        assert failed is not None and failed.kind == "EngineError" and "a mistake of ours" in failed.message
        failed = ask(sock, Op.METRICS).error
        assert failed is not None and "does not know metrics" in failed.message
        assert ask(sock, Op.INFO).ok, "none of that ends the connection"


def test_descriptors_belong_to_who_takes_them(server: Server) -> None:
    reader, writer = os.pipe()
    with server.client() as sock:
        assert ask(sock, Op.NIC, writer, reader, index=0, fd=0).ok is not None
    os.close(writer)
    os.write(server.taken[0], b"x")
    assert os.read(reader, 1) == b"x"
    os.close(reader)


def test_what_is_given_for_children_is_collected_in_order_and_dies_with_the_client(server: Server) -> None:
    reader, writer = os.pipe()
    with server.client() as sock, server.client() as other:
        for name in ("a", "b"):
            assert ask(sock, Op.CHILD, writer, config={"name": name}).ok == {}
        ask(other, Op.CHILD, writer, config={"name": "of the other"})
        assert ask(sock, Op.FORK, layers=[]).ok == {"names": ["a", "b"]}
        assert ask(sock, Op.FORK, layers=[]).ok == {"names": []}
    os.close(writer)
    assert os.read(reader, 1) == b"", "nobody holds the other end any more"
    os.close(reader)


def test_an_answer_may_come_later_or_never(server: Server) -> None:
    with server.client() as sock:
        sock.send(encode_request(Request(3, Op.POWERDOWN)))
        assert ask(sock, Op.INFO).ok, "others do not wait"
        server.do(lambda: server.later.pop().done({"off": True}))
        assert decode_reply(sock.recv(MAX_MESSAGE)) == Reply(3, ok={"off": True})
        sock.send(encode_request(Request(4, Op.POWERDOWN)))
        ask(sock, Op.INFO)
    server.do(lambda: None)
    server.do(lambda: server.later.pop().done({"off": True}))  # its client is gone: nothing happens


@pytest.mark.parametrize(
    "data", [b"nonsense", cbor.encode({"id": 1, "op": "destroy"}), cbor.encode([]), bytes(MAX_MESSAGE + 5)]
)
def test_nonsense_ends_the_connection_and_nothing_else(server: Server, data: bytes) -> None:
    with server.client() as sock, server.client() as other:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
        assert sock.recv(100) == b""
        assert ask(other, Op.INFO).ok
    assert "dropped" in server.noted[0]


def test_a_crowd_is_bounded(server: Server) -> None:
    crowd = [server.client() for _ in range(MAX_CLIENTS)]
    for sock in crowd:
        assert ask(sock, Op.INFO).ok
    with server.client() as late:
        assert refused(late)
    for sock in crowd:
        sock.close()
    server.do(lambda: None)
    with server.client() as sock:
        assert ask(sock, Op.INFO).ok


def test_a_client_that_does_not_read_holds_nobody_up(server: Server) -> None:
    with server.client() as mute, server.client() as sock:
        for _ in range(2000):
            mute.send(encode_request(Request(1, Op.INFO)))
        assert ask(sock, Op.INFO).ok


def test_after_a_fork_the_parents_clients_are_not_served(server: Server, tmp_path: Path) -> None:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    new.bind(str(tmp_path / "new"))
    new.listen(1)
    with server.client() as sock:
        assert ask(sock, Op.INFO).ok
        server.do(lambda: server.control.after_fork(new.detach()))
        assert sock.recv(100) == b""
    server.path = tmp_path / "new"
    with server.client() as sock:
        assert ask(sock, Op.INFO).ok
