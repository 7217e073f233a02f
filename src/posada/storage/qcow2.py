"""qcow2: write empty images and overlays in under a millisecond, and read headers without trusting them.

Format: QEMU, docs/interop/qcow2.txt. Everything is big-endian. An image that holds nothing is four parts, each a whole
number of clusters: header, refcount table, refcount block, L1 table (all zeros: nothing is there, reads fall through to
the backing file). `inspect` reads the header of a file somebody else made; it opens nothing the header names.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import msgspec

from posada.errors import HostError, ImageError
from posada.model.machine import MAX_DISK
from posada.model.units import format_size

MAGIC = b"QFI\xfb"
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2: 72 bytes
_HEADER_V3 = struct.Struct(">QQQII")  # incompatible, compatible, autoclear features, refcount order, header length
_HEADER_LENGTH = 104
_EXT_END, _EXT_BACKING_FORMAT, _EXT_DATA_FILE = 0, 0xE2792ACA, 0x44415441
_MAX_BACKING_NAME = 1023
_MAX_L1 = 32 << 20
"""QEMU's QCOW_MAX_L1_SIZE (bytes)."""

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << n for n in range(5))


class Qcow2Info(msgspec.Struct, frozen=True, kw_only=True):
    """What a header says. Sizes in bytes."""

    version: int
    size: int
    """The virtual size."""
    cluster_bits: int
    backing: str | None = None
    backing_format: str | None = None
    encrypted: bool = False
    data_file: bool = False
    """Its data is in another file (incompatible feature bit 2)."""
    snapshots: int = 0
    incompatible: int = 0
    """The incompatible feature bits; only known ones."""


def create_overlay(path: Path, *, size: int, backing: Path, backing_format: str) -> None:
    """A new image of ``size`` bytes that reads from ``backing`` wherever nothing was written to it.

    The name is stored for people and tools; engines open the chain they are given, never this name. On the disk
    (fsync) when this returns. Raises HostError (the file exists; no space), ImageError (a name the format cannot hold).
    """
    name = os.fsencode(backing)
    if not 0 < len(name) <= _MAX_BACKING_NAME:
        raise ImageError(f"a qcow2 file cannot name a backing file of {len(name)} bytes", hint="use a shorter path")
    _write(path, _empty_image(size, name, backing_format.encode()))


def create_empty(path: Path, *, size: int) -> None:
    """A new image of ``size`` bytes that reads as zeros. Durable, and raises, as `create_overlay`."""
    _write(path, _empty_image(size))


