"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from posada.errors import HostError


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace ``path`` in one step. ``durable``: it is on the disk when this returns. Raises HostError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HostError(f"cannot write {path}: {error.strerror}", hint="is the disk full?") from error


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it; one that is not there is fine. Follows no symlink. Raises HostError."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}") from error


def move(old: Path, new: Path) -> None:
    """Give a file its new name, keeping the old one where the file system has hard links: no moment without a name."""
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        os.link(old, new)
    except OSError:
        os.rename(old, new)
