"""Frames of a live migration between two monitors, without I/O. One connection, one machine.

::

    source                        destination
      HELLO {size, cpus, devices}  ──►
      PAGES runs, their content    ──►        again and again; a later one replaces an earlier one
      ── the source's vcpus stop ──
      PAGES                        ──►
      STATE `Machine.save`         ──►
                                   ◄──  READY      it could be loaded
      GO                           ──►             from here on the machine is the destination's
                                   ◄──  RUNNING

Each frame has a header: magic, version, kind, length of what follows. FAILED (text) ends it, from either side, instead
of any frame before GO. Both sides check all they get; the destination trusts no number before it has bounded it.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

MAGIC = b"PMIG"
VERSION = 1
HEADER = struct.Struct("<4sHHQ")
RUN = struct.Struct("<QQ")

MAX_RUNS = 4096
"""In one PAGES frame."""
MAX_CONTENT = 4 << 20
"""Bytes of pages in one frame."""
MAX_STATE = 64 << 20
MAX_TEXT = 4096
PAGE = 4096


class MigrationError(ValueError):
    """The other side sent what the protocol forbids."""


class Kind(enum.IntEnum):
    HELLO = 1
    PAGES = 2
    STATE = 3
    READY = 4
    GO = 5
    RUNNING = 6
    FAILED = 7


_LIMITS = {
    Kind.HELLO: MAX_TEXT,
    Kind.PAGES: 4 + RUN.size * MAX_RUNS + MAX_CONTENT,
    Kind.STATE: MAX_STATE,
    Kind.READY: 0,
    Kind.GO: 0,
    Kind.RUNNING: 0,
    Kind.FAILED: MAX_TEXT,
}


def header(kind: Kind, length: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, length)


def read_header(data: bytes) -> tuple[Kind, int]:
    """Kind and length of what follows. Raises MigrationError."""
    magic, version, number, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise MigrationError("this is no migration")
    if version != VERSION:
        raise MigrationError(f"the other side speaks version {version} of the protocol, and this one {VERSION}")
    try:
        kind = Kind(number)
    except ValueError:
        raise MigrationError(f"{number} is no kind of frame") from None
    if length > _LIMITS[kind]:
        raise MigrationError(f"a {kind.name} frame of {length} bytes; at most {_LIMITS[kind]}")
    return kind, length


def pages_head(runs: Sequence[tuple[int, int]]) -> bytes:
    """Everything of a PAGES frame before the pages themselves, which follow in this order."""
    body = struct.pack("<I", len(runs)) + b"".join(RUN.pack(*run) for run in runs)
    return header(Kind.PAGES, len(body) + sum(length for _, length in runs)) + body


def read_runs(data: bytes, count: int, content: int, size: int) -> list[tuple[int, int]]:
    """The ``count`` runs of a frame with ``content`` bytes of pages, of a machine of ``size``. Raises MigrationError."""
    runs = [(offset, length) for offset, length in RUN.iter_unpack(data)]
    end = 0
    for offset, length in runs:
        if offset < end or not length or offset % PAGE or length % PAGE or offset + length > size:
            raise MigrationError(f"pages {offset:#x}+{length:#x} of {size:#x} bytes of memory")
        end = offset + length
    if len(runs) != count or sum(length for _, length in runs) != content:
        raise MigrationError("a PAGES frame whose runs are not as long as its content")
    return runs


def split(runs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """``runs`` as the frames that carry them, none too large."""
    frames: list[list[tuple[int, int]]] = []
    room = count = 0
    for offset, length in runs:
        while length:
            if not room or count == MAX_RUNS:
                frames.append([])
                room, count = MAX_CONTENT, 0
            part = min(length, room)
            frames[-1].append((offset, part))
            offset, length, room, count = offset + part, length - part, room - part, count + 1
    return frames
