"""Compressed kernels (``bzImage``): the setup header, and the 64-bit entry point.

Source: Linux, Documentation/arch/x86/boot.rst (fields by name; *64-bit Boot Protocol*). The file is untrusted.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from posada.errors import ImageError

SECTOR = 512
HEADER_AT = 0x1F1
"""Where the setup header lies, in the file and in ``struct boot_params``."""
HEADER_LIMIT = 0x280
"""The header never reaches the e820 table's neighbours (boot_params.edd_mbr_sig_buffer at 0x290)."""
_MIN_VERSION = 0x20C
"""First protocol version with ``xloadflags``."""
_KERNEL_64 = 1
_ENTRY_64 = 0x200


@dataclass(frozen=True, slots=True)
class BzImage:
    """``header`` goes to offset HEADER_AT of boot_params. Addresses are guest-physical; sizes in bytes."""

    header: bytes
    offset: int
    """Where the protected-mode part begins in the file."""
    size: int
    """Bytes of it."""
    address: int
    """Where it is loaded."""
    room: int
    """What it needs from ``address`` on while it unpacks itself (init_size)."""
    command_line_max: int
    initrd_max: int
    """Highest address of the initrd's last byte."""

    @property
    def entry(self) -> int:
        return self.address + _ENTRY_64


def parse(fd: int, size: int) -> BzImage:
    """Read the header of a bzImage of ``size`` bytes. Raises ImageError for anything else, and for 32-bit kernels."""
    boot = os.pread(fd, 0x300, 0)
    if len(boot) < 0x300 or boot[0x202:0x206] != b"HdrS":
        raise ImageError("the kernel is neither an ELF file nor a bzImage")
    (version,) = struct.unpack_from("<H", boot, 0x206)
    (flags,) = struct.unpack_from("<H", boot, 0x236)
    if version < _MIN_VERSION or not flags & _KERNEL_64:
        raise ImageError(
            f"the kernel has no 64-bit entry point (boot protocol {version >> 8}.{version & 0xFF:02})",
            hint="x86-64 kernels since Linux 3.8 have one",
        )
    offset = ((boot[HEADER_AT] or 4) + 1) * SECTOR
    if offset + _ENTRY_64 >= size:
        raise ImageError("the kernel is cut short: nothing follows its setup sectors")
    (initrd_max,) = struct.unpack_from("<I", boot, 0x22C)
    (command_line_max,) = struct.unpack_from("<I", boot, 0x238)
    (address,) = struct.unpack_from("<Q", boot, 0x258)
    (init_size,) = struct.unpack_from("<I", boot, 0x260)
    # The header's length is the jump's at 0x200: a short jump to the code after it (boot.rst, "header").
    end = min(0x202 + boot[0x201], HEADER_LIMIT)
    if end < 0x264:
        raise ImageError("the kernel's setup header is shorter than its version says")
    return BzImage(
        header=boot[HEADER_AT:end],
        offset=offset,
        size=size - offset,
        address=address,
        room=max(init_size, size - offset),
        command_line_max=command_line_max,
        initrd_max=initrd_max,
    )
