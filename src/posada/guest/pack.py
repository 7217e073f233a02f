"""A directory tree of this host as a tar stream: ustar with GNU long names, as the agent's ``tar-in`` takes it."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from posada.errors import HostError

_CHUNK = 256 << 10
_RECORD = 512


class Packer:
    """Iterating gives the archive of ``root`` (a directory) in pieces; ``top`` is what it is called in there.

    Owners are root's: users of this host mean nothing in the guest. Devices, fifos and sockets are left out;
    ``skipped`` names them. Iterating does blocking I/O, one piece at a time, and raises HostError.
    """

    def __init__(self, root: Path, top: str) -> None:
        self.files = 0
        self.bytes = 0
        self.skipped: list[str] = []
        self._root = root
        self._top = top

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._tree()
        except HostError:
            raise
        except OSError as error:
            raise HostError(f"cannot read {error.filename or self._root}: {error.strerror}") from error
        yield bytes(2 * _RECORD)

    def _tree(self) -> Iterator[bytes]:
        waiting = [(str(self._root), self._top)]
        while waiting:
            path, name = waiting.pop()
            info = os.stat(path) if name == self._top else os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                yield self._header(name, info, tarfile.DIRTYPE)
                children = sorted(os.listdir(path), reverse=True)
                waiting += [(os.path.join(path, child), f"{name}/{child}") for child in children]
            elif stat.S_ISLNK(info.st_mode):
                yield self._header(name, info, tarfile.SYMTYPE, target=os.readlink(path))
            elif stat.S_ISREG(info.st_mode):
                yield from self._file(path, name)
            else:
                self.skipped.append(name)

    def _file(self, path: str, name: str) -> Iterator[bytes]:
        # Nonblocking and never through a link: the file may have been replaced since it was looked at.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise HostError(f"{path} was replaced while it was read")
            yield self._header(name, info, tarfile.REGTYPE, size=info.st_size)
            rest = info.st_size
            while rest:
                data = file.read(min(rest, _CHUNK))
                if not data:
                    raise HostError(f"{path} became shorter while it was read")
                rest -= len(data)
                self.bytes += len(data)
                yield data
            yield bytes(-info.st_size % _RECORD)
            self.files += 1

    @staticmethod
    def _header(name: str, info: os.stat_result, kind: bytes, *, size: int = 0, target: str = "") -> bytes:
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.linkname = kind, size, target
        entry.mode, entry.mtime = stat.S_IMODE(info.st_mode), max(0, int(info.st_mtime))
        return entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
