"""The qcow2 format, as far as bytes go: headers of others, read without trusting them, and empty images of ours.

Format: QEMU, docs/interop/qcow2.txt. Everything is big-endian. An image that holds nothing is four parts, each a whole
number of clusters: header, refcount table, refcount block, L1 table (all zeros: nothing is there, reads fall through to
the backing file). The monitor's block layer and the host's storage both build on this; nothing here does I/O.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from posada.errors import ImageError
from posada.model.units import format_size

MAGIC = b"QFI\xfb"
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS

HEAD = 1 << 16
"""Bytes of a file's beginning that `parse_header` wants (fewer if there are no more)."""
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # version 2: 72 bytes
_HEADER_V3 = struct.Struct(">QQQII")  # incompatible, compatible, autoclear features, refcount order, header length
_HEADER_LENGTH = 104
_EXT_END, _EXT_BACKING_FORMAT, _EXT_DATA_FILE = 0, 0xE2792ACA, 0x44415441
_MAX_BACKING_NAME = 1023
_MAX_L1 = 32 << 20
"""QEMU's QCOW_MAX_L1_SIZE (bytes)."""
MAX_REFCOUNT_TABLE = 8 << 20
"""QEMU's QCOW_MAX_REFTABLE_SIZE (bytes)."""
_MAX_SNAPSHOTS = 65536

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << n for n in range(5))
"""The incompatible features."""


@dataclass(frozen=True, kw_only=True)
class Qcow2Info:
    """What a header says. Sizes and offsets in bytes."""

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
    autoclear: int = 0
    """The feature bits that whoever writes without knowing them has to clear."""
    compression: int = 0
    """0: deflate, 1: zstd."""
    refcount_order: int = 4
    """Refcounts are 2**this bits wide."""
    l1_at: int = 0
    l1_entries: int = 0
    refcounts_at: int = 0
    """Where the refcount table is."""
    refcount_clusters: int = 0
    """Clusters of the refcount table."""
    snapshots_at: int = 0


