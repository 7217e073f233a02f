"""What the monitor is given: files opened and sockets bound by us, by role (see `posada.engine.kvm.config`)."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from posada.engine.base import Launch
from posada.engine.common.files import listen, open_file
from posada.engine.common.process import open_pidfd
from posada.errors import EngineError, HostError

#: Clients of the agent at a time: as many names of one socket, each with its lock (`posada.guest.channel`).
AGENT_CHANNELS = 4

_FILES = (
    "control.sock", "console.sock", "vsock.sock", "exit.json", "status", "kill", "lock", "activity", "running.json",
    ".running.json",
)  # fmt: skip
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
_LOG = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def channels(runtime: Path) -> list[Path]:
    return [runtime / f"agent{i}.sock" for i in range(AGENT_CHANNELS)]


def clear(runtime: Path) -> None:
    """Remove what a run of the vm left in its runtime directory. Idempotent."""
    if not runtime.is_dir():
        return
    for name in (*_FILES, *(path.name for path in runtime.glob("agent*.sock*"))):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(runtime / name)
    with contextlib.suppress(OSError):
        os.rmdir(runtime / "root")


class Descriptors(contextlib.ExitStack):
    """Opens what one machine is given. All is closed at the end of the ``with``: the monitor has its own then.

    ``nics``, ``folders``, ``servers``: one descriptor for each, given away. Raises HostError, ImageError.
    """

    def __init__(
        self, launch: Launch, nics: Sequence[int], folders: Sequence[int] = (), servers: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._launch = launch
        self._connected = {"nic": nics, "folder": folders, "server": servers}
        self.given: list[int] = []
        """Everything that was asked for, in order."""
        self._ours: socket.socket | None = None
        for fd in (*nics, *folders, *servers):
            self.callback(os.close, fd)

    def inherited(self, role: str) -> int:
        """The number of the descriptor, for a process that inherits it."""
        return self.given[self.sent(role)]

    def sent(self, role: str) -> int:
        """The index of the descriptor, for a process that is sent `given`."""
        kind, _, rest = role.partition(":")
        runtime = self._launch.runtime
        if kind in self._connected:
            return self._give(self._connected[kind][int(rest)], own=False)
        if kind == "disk":
            name, index, access = rest.split(":")
            disk = next(disk for disk in self._launch.disks if disk.name == name)
            return self._give(open_file(disk.chain[int(index)][0], writable=access == "rw"))
        try:
            return self._give(_OPENERS[kind](self, runtime))
        except OSError as error:
            if isinstance(error, HostError):
                raise
            raise HostError(f"cannot open the {kind} of the machine: {error}") from error

    def add(self, fd: int) -> int:
        """Give a descriptor that has no role. It is closed at the end. Returns it."""
        self._give(fd)
        return fd

    def _give(self, fd: int, *, own: bool = True) -> int:
        if own:
            self.callback(os.close, fd)
        self.given.append(fd)
        return len(self.given) - 1

    def _kernel(self) -> int:
        return self._boot_file(self._launch.kernel)

    def _initrd(self) -> int:
        return self._boot_file(self._launch.initrd)

    def _boot_file(self, path: Path | None) -> int:
        if path is None:
            raise EngineError("the launch has no such boot file")
        return open_file(path, writable=False)

    def _log(self, suffix: str) -> int:
        path = self._launch.log
        return os.open(path.with_name(path.name + suffix), _LOG, 0o600)

    def _owner(self) -> int:
        owner = self._launch.owner
        fd = open_pidfd(owner) if owner is not None else None
        if fd is None:
            raise EngineError("the process that the machine belongs to is gone")
        return fd

    def _starter(self) -> int:
        self._ours, theirs = socket.socketpair()
        self.callback(self._close_ours)
        return theirs.detach()

    def _close_ours(self) -> None:
        if self._ours is not None:
            self._ours.close()

    def connection(self) -> socket.socket:
        """Our end of the connection to the monitor; the caller's from now on."""
        ours, self._ours = self._ours, None
        if ours is None:
            raise EngineError("there is no connection to the monitor")
        return ours


def _agent(runtime: Path) -> int:
    first, *others = channels(runtime)
    fd = listen(first)
    for other in others:
        os.symlink(first.name, other)
    return fd


def _root(runtime: Path) -> int:
    (runtime / "root").mkdir(mode=0o755, exist_ok=True)
    return os.open(runtime / "root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


_OPENERS: dict[str, Callable[[Descriptors, Path], int]] = {
    "kvm": lambda _, __: os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC),
    "control": lambda _, runtime: listen(runtime / "control.sock", socket.SOCK_SEQPACKET),
    "console": lambda _, runtime: listen(runtime / "console.sock"),
    "vsock": lambda _, runtime: listen(runtime / "vsock.sock"),
    "agent": lambda _, runtime: _agent(runtime),
    "exit": lambda _, runtime: os.open(runtime / "exit.json", _NEW, 0o600),
    "status": lambda _, runtime: os.open(runtime / "status", _NEW, 0o600),
    "lock": lambda _, runtime: os.open(runtime / "lock", _NEW, 0o600),
    "activity": lambda _, runtime: os.open(runtime / "activity", _NEW, 0o600),
    "root": lambda _, runtime: _root(runtime),
    "log": lambda self, _: self._log(""),
    "log.1": lambda self, _: self._log(".1"),
    "kernel": lambda self, _: self._kernel(),
    "initrd": lambda self, _: self._initrd(),
    "owner": lambda self, _: self._owner(),
    "starter": lambda self, _: self._starter(),
}
