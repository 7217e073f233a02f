"""Host folders: one jailed server beside each monitor and folder (`posada.vmm.folder`), which ends when the monitor
closes their socket. It is nobody's child, as the monitor is, and says that it serves by letting its starter end.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess

from posada.engine.base import Launch
from posada.engine.common.bootstrap import python
from posada.engine.common.uncut import uncut
from posada.errors import EngineError, HostError, Unsupported
from posada.model.machine import FolderSpec

#: Seconds for a server to be in its jail; it takes 0.1 s.
_START_TIMEOUT = 30.0


class Folders:
    """The servers of one machine: a descriptor for each of its folders."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def take(self) -> list[int]:
        """The descriptors, in the spec's order; the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    def abandon(self) -> None:
        """Close them: the servers end."""
        for fd in self.take():
            os.close(fd)


async def serve(launch: Launch) -> Folders:
    """A server for each folder of the launch. On failure or cancellation nothing is left. Raises HostError, EngineError."""
    folders = Folders()
    folders.fds = [-1] * len(launch.spec.folders)

    def start(index: int, folder: FolderSpec) -> None:
        folders.fds[index] = _start(folder)

    started = (asyncio.to_thread(start, *each) for each in enumerate(launch.spec.folders))
    try:
        failures = await uncut(asyncio.gather(*started, return_exceptions=True))
        for failure in filter(None, failures):
            raise failure
    except BaseException:
        folders.fds = [fd for fd in folders.fds if fd >= 0]
        folders.abandon()
        raise
    return folders


def twins(launch: Launch) -> tuple[list[int], list[int]]:
    """For a machine that is forked: sockets, and their other ends, for the servers that its parent's become."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in launch.spec.folders]
    return [ours.detach() for ours, _ in pairs], [theirs.detach() for _, theirs in pairs]


def refuse(launch: Launch, what: str) -> None:
    """Raise Unsupported if the launch has folders: what a guest has open is known to the server alone."""
    if launch.spec.folders:
        hint = "take a snapshot of its disks only, or use a machine without folders"
        raise Unsupported("kvm", f"{what} of a machine that shares folders of the host", hint=hint)


def _start(folder: FolderSpec) -> int:
    """Our end of a server's socket."""
    try:
        directory = os.open(folder.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open the folder {folder.source}: {error.strerror}") from error
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            _run(folder, directory, theirs.fileno())
        return ours.detach()
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(directory)


def _run(folder: FolderSpec, directory: int, sock: int) -> None:
    words = [*python("posada.vmm.folder.main", "sys.exit(main())"), str(directory), str(sock)]
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(
            [*words, "ro" if folder.readonly else "rw"],
            stdin=null,
            stdout=null,
            stderr=subprocess.PIPE,
            pass_fds=(directory, sock),
            cwd="/",
            env={"MALLOC_ARENA_MAX": "2"},
            timeout=_START_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"the server of {folder.source} is not ready after {_START_TIMEOUT:g} s") from None
    if done.returncode:
        detail = done.stderr.decode(errors="replace").strip()[-500:]
        raise EngineError(f"the server of {folder.source} did not start", detail=detail)
