"""Unpacking a tar stream that a guest sent, piece by piece, below one directory of this host and nowhere else.

The archive is hostile. The standard library's reader takes whole extension headers into memory whatever their size, and
its ``data`` filter is missing or has known holes in the Python versions posada runs on. So: every directory on the way
is opened without following links, relative to the one above it (`_descend`); what exists is never opened for writing
but replaced; links are made only where they cannot lead out of the tree; devices, fifos and sockets are never made.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from posada.errors import GuestError, HostError, ProtocolError
from posada.proto.agent import printable

_RECORD = 512
_MAX_NAME = 4096
_MAX_TIME = 1 << 33
_MAX_SKIPPED = 1000
"""Names of what was left out that are kept; a hostile archive may hold any number."""
_MAX_AFTER_END = 1 << 20
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_LEFT_OUT = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE)


class Unpacker:
    """Takes an archive by `feed` and `finish`, in any pieces, and writes it below ``target``, which it makes.

    ``strip``: the archive's entries lie below one top directory, and that becomes ``target``. ``all_links`` makes links
    that lead out of the tree too (nothing is written through them here, but whoever uses the tree may follow them).
    Methods do blocking I/O and raise ProtocolError for what no honest agent sends, HostError for what this host refuses.
    `close` always.
    """

    def __init__(self, target: Path, *, strip: bool, all_links: bool = False) -> None:
        self.files = 0
        self.bytes = 0
        self.skipped: list[str] = []
        self._strip = strip
        self._all_links = all_links
        self._top: str | None = None
        self._buffer = bytearray()
        self._entry: tarfile.TarInfo | None = None
        self._rest = 0
        """Bytes of the current entry that are still to come."""
        self._padding = 0
        self._long: dict[bytes, bytes] = {}
        self._file: int | None = None
        self._ended = False
        self._after_end = 0
        try:
            target.mkdir(exist_ok=True)
            self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot unpack into {target}: {error.strerror}") from error
        self._directory: tuple[tuple[str, ...], int] | None = None

    def feed(self, data: bytes) -> None:
        try:
            self._buffer += data
            while self._step():
                pass
        except OSError as error:
            if isinstance(error, GuestError | HostError):
                raise
            raise HostError(f"cannot unpack {self._name()!r}: {error.strerror}") from error

    def finish(self) -> None:
        """The stream has ended. Raises ProtocolError when the archive has not."""
        if not self._ended:
            raise ProtocolError("the guest's agent sent an archive that is cut off")

    def close(self) -> None:
        """Let go of files. Idempotent. What was unpacked stays."""
        for fd in (self._file, self._directory[1] if self._directory else None, self._root):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._file, self._directory, self._root = None, None, -1

    # -- the format -------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Do what the buffer allows; False when it needs more."""
        if self._ended:
            self._after_end += len(self._buffer)
            self._buffer.clear()
            if self._after_end > _MAX_AFTER_END:
                raise ProtocolError("the guest's agent goes on after the end of the archive")
            return False
        if self._padding:
            size = min(self._padding, len(self._buffer))
            del self._buffer[:size]
            self._padding -= size
            return not self._padding
        if self._entry is not None:
            return self._content(self._entry)
        if len(self._buffer) < _RECORD:
            return False
        record = bytes(self._buffer[:_RECORD])
        del self._buffer[:_RECORD]
        if not any(record):
            self._ended = True
            return True
        try:
            self._begin(tarfile.TarInfo.frombuf(record, "utf-8", "surrogateescape"))
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ProtocolError(f"the guest's agent sent an archive that is not one: {error}") from error
        return True

    def _begin(self, entry: tarfile.TarInfo) -> None:
        if entry.size < 0 or (entry.type in _LONG and entry.size > _MAX_NAME + 1):
            raise ProtocolError(f"the guest's agent sent an archive with an entry of {entry.size} bytes")
        if entry.type not in _LONG:
            for kind, attribute in ((tarfile.GNUTYPE_LONGNAME, "name"), (tarfile.GNUTYPE_LONGLINK, "linkname")):
                if kind in self._long:
                    value = self._long[kind].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                    setattr(entry, attribute, value.rstrip("/") if attribute == "name" else value)
            self._long.clear()
        self._entry = entry
        if entry.type in _REGULAR or entry.type in _LONG:
            self._rest, self._padding = entry.size, 0
        elif entry.isdir() or entry.issym() or entry.type in _LEFT_OUT:
            self._rest = 0
        else:
            raise ProtocolError(f"the guest's agent sent an archive with an entry of type {entry.type!r}")
        if entry.type not in _LONG:
            self._make(entry)
        if not self._rest:
            self._complete(entry)

    def _content(self, entry: tarfile.TarInfo) -> bool:
        if not self._buffer:
            return False
        data = bytes(self._buffer[: self._rest])
        del self._buffer[: self._rest]
        self._rest -= len(data)
        if entry.type in _LONG:
            self._long[entry.type] = self._long.get(entry.type, b"") + data
        elif self._file is not None:
            write_all(self._file, data)
            self.bytes += len(data)
        if not self._rest:
            self._complete(entry)
        return True

    def _complete(self, entry: tarfile.TarInfo) -> None:
        self._padding = -entry.size % _RECORD if entry.type in _REGULAR or entry.type in _LONG else 0
        self._entry = None
        if self._file is not None:
            time = min(max(int(entry.mtime), 0), _MAX_TIME)
            os.utime(self._file, (time, time))
            os.close(self._file)
            self._file = None
            self.files += 1

    # -- the file system --------------------------------------------------------------------------------------------

    def _make(self, entry: tarfile.TarInfo) -> None:
        parts = self._parts(entry.name)
        if entry.isdir():
            fd = self._descend(parts)
            os.fchmod(fd, (entry.mode & 0o755) | 0o700)
        elif not parts:
            raise ProtocolError("the guest's agent sent an archive whose top is not a directory")
        elif entry.type in _REGULAR:
            # No bits for other users to write, no set-user-ID: this is somebody else's file from here on.
            self._file = self._create(self._descend(parts[:-1]), parts[-1], (entry.mode & 0o755) | 0o600)
        elif entry.issym() and (self._all_links or _stays_inside(parts, entry.linkname)):
            directory = self._descend(parts[:-1])
            _remove(directory, parts[-1])
            os.symlink(entry.linkname, parts[-1], dir_fd=directory)
            self.files += 1
        elif len(self.skipped) < _MAX_SKIPPED:
            self.skipped.append(printable("/".join(parts), _MAX_NAME))

    def _parts(self, name: str) -> tuple[str, ...]:
        """Where an entry goes, below the target."""
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in parts or "\0" in name or len(name) > _MAX_NAME:
            raise ProtocolError(f"the guest's agent sent an archive with the entry {printable(name)!r}")
        if not self._strip:
            return parts
        if not parts or self._top not in (None, parts[0]):
            raise ProtocolError("the guest's agent sent an archive with more than one top directory")
        self._top = parts[0]
        return parts[1:]

    def _descend(self, parts: tuple[str, ...]) -> int:
        """A descriptor of a directory below the target, made where it is missing. Owned by the unpacker."""
        if self._directory is not None and self._directory[0] == parts:
            return self._directory[1]
        fd = os.dup(self._root)
        try:
            for part in parts:
                try:
                    os.mkdir(part, 0o755, dir_fd=fd)
                except FileExistsError:
                    pass
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        if self._directory is not None:
            os.close(self._directory[1])
        self._directory = (parts, fd)
        return fd

    @staticmethod
    def _create(directory: int, name: str, mode: int) -> int:
        _remove(directory, name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        os.fchmod(fd, mode)
        return fd

    def _name(self) -> str:
        return printable(self._entry.name) if self._entry is not None else "the archive"


def _stays_inside(parts: tuple[str, ...], target: str) -> bool:
    """Whether a link at ``parts`` cannot lead out of the tree, whatever other links of this kind the tree holds.

    Its ``..`` must come first: then they climb real directories only. A ``..`` after a name could climb from where
    another link has led.
    """
    steps = [step for step in target.split("/") if step not in ("", ".")]
    ups = next((i for i, step in enumerate(steps) if step != ".."), len(steps))
    return bool(target) and not target.startswith("/") and ups < len(parts) and ".." not in steps[ups:]


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def write_all(fd: int, data: bytes) -> None:
    """Write it all: a disk that is nearly full takes less than it is given."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
