"""The descriptors QEMU inherits: files opened, sockets bound, by us and by role (see `argv`)."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from posada.engine.base import Launch
from posada.engine.common.files import listen, open_file, reopen
from posada.errors import EngineError

__all__ = ["Descriptors", "clear", "listen", "open_file", "reopen"]

#: Files of an earlier run of the same vm, and of this one, in the runtime directory.
LEFTOVERS = (
    "qmp.sock", "console.sock", "exit.json", ".exit.json", "paused", "kill", "disowned", "activity", "keeper.pid",
    "running.json", ".running.json",
)  # fmt: skip


def clear(runtime: Path) -> None:
    """Remove what a run of the vm left in its runtime directory. Idempotent."""
    names = [*LEFTOVERS, *(p.name for p in runtime.glob("agent*.sock*"))] if runtime.is_dir() else []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(runtime / name)


class Descriptors(contextlib.ExitStack):
    """Descriptors by role; all are closed at the end of the ``with``, QEMU and its keeper having theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.by_role: dict[str, int] = {}

    def own(self, fd: int) -> int:
        """Close ``fd`` at the end."""
        self.callback(os.close, fd)
        return fd

    def give(self, role: str, fd: int) -> None:
        """``fd`` becomes ``role``'s."""
        self.by_role[role] = self.own(fd)

    def pair(self, role: str) -> int:
        """A connected socket pair: one end is ``role``'s, the other is returned."""
        ours, theirs = socket.socketpair()
        self.give(role, theirs.detach())
        return self.own(ours.detach())

    def open_all(self, launch: Launch, roles: dict[str, int], readable_by_all: bool) -> None:
        """Open or bind every role that is not given yet.

        ``readable_by_all``: QEMU will have a uid of its own, and opens the kernel a second time under it.
        """
        disks = {disk.name: disk for disk in launch.disks}
        for role in roles:
            if role in self.by_role:
                continue
            kind, _, rest = role.partition(":")
            if kind == "disk":
                name, index, access = rest.split(":")
                self.give(role, open_file(disks[name].chain[int(index)][0], writable=access == "rw"))
            elif kind in ("kernel", "initrd"):
                path = launch.kernel if kind == "kernel" else launch.initrd
                if path is None:
                    raise EngineError(f"the launch has no {kind}")
                self.give(role, open_file(path, writable=False))
                if readable_by_all:
                    self._readable(role)
            elif kind == "qmp" or kind.startswith("agent"):
                self.give(role, listen(launch.runtime / f"{kind}.sock"))
            elif kind == "vsock":
                self.give(role, os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC))
            else:
                raise EngineError(f"nothing was given for {role}")

    def _readable(self, role: str) -> None:
        """Replace a file that only we may read by a copy in memory."""
        fd = self.by_role[role]
        info = os.fstat(fd)
        if info.st_mode & stat.S_IROTH:
            return
        copy = os.memfd_create(f"posada-{role}", os.MFD_CLOEXEC)
        self.give(role, copy)
        done = 0
        while done < info.st_size:
            sent = os.sendfile(copy, fd, done, info.st_size - done)
            if not sent:
                break
            done += sent
