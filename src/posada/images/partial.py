"""Directories that are whole or not there: made aside, locked while their maker lives, published by one rename.

A maker holds a flock on its directory, which the kernel drops when it dies, however it dies. What is found unlocked
belongs to nobody and is removed. Between mkdir and flock a directory looks abandoned, so both happen under the store's
own lock, as do the collector's look and a publication; nobody holds that one for longer than a few system calls.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posada.errors import HostError
from posada.storage.disks import disk_errors

PARTIAL, TRASH, LOCK = ".partial-", ".trash-", ".lock"
_SCRATCH = "scratch"


@contextmanager
def store_lock(root: Path) -> Iterator[None]:
    """The store's own lock. Blocks, for microseconds. Raises HostError."""
    with disk_errors(root):
        fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Partial:
    """A directory in the making. Close it in every case; what was not published by then is removed."""

    def __init__(self, root: Path) -> None:
        """Raises HostError."""
        self._root = root
        self.path = root / f"{PARTIAL}{secrets.token_hex(6)}"
        with store_lock(root), disk_errors(self.path):
            self.path.mkdir(mode=0o700)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def scratch(self) -> Path:
        """A working directory that never is published.

        Root's is here; other users' is where their subordinate ids can reach it, made known by a symbolic link before
        it is made, so that it is found again whatever happens. Raises HostError.
        """
        path = self.path / _SCRATCH
        with disk_errors(path):
            if os.geteuid() == 0:
                path.mkdir(mode=0o755)
                return path
            place = Path(tempfile.gettempdir()) / f"posada-build-{os.geteuid()}-{secrets.token_hex(8)}"
            path.symlink_to(place)
            place.mkdir(mode=0o755)
            return place

    def drop_scratch(self) -> None:
        """Raises HostError when it cannot be removed."""
        _remove_scratch(self.path)

    def publish(self, name: str) -> Path:
        """Make the directory read-only, durable, and visible as ``name``. If that is there already, it stays as it is.

        Raises HostError; nothing is published then.
        """
        target = self._root / name
        with disk_errors(self.path):
            for entry in sorted(self.path.iterdir()):
                fd = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                os.fchmod(fd, 0o444)
                os.fsync(fd)
                os.close(fd)
            os.fsync(self._fd)
            os.fchmod(self._fd, 0o555)
            with store_lock(self._root):
                if not target.exists():
                    os.rename(self.path, target)
            sync_folder(self._root)
        return target

    def close(self) -> None:
        """Remove what was not published. Raises HostError when something cannot be removed."""
        try:
            if self.path.exists():
                remove_tree(self.path)
        finally:
            os.close(self._fd)


def abandoned(root: Path) -> list[Path]:
    """Move aside what dead makers and interrupted removals left; returns where it is now, for `remove_tree`."""
    with store_lock(root):
        for path in root.glob(f"{PARTIAL}*"):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(path, root / f"{TRASH}{secrets.token_hex(6)}")
            except BlockingIOError:
                pass  # somebody is at work on it
            finally:
                os.close(fd)
        return sorted(root.glob(f"{TRASH}*"))


def move_to_trash(root: Path, name: str) -> Path:
    """Take a published directory out of sight, at once. Raises HostError."""
    trash = root / f"{TRASH}{secrets.token_hex(6)}"
    with disk_errors(root / name), store_lock(root):
        os.rename(root / name, trash)
        sync_folder(root)
    return trash


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with all below it, and the scratch directory it points to. Raises HostError."""
    if path.is_dir():
        os.chmod(path, 0o700)
    _remove_scratch(path)
    _rm(path)


def _remove_scratch(path: Path) -> None:
    scratch = path / _SCRATCH
    if scratch.is_symlink():
        place = Path(os.readlink(scratch))
        # Only what this user made, with the name it is made with: the link may be anything after a crash.
        if place.name.startswith(f"posada-build-{os.geteuid()}-") and place.is_dir() and not place.is_symlink():
            _rm(place)
        scratch.unlink()
    elif scratch.is_dir():
        _rm(scratch)


def _rm(path: Path) -> None:
    # rm, not shutil: it can be told never to leave the file system (a chroot may have proc or dev mounted).
    rm = ["rm", "-rf", "--one-file-system", "--", str(path)]
    done = subprocess.run(rm, capture_output=True, text=True, check=False)
    if path.exists() and os.geteuid() != 0:
        # Files of the subordinate ids that mmdebstrap used: only they may remove them.
        done = subprocess.run(["mmdebstrap", "--unshare-helper", *rm], capture_output=True, text=True, check=False)
    if path.exists():
        raise HostError(f"cannot remove {path}: {done.stderr.strip()[-200:]}")


def sync_folder(path: Path) -> None:
    """Make renames in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
