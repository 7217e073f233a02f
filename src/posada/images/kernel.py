"""Out of a bzImage, the ``vmlinux`` inside: it boots through PVH without decompressing itself, half a second sooner
under emulation.

The payload is found through the setup header (Linux, Documentation/arch/x86/boot.rst, ``payload_offset`` and
``payload_length``, boot protocol 2.08 and later), never searched for. Its last four bytes are the size of what it
unpacks to, which bounds the output. Kernels are as untrusted as any other image.
"""

from __future__ import annotations

import importlib
import io
import lzma
import struct
import zlib
from typing import Any

from posada.errors import ImageError

MAX_KERNEL = 256 << 20
"""No vmlinux and no bzImage larger than this is looked at (bytes)."""

_GZIP, _XZ, _LZMA = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x5d\0\0"
_LZ4_LEGACY, _ZSTD = b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"
_LZ4_BLOCK = 8 << 20
"""The legacy lz4 frame's blocks unpack to at most this (lz4_Frame_format.md, *Legacy frame*)."""
_XEN_ELFNOTE_PHYS32_ENTRY = 18


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage; a vmlinux that is one already comes back as it is.

    Raises ImageError when there is none, its compression is not supported here, or it lacks the PVH entry point
    that would make it bootable: the caller keeps the bzImage then.
    """
    if len(image) > MAX_KERNEL:
        raise ImageError(f"the kernel is larger than {MAX_KERNEL >> 20} MiB")
    vmlinux = image if image[:4] == b"\x7fELF" else _unpack(*_payload(image))
    if not has_pvh_note(vmlinux):
        raise ImageError("the kernel has no PVH entry point")
    return vmlinux


def is_bzimage(image: bytes) -> bool:
    return image[0x202:0x206] == b"HdrS"


def _payload(image: bytes) -> tuple[bytes, int]:
    """(compressed payload, size it unpacks to)."""
    if len(image) < 0x250 or not is_bzimage(image):
        raise ImageError("the kernel is neither a bzImage nor an ELF file")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise ImageError(f"the kernel's boot protocol {version >> 8}.{version & 0xFF:02} is older than 2.08")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if length < 16 or start + length > len(image):
        raise ImageError("the kernel's payload lies outside the file: it is truncated or corrupt")
    (size,) = struct.unpack_from("<I", image, start + length - 4)
    if not 4096 <= size <= MAX_KERNEL:
        raise ImageError(f"the kernel claims to unpack to {size} bytes")
    return image[start : start + length], size


def _unpack(payload: bytes, size: int) -> bytes:
    limit = size + 1  # one more than is claimed tells a lie from the truth
    try:
        if payload.startswith(_GZIP):
            out = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(payload, limit)
        elif payload.startswith((_XZ, _LZMA)):
            out = lzma.LZMADecompressor(memlimit=MAX_KERNEL).decompress(payload, limit)
        elif payload.startswith(_LZ4_LEGACY):
            out = _unpack_lz4(payload[4:-4], size)
        elif payload.startswith(_ZSTD):
            out = _unpack_zstd(payload, limit)
        else:
            raise ImageError(f"the kernel is compressed in an unknown way ({payload[:4].hex()})")
    except (zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"the kernel's payload is corrupt: {error}") from error
    if len(out) != size or out[:4] != b"\x7fELF":
        raise ImageError("the kernel's payload is not the ELF file it claims to be")
    return out


def _unpack_lz4(blocks: bytes, size: int) -> bytes:
    """Legacy frame: blocks of (u32 length, data), each of at most 8 MiB unpacked."""
    lz4: Any = importlib.import_module("lz4.block")
    out = bytearray()
    at = 0
    while at + 4 <= len(blocks) and len(out) < size:
        (length,) = struct.unpack_from("<I", blocks, at)
        at += 4
        if length == struct.unpack("<I", _LZ4_LEGACY)[0]:
            continue  # another frame follows
        if length == 0 or at + length > len(blocks):
            raise ImageError("the kernel's lz4 payload is corrupt: a block reaches beyond its end")
        try:
            out += lz4.decompress(blocks[at : at + length], uncompressed_size=min(_LZ4_BLOCK, size - len(out)))
        except (lz4.LZ4BlockError, ValueError) as error:
            raise ImageError(f"the kernel's lz4 payload is corrupt: {error}") from error
        at += length
    return bytes(out)


def _unpack_zstd(payload: bytes, limit: int) -> bytes:
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise ImageError("the kernel is compressed with zstd", hint="pip install zstandard") from None
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(payload))
        out: bytes = reader.read(limit)
    except zstandard.ZstdError as error:
        raise ImageError(f"the kernel's payload is corrupt: {error}") from error
    return out


def has_pvh_note(elf: bytes) -> bool:
    """The ELF64 file has a note ``Xen`` of type PHYS32_ENTRY (xen/include/public/elfnote.h)."""
    if len(elf) < 64 or elf[:6] != b"\x7fELF\x02\x01":
        return False
    (table,) = struct.unpack_from("<Q", elf, 32)
    entry_size, count = struct.unpack_from("<HH", elf, 54)
    if entry_size < 56 or table + entry_size * count > len(elf):
        return False
    for i in range(min(count, 64)):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", elf, table + i * entry_size)
        if kind == 4 and size < 1 << 20 and _find_note(elf[offset : offset + size]):  # PT_NOTE
            return True
    return False


def _find_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        if (kind, name_size) == (_XEN_ELFNOTE_PHYS32_ENTRY, 4) and notes[at + 12 : at + 16] == b"Xen\0":
            return True
        at += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return False
