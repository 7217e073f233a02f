"""The ``newc`` cpio archive the kernel unpacks as its initramfs, written byte for byte the same every time.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Each member is a header of 110 ASCII bytes,
its name with a NUL, and its data, the latter two each padded to 4 bytes.
"""

from __future__ import annotations

import stat

_ALIGN = 4


class CpioWriter:
    """Collects members; `finish` returns the archive. Owner is root and the time is 0 throughout."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._member(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._member(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        self._member(name, stat.S_IFLNK | 0o777, target.encode())

    def char_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._member(name, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The archive, with its trailer, padded to 512 bytes as cpio(1) does."""
        self._inode = -1
        self._member("TRAILER!!!", 0)
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % 512)

    def _member(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        if name.startswith("/") or "\0" in name or not name:
            raise ValueError(f"{name!r} is not the name of a cpio member")
        if len(data) >= 1 << 32:
            raise ValueError(f"{name} is larger than a newc archive can hold (4 GiB)")
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % f for f in fields)
        for part in (header + encoded, data):
            self._parts += [part, bytes(-len(part) % _ALIGN)]
