"""Files and sockets that an engine opens for the process of a machine, which may open nothing itself."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from posada.errors import HostError, ImageError


def open_file(path: Path, *, writable: bool) -> int:
    """A regular file or block device. Raises HostError, ImageError."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise ImageError(f"{path} is neither a file nor a block device")
    return fd


def reopen(fd: int, flags: int) -> int:
    """A second open file description of the same file: an offset and an access mode of its own."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def unix_socket(path: Path, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, str, int | None]:
    """A socket, and an address for ``path`` that fits ``sun_path`` (107 bytes): by a descriptor of its directory if long.

    The descriptor, if any, is to be closed after bind or connect.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    if len(os.fsencode(path)) <= 107:
        return sock, str(path), None
    directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    return sock, f"/proc/self/fd/{directory}/{path.name}", directory


def listen(path: Path, kind: int = socket.SOCK_STREAM) -> int:
    """A listening unix socket that only the owner of ``path``'s directory may connect to. Raises HostError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock, address, directory = unix_socket(path, kind)
    try:
        sock.bind(address)
        os.chmod(path, 0o600)  # before listen: nobody can connect earlier
        sock.listen(8)
        return sock.detach()
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        if directory is not None:
            os.close(directory)