def parse_header(head: bytes, length: int, max_size: int) -> Qcow2Info:
    """What the first bytes (`HEAD`, or all there is) of a file of ``length`` bytes say, once they make sense.

    Raises ImageError, naming what is wrong, for a file that is not qcow2, truncated, corrupt, of a kind QEMU 7.2 does
    not know, or a disk of more than ``max_size`` bytes. Backing files, data files and encryption are reported, not
    refused: that is for who asks.
    """
    if head[:4] != MAGIC:
        raise ImageError("it is not a qcow2 file")
    if len(head) < _HEADER.size:
        raise ImageError("the qcow2 header is truncated")
    (_, version, name_at, name_length, cluster_bits, size, crypt, l1_entries, l1_at,
     refcounts_at, refcount_clusters, snapshots, snapshots_at) = _HEADER.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise ImageError(f"qcow2 version {version} is not known", hint="qemu-img convert can rewrite it")
    incompatible, autoclear, refcount_order, header_length = 0, 0, 4, _HEADER.size
    if version == 3:
        if len(head) < _HEADER_LENGTH:
            raise ImageError("the qcow2 header is truncated")
        incompatible, _, autoclear, refcount_order, header_length = _HEADER_V3.unpack_from(head, _HEADER.size)
    if not 9 <= cluster_bits <= 21:
        raise ImageError(f"a cluster size of 2^{cluster_bits} bytes is not allowed")
    cluster = 1 << cluster_bits
    if not 0 < size <= max_size:
        raise ImageError(f"it claims to be a disk of {format_size(size)}", hint=f"at most {format_size(max_size)}")
    if version == 3 and (not _HEADER_LENGTH <= header_length <= min(cluster, len(head)) or header_length % 8):
        raise ImageError(f"a header of {header_length} bytes is not allowed")
    if refcount_order > 6:
        raise ImageError(f"refcounts of 2^{refcount_order} bits are not allowed")
    if incompatible & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2):
        raise ImageError(f"it needs features that are not known here (incompatible features {incompatible:#x})")
    if incompatible & CORRUPT:
        raise ImageError("it is marked as corrupt", hint="qemu-img check -r all may repair it")
    compression = head[_HEADER_LENGTH] if header_length > _HEADER_LENGTH else 0
    if compression > 1 or bool(compression) != bool(incompatible & COMPRESSION):
        raise ImageError(f"compression type {compression} is not known, or not announced")
    if crypt > 2:
        raise ImageError(f"encryption method {crypt} is not known")
    entry = 16 if incompatible & EXTENDED_L2 else 8
    if l1_entries * 8 > _MAX_L1 or l1_entries < -(-size // (cluster * (cluster // entry))):
        raise ImageError(f"an L1 table of {l1_entries} entries does not fit a disk of {format_size(size)}")
    if refcount_clusters * cluster > MAX_REFCOUNT_TABLE:
        raise ImageError(f"a refcount table of {format_size(refcount_clusters * cluster)} is not allowed")
    if snapshots > _MAX_SNAPSHOTS:
        raise ImageError(f"it claims to hold {snapshots} snapshots")
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
        snapshots=snapshots, incompatible=incompatible, autoclear=autoclear, compression=compression,
        refcount_order=refcount_order, l1_at=l1_at, l1_entries=l1_entries, refcounts_at=refcounts_at,
        refcount_clusters=refcount_clusters, snapshots_at=snapshots_at,
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


def _encode_extensions(extensions: Mapping[int, bytes]) -> bytes:
    out = b""
    for kind, data in extensions.items():
        out += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
    return out + struct.pack(">II", _EXT_END, 0)


def rename_backing(head: bytes, backing: bytes, backing_format: bytes) -> bytes:
    """The first cluster of an image (``head``, which `parse_header` took) with another name for its backing file.

    Everything else stays. Raises ImageError: there is no room for the name, or it has none so far.
    """
    cluster_bits, header_length = struct.unpack_from(">I", head, 20)[0], _HEADER.size
    if struct.unpack_from(">I", head, 4)[0] == 3:
        header_length = _HEADER_V3.unpack_from(head, _HEADER.size)[4]
    name_at, cluster = struct.unpack_from(">Q", head, 8)[0], 1 << cluster_bits
    if not name_at or not backing:
        raise ImageError("it has no backing file whose name could be changed")
    extensions = _extensions(head, header_length, name_at) | {_EXT_BACKING_FORMAT: backing_format}
    encoded = _encode_extensions(extensions)
    name_at = header_length + len(encoded)
    if len(backing) > _MAX_BACKING_NAME or name_at + len(backing) > cluster:
        raise ImageError(f"a qcow2 file cannot name a backing file of {len(backing)} bytes", hint="use a shorter path")
    start = head[:8] + struct.pack(">QI", name_at, len(backing)) + head[20:header_length]
    return (start + encoded + backing).ljust(cluster, b"\0")


def empty_length(size: int) -> int:
    """Bytes of the file that `empty_image` describes: it grows with the first byte that is written to the disk."""
    return empty_image(size, size)[-1][0]


def empty_image(size: int, max_size: int, backing: bytes = b"", backing_format: bytes = b"") -> list[tuple[int, bytes]]:
    """An image of ``size`` bytes that holds nothing, as (offset, bytes) parts of its file.

    The last part ends the file; what lies between the parts is zero. ``backing`` is a name for people and tools:
    engines open the chain they are given, never this name. Raises ImageError: no size of a disk, a name too long.
    """
    if not 0 < size <= max_size or size % 512:
        raise ImageError(f"{size} bytes is not the size of a disk")
    if len(backing) > _MAX_BACKING_NAME:
        raise ImageError(f"a qcow2 file cannot name a backing file of {len(backing)} bytes", hint="use a shorter path")
    # One L2 table of one cluster maps CLUSTER / 8 clusters.
    l1_entries = -(-size // (CLUSTER * CLUSTER // 8))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    used = 3 + l1_clusters
    extensions = _encode_extensions({_EXT_BACKING_FORMAT: backing_format} if backing else {})
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
