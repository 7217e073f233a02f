"""An open qcow2 image: its file, its header, and which host clusters hold metadata.

The file is hostile until shown otherwise: every table is found, lies in the file, is aligned, and overlaps no other
before anything is believed. What cannot be checked at once (the entries of L2 tables) is checked at each use.
"""

from __future__ import annotations

import sys
from array import array
from contextlib import suppress
from struct import Struct
from typing import NoReturn

from posada.errors import ImageError
from posada.proto.qcow2 import CORRUPT, DIRTY, EXTENDED_L2, HEAD, Qcow2Info, parse_header, rename_backing
from posada.vmm.block.file import File

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
"""Bits of an L2 entry; COPIED also of an L1 entry: the refcount is exactly 1, it may be changed in place."""
OFFSET = (1 << 56) - (1 << 9)
"""Bits 9 to 55: an offset into the file."""

MAX_SIZE = 64 << 40
MAX_L1 = 4 << 20
"""Bytes. At the usual 64 KiB clusters that maps 256 TiB; 4 TiB at 4 KiB clusters would be refused."""
_MAX_METADATA = 1 << 18
"""Clusters that hold tables: what we remember of each takes about 100 bytes."""
_MAX_SNAPSHOT_EXTRA = 1024  # as QEMU

_INCOMPATIBLE_AT, _AUTOCLEAR_AT = 72, 88
_SNAPSHOT = Struct(">QIHH20xI")  # L1 offset and entries, lengths of id and name, length of extra data


class Image:
    """What the parts of an open image share. All offsets and lengths are bytes in the file, clusters are host's."""

    def __init__(self, file: File, readonly: bool) -> None:
        """Raises ImageError (corrupt, or of a kind that is refused, in words), OSError."""
        self.file = file
        self.readonly = readonly
        length = file.length()
        self.info = info = parse_header(bytes(file.read(0, min(HEAD, length))), length, MAX_SIZE)
        _refuse(info, readonly)
        self.cluster_bits = info.cluster_bits
        self.cluster = 1 << info.cluster_bits
        self.table_bits = 2 * info.cluster_bits - 3
        """One L2 table maps 2**this bytes."""
        self.odd = (1 << 64) - 1 ^ COPIED ^ OFFSET | self.cluster - 1
        """An L2 entry without COPIED that has none of these bits is 0 or plain data."""
        self.end = -(-length // self.cluster) * self.cluster
        """No cluster in use lies behind this. QEMU lets the last one be cut short."""
        self.metadata: set[int] = set()
        """The clusters that no guest data may be written to."""
        self.damage: str | None = None
        self._claim(0, self.cluster, "header")
        self._claim(info.l1_at, info.l1_entries * 8, "L1 table")
        self._claim(info.refcounts_at, info.refcount_clusters * self.cluster, "refcount table")
        self._claim_snapshots()
        self.l1 = self.read_table(info.l1_at, info.l1_entries)
        for entry in filter(None, self.l1):
            self.claim_table(entry & ~COPIED, "L2 table")
        if not readonly and info.autoclear:
            # Somebody's bitmaps, say: they do not follow what we write, and this says so.
            file.write(_AUTOCLEAR_AT, bytes(8))

    def claim_table(self, entry: int, what: str) -> None:
        """A table of one cluster that an L1 or refcount table names. Raises ImageError if it cannot be there."""
        if entry & ~OFFSET:
            raise ImageError(f"it is corrupt: an entry for a {what} has reserved bits set ({entry:#x})")
        self._claim(entry, self.cluster, what)

    def read_table(self, at: int, entries: int) -> array[int]:
        """64-bit numbers; the caller has checked and bounded them."""
        return from_big(bytes(self.file.read(at, entries * 8)))

    def corrupt(self, reason: str) -> NoReturn:
        """Found while running: mark the image, write nothing to it any more. Raises ImageError."""
        if not self.readonly and self.damage is None and self.info.version >= 3:
            with suppress(OSError):
                self.file.write(_INCOMPATIBLE_AT, (self.info.incompatible | CORRUPT).to_bytes(8, "big"))
                self.file.sync()
        self.damage = self.damage or reason
        raise ImageError(f"the qcow2 image is corrupt: {reason}", hint="qemu-img check -r all may repair it")

    def rename_backing(self, name: bytes, format: bytes) -> None:
        """Say what it stands on now: for people and tools, nobody here follows the name. Durable.

        Raises ImageError: no room for it; OSError.
        """
        head = bytes(self.file.read(0, self.cluster))
        self.file.write(0, rename_backing(head, name, format))
        self.file.sync()

    def check_cluster(self, at: int, length: int, *, writing: bool) -> None:
        """Guest data at ``at``: in the file and, to be written, no metadata. Marks the image and raises otherwise."""
        if at + length > self.end:
            self.corrupt(f"guest data at {at:#x} lies outside the file")
        if writing:
            bits = self.cluster_bits
            for cluster in range(at >> bits, ((at + length - 1) >> bits) + 1):
                if cluster in self.metadata:
                    self.corrupt(f"guest data at {cluster << bits:#x} lies on metadata")

    def _claim(self, at: int, length: int, what: str) -> None:
        if not length:
            return
        if at % self.cluster or at + length > self.end:
            raise ImageError(f"it is corrupt: its {what} at {at:#x} is not aligned, or lies outside the file")
        first, last = at >> self.cluster_bits, (at + length - 1) >> self.cluster_bits
        if len(self.metadata) + last - first >= _MAX_METADATA:
            raise ImageError("its tables are too large", hint="rewrite it with larger clusters: qemu-img convert")
        for cluster in range(first, last + 1):
            if cluster in self.metadata:
                raise ImageError(f"it is corrupt: its {what} at {at:#x} overlaps other metadata")
            self.metadata.add(cluster)

    def _claim_snapshots(self) -> None:
        at = self.info.snapshots_at
        for _ in range(self.info.snapshots):
            l1_at, l1_entries, id_length, name_length, extra = _SNAPSHOT.unpack(self.file.read(at, _SNAPSHOT.size))
            if extra > _MAX_SNAPSHOT_EXTRA or l1_entries * 8 > MAX_L1:
                raise ImageError("it is corrupt: an entry of its snapshot table makes no sense")
            self._claim(l1_at, l1_entries * 8, "L1 table of a snapshot")
            at += _SNAPSHOT.size + extra + id_length + name_length
            at += -at % 8
        self._claim(self.info.snapshots_at, at - self.info.snapshots_at, "snapshot table")


def _refuse(info: Qcow2Info, readonly: bool) -> None:
    rewrite = "qemu-img convert can rewrite it"
    if info.encrypted:
        raise ImageError("it is encrypted", hint="decrypt it first: qemu-img convert")
    if info.data_file:
        raise ImageError("its data is in another file", hint=rewrite)
    if info.incompatible & EXTENDED_L2:
        raise ImageError("it has subclusters (extended L2 entries)", hint=rewrite)
    if info.incompatible & DIRTY and not readonly:
        raise ImageError("it was not closed properly", hint="qemu-img check -r all repairs it")
    if info.l1_entries * 8 > MAX_L1:
        raise ImageError("its clusters are too small for a disk of this size", hint=rewrite)


def from_big(data: bytes) -> array[int]:
    """64-bit big-endian numbers."""
    out = array("Q")
    out.frombytes(data)
    if sys.byteorder == "little":
        out.byteswap()
    return out


def to_big(numbers: array[int]) -> bytes:
    """The reverse of `from_big`, for numbers of any width."""
    if sys.byteorder == "little":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()