def _empty_image(size: int, backing: bytes = b"", backing_format: bytes = b"") -> list[tuple[int, bytes]]:
    """(offset, bytes) parts of the file; the last one ends it. What lies between them is zero."""
    if not 0 < size <= MAX_DISK or size % 512:
        raise ImageError(f"{size} bytes is not the size of a disk")
    # One L2 table of one cluster maps CLUSTER / 8 clusters.
    l1_entries = -(-size // (CLUSTER * CLUSTER // 8))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    used = 3 + l1_clusters
    extensions = b""
    if backing:
        extensions = struct.pack(">II", _EXT_BACKING_FORMAT, len(backing_format)) + backing_format
        extensions += bytes(-len(extensions) % 8)
    extensions += struct.pack(">II", _EXT_END, 0)
    name_at = _HEADER_LENGTH + len(extensions) if backing else 0
    header = _HEADER.pack(
        MAGIC, 3, name_at, len(backing), CLUSTER_BITS, size, 0,
        l1_entries, 3 * CLUSTER,  # L1 table
        CLUSTER, 1,  # refcount table, one cluster of it
        0, 0,
    )  # fmt: skip
    header += _HEADER_V3.pack(0, 0, 0, 4, _HEADER_LENGTH)
    return [
        (0, header + extensions + backing),
        (CLUSTER, struct.pack(">Q", 2 * CLUSTER)),
        (2 * CLUSTER, struct.pack(">H", 1) * used),
        (used * CLUSTER, b""),
    ]


def _write(path: Path, parts: list[tuple[int, bytes]]) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot create {path}: {error.strerror}") from error
    try:
        os.ftruncate(fd, parts[-1][0])
        for offset, data in parts:
            if os.pwrite(fd, data, offset) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError as error:
        os.unlink(path)
        raise HostError(f"cannot write {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def is_qcow2(path: Path) -> bool:
    """The file begins with qcow2's magic number. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def inspect(path: Path) -> Qcow2Info:
    """What the header says, once it has been found to make sense. Reads the first cluster only.

    Raises ImageError, naming what is wrong, for a file that is not qcow2, truncated, corrupt, or of a kind QEMU 7.2
    does not know. Backing files, data files and encryption are reported, not refused: that is for who imports it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            return parse_header(file.read(1 << 16), length)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error.message}", hint=error.hint) from None


def parse_header(head: bytes, length: int) -> Qcow2Info:
    """`inspect` on the first bytes (64 KiB, or all there is) of a file of ``length`` bytes. Raises ImageError."""
    if head[:4] != MAGIC:
        raise ImageError("it is not a qcow2 file")
    if len(head) < _HEADER.size:
        raise ImageError("the qcow2 header is truncated")
    (_, version, name_at, name_length, cluster_bits, size, crypt, l1_entries, l1_at,
     refcounts_at, refcount_clusters, snapshots, snapshots_at) = _HEADER.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise ImageError(f"qcow2 version {version} is not known", hint="qemu-img convert can rewrite it")
    incompatible, refcount_order, header_length = 0, 4, _HEADER.size
    if version == 3:
        if len(head) < _HEADER_LENGTH:
            raise ImageError("the qcow2 header is truncated")
        incompatible, _, _, refcount_order, header_length = _HEADER_V3.unpack_from(head, _HEADER.size)
    if not 9 <= cluster_bits <= 21:
        raise ImageError(f"a cluster size of 2^{cluster_bits} bytes is not allowed")
    cluster = 1 << cluster_bits
    if not 0 < size <= MAX_DISK:
        raise ImageError(f"it claims to be a disk of {format_size(size)}", hint=f"at most {format_size(MAX_DISK)}")
    if version == 3 and (not _HEADER_LENGTH <= header_length <= min(cluster, len(head)) or header_length % 8):
        raise ImageError(f"a header of {header_length} bytes is not allowed")
    if refcount_order > 6:
        raise ImageError(f"refcounts of 2^{refcount_order} bits are not allowed")
    if incompatible & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2):
        raise ImageError(f"it needs features that are not known here (incompatible features {incompatible:#x})")
    if incompatible & CORRUPT:
        raise ImageError("it is marked as corrupt", hint="qemu-img check -r all may repair it")
    if crypt > 2:
        raise ImageError(f"encryption method {crypt} is not known")
    entry = 16 if incompatible & EXTENDED_L2 else 8
    if l1_entries * 8 > _MAX_L1 or l1_entries < -(-size // (cluster * (cluster // entry))):
        raise ImageError(f"an L1 table of {l1_entries} entries does not fit a disk of {format_size(size)}")
    for what, at, bytes_ in (
        ("L1 table", l1_at, l1_entries * 8),
        ("refcount table", refcounts_at, refcount_clusters * cluster),
        ("snapshot table", snapshots_at, snapshots * 40),
    ):
        if bytes_ and (at == 0 or at % cluster or at + bytes_ > length):
            raise ImageError(f"it is truncated or corrupt: its {what} lies outside the file")
    if not refcount_clusters:
        raise ImageError("it has no refcount table")
    backing, backing_format = None, None
    if name_at:
        if not header_length <= name_at <= min(cluster, len(head)) - name_length or name_length > _MAX_BACKING_NAME:
            raise ImageError("the name of its backing file lies outside the header")
        backing = os.fsdecode(head[name_at : name_at + name_length])
    extensions = _extensions(head, header_length, min(cluster, name_at or cluster, len(head)))
    if _EXT_BACKING_FORMAT in extensions:
        backing_format = extensions[_EXT_BACKING_FORMAT].decode("ascii", "replace")
    return Qcow2Info(
        version=version, size=size, cluster_bits=cluster_bits, backing=backing, backing_format=backing_format,
        encrypted=crypt != 0, data_file=bool(incompatible & DATA_FILE) or _EXT_DATA_FILE in extensions,
        snapshots=snapshots, incompatible=incompatible,
    )  # fmt: skip


def _extensions(head: bytes, at: int, end: int) -> dict[int, bytes]:
    """Header extensions by type. Raises ImageError for one that reaches beyond ``end``."""
    out: dict[int, bytes] = {}
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _EXT_END:
            break
        if at + 8 + length > end:
            raise ImageError("a header extension lies outside the header")
        out[kind] = head[at + 8 : at + 8 + length]
        at += 8 + length + (-length % 8)
    return out
