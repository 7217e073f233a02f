"""Files of a guest, as data."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

UInt = Annotated[int, msgspec.Meta(ge=0)]


class FileType(str, enum.Enum):
    FILE = "file"
    DIRECTORY = "dir"
    LINK = "link"
    CHARACTER_DEVICE = "char"
    BLOCK_DEVICE = "block"
    FIFO = "fifo"
    SOCKET = "sock"

    def __str__(self) -> str:
        return self.value


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What stat says of a file in a guest. ``mode`` is its permission bits, ``mtime_ns`` nanoseconds since the epoch."""

    type: FileType
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o177777)]
    size: UInt
    mtime_ns: int = 0
    uid: UInt = 0
    gid: UInt = 0
    target: str | None = None
    """Where a link points, as it is written there."""


class DirEntry(FileInfo, frozen=True, kw_only=True):
    """One entry of a directory in a guest. ``uid`` and ``gid`` are not told here."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"\A[^/\x00]+\Z")]


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What an upload or a download did.

    ``skipped`` names what was left out on purpose: devices, fifos, sockets, and, in downloads, links that point out of
    the tree (a hostile guest could lead the host's programs through them).
    """

    files: int = 0
    bytes: int = 0
    skipped: tuple[str, ...] = ()
