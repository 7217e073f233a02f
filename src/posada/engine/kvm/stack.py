"""The memory files of snapshots, and those that a machine stands on.

A machine that was restored maps its snapshot's files for as long as it lives, and its forks do too. Snapshots may be
deleted meanwhile; so each such machine has links to its files in ``memory`` beside its log, from which its own snapshots
get theirs. Links cost nothing; where the file system has none, files are copied.

Stacks grow by one file with each snapshot of a machine that was restored. One that is `DEEP` is laid into a single file for
the next snapshot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from posada.engine.base import Launch, SnapshotFiles
from posada.errors import EngineError, HostError
from posada.model.records import Running
from posada.storage import sparse
from posada.vmm.memfile import MAX_LAYERS

DEVICES = "devices"
DEEP = MAX_LAYERS - 1
_KEPT = "memory"


def name(index: int) -> str:
    """Of file ``index`` of a stack, the lowest being 0."""
    return f"memory.{index}"


def count(snapshot: SnapshotFiles) -> int:
    """How many memory files a snapshot has. Raises EngineError: its record is data from disk."""
    found = snapshot.private.get("files")
    if type(found) is not int or not 1 <= found <= MAX_LAYERS:
        raise EngineError("the snapshot's record is damaged", detail=f"{found!r} memory files")
    return found


def folder(log: Path) -> Path:
    return log.parent / _KEPT


class Files(contextlib.ExitStack):
    """A snapshot that is being made. ``fds``: memory, devices, and the page map of the machine."""

    def __init__(self, target: Path, below: int, pid: int, *, complete: bool = False) -> None:
        super().__init__()
        self.count = below + 1
        self.complete = complete
        """The memory file is there already, with all that the machine stands on in it."""
        self._target = target
        new = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.fds: list[int] = []
        with contextlib.ExitStack() as undo:
            for path, flags in (
                (target / name(below), new & ~os.O_EXCL if complete else new),
                (target / DEVICES, new),
                (Path(f"/proc/{pid}/pagemap"), os.O_RDONLY | os.O_CLOEXEC),
            ):
                self.fds.append(os.open(path, flags, 0o600))
                undo.callback(os.close, self.fds[-1])
            self.push(undo.pop_all())

    def finish(self) -> None:
        """Make it durable. Raises OSError."""
        for fd in self.fds[:2]:
            os.fsync(fd)
        directory = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def begin(running: Running, target: Path) -> Files:
    """The files of a new snapshot in an empty directory: links to what the machine stands on, and new ones."""
    below = int(running.private.get("files", 0))
    kept = Path(str(running.private.get("kept", "")))
    if below >= DEEP:
        flatten(kept, below, target / name(0))
        return Files(target, 0, running.process.pid, complete=True)
    for index in range(below):
        link(kept / name(index), target / name(index))
    return Files(target, below, running.process.pid)


def flatten(kept: Path, files: int, target: Path) -> None:
    """A new file that reads as the whole stack does. Raises HostError, StateError."""
    from posada.vmm.snapshot import Document

    try:
        with open(kept / DEVICES, "rb") as file:
            layers = Document.read(file.fileno()).layers
        duplicate(kept / name(0), target)
        with open(target, "r+b", buffering=0) as whole:
            for index, runs in enumerate(layers[: files - 1], 1):
                with open(kept / name(index), "rb", buffering=0) as upper:
                    for offset, length in runs:
                        _copy(upper.fileno(), whole.fileno(), offset, length)
    except OSError as error:
        raise HostError(f"cannot lay the machine's memory files into one: {error.strerror}") from error


def duplicate(source: Path, target: Path) -> None:
    """A copy with its holes, blocks shared where the file system can. Raises OSError."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        sparse.copy(old.fileno(), new.fileno(), os.fstat(old.fileno()).st_size, stop=threading.Event())


def _copy(source: int, target: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        done = os.copy_file_range(source, target, end - offset, offset, offset)
        if not done:
            raise HostError("a memory file of the machine was cut short")
        offset += done


def keep(launch: Launch, snapshot: SnapshotFiles, files: int) -> list[Path]:
    """Links to a snapshot's files for a machine that is about to stand on them, in place of what it had before."""
    forget(launch)
    kept = folder(launch.log)
    kept.mkdir(mode=0o700)
    for index in range(files):
        link(snapshot.path / name(index), kept / name(index))
    link(snapshot.path / DEVICES, kept / DEVICES)
    return [kept / name(index) for index in range(files)]


def inherited(source: Running, launch: Launch) -> int:
    """The same for a child of a fork: it stands on what its parent stands on. Returns how many files that is."""
    files = int(source.private.get("files", 0))
    forget(launch)
    if files:
        kept = folder(launch.log)
        kept.mkdir(mode=0o700, parents=True)
        for each in (*map(name, range(files)), DEVICES):
            link(Path(str(source.private["kept"])) / each, kept / each)
    return files


def private(launch: Launch, files: int) -> dict[str, Any]:
    """What `Running.private` says of it."""
    return {"files": files, "kept": str(folder(launch.log))} if files else {}


def forget(launch: Launch) -> None:
    """Idempotent."""
    shutil.rmtree(folder(launch.log), ignore_errors=True)


def reap(running: Running | None) -> None:
    """The same, for a machine that has ended."""
    kept = running.private.get("kept") if running is not None else None
    if isinstance(kept, str) and Path(kept).name == _KEPT:
        shutil.rmtree(kept, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A second name for an immutable file, or a copy of it. Raises HostError."""
    try:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            duplicate(source, target)
    except OSError as error:
        raise HostError(f"cannot keep the machine's memory file {source}: {error.strerror}") from error
