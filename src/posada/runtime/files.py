"""Which file is it? A file has many names and descriptors."""

from __future__ import annotations

import os
import stat

Identity = tuple[int, int]
"""A file, as nobody can mistake it for another: device and inode; of a block device, 0 and which."""


def identity(file: int | str | os.PathLike[str]) -> Identity:
    """Of a descriptor or a path. Raises OSError."""
    info = os.stat(file)
    return (0, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)
