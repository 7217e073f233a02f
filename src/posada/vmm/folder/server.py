"""The FUSE server of one folder. One request at a time, answered in order; what is malformed is answered with EINVAL."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EBADF, EINVAL, EIO, EMFILE, ENOMEM, ENOSYS, EPERM, EROFS
from struct import Struct
from struct import error as StructError

from posada.vmm.folder import abi
from posada.vmm.folder.abi import Op, attributes
from posada.vmm.folder.tree import Tree, component

MAX_HANDLES = 4000
MAX_TWINS = 1024
"""Servers of forked guests that one may have beside it."""
MAX_LISTED = 64 << 20
"""Bytes of the names of all open directories: they are read once, when they are opened."""
CACHE_SECONDS = 1
"""How long the guest may believe what it was told: the host's own programs change the folder too."""
_MESSAGE = abi.MAX_WRITE + 4096
_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC
_OVERHEAD = 48  # of a bytes object in a list
_SILENT = (Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET)


class Request:
    """One message. Its ``body`` is read piece by piece."""

    def __init__(self, message: memoryview) -> None:
        _, self.op, self.unique, self.node, self.uid, self.gid, _, _ = abi.IN_HEADER.unpack_from(message)
        self.body = message[abi.IN_HEADER.size :]

    def take(self, what: Struct) -> tuple[int, ...]:
        """The next structure. Raises struct.error if it is cut short."""
        fields: tuple[int, ...] = what.unpack_from(self.body)
        self.body = self.body[what.size :]
        return fields

    def name(self) -> bytes:
        """The next string, which ends with NUL. Raises OSError."""
        text, end, _ = bytes(self.body[:4200]).partition(b"\0")
        if not end:
            raise OSError(EINVAL, "string")
        self.body = self.body[len(text) + 1 :]
        return text


class Server:
    """``folder``: descriptor of the directory; ``sock``: seqpacket, to the monitor. Owns both."""

    def __init__(self, folder: int, sock: socket.socket, *, readonly: bool) -> None:
        self._tree = Tree(folder)
        self._sock = sock
        self._readonly = readonly
        self._handles: dict[int, tuple[int, list[bytes]]] = {}
        self._next_handle = 1
        self._listed = 0
        self._twins = 0
        self._owns = os.geteuid() == 0
        self._calls: dict[int, Callable[[Request], bytes]] = {
            Op.LOOKUP: lambda r: self._entry(r.node, r.name()), Op.GETATTR: self._getattr, Op.SETATTR: self._setattr,
            Op.READLINK: self._readlink, Op.SYMLINK: self._symlink, Op.MKNOD: self._mknod, Op.MKDIR: self._mkdir,
            Op.UNLINK: self._unlink, Op.RMDIR: self._rmdir, Op.RENAME: self._rename, Op.RENAME2: self._rename2,
            Op.LINK: self._link, Op.OPEN: self._open, Op.READ: self._read, Op.WRITE: self._write, Op.STATFS: self._statfs,
            Op.RELEASE: self._release, Op.RELEASEDIR: self._release, Op.FSYNC: self._fsync, Op.FSYNCDIR: self._fsync,
            Op.FLUSH: lambda r: b"", Op.INIT: self._init, Op.OPENDIR: self._opendir, Op.READDIR: self._readdir,
            Op.CREATE: self._create, Op.DESTROY: self._destroy, Op.FALLOCATE: self._fallocate, Op.LSEEK: self._lseek,
        }  # fmt: skip

    def run(self) -> None:
        """Until the monitor hangs up. A message with a descriptor is not the guest's: see `_fork`."""
        buffer = memoryview(bytearray(_MESSAGE))
        room = socket.CMSG_SPACE(4)
        while True:
            size, ancillary, _, _ = self._sock.recvmsg_into([buffer], room, socket.MSG_CMSG_CLOEXEC)
            if not size:
                return
            if ancillary:
                self._fork(int.from_bytes(ancillary[0][2][:4], sys.byteorder))
            elif size >= abi.IN_HEADER.size:
                reply = self.handle(buffer[:size])
                if reply is not None:
                    self._sock.sendall(reply)

    def _fork(self, fd: int) -> None:
        """The guest was forked: so are we, for the new one, which speaks to us by the socket ``fd``. All that is open in
        the one is open in the other. What cannot be forked does not serve: the new guest's requests fail."""
        with suppress(ChildProcessError):
            while self._twins and os.waitpid(-1, os.WNOHANG)[0]:
                self._twins -= 1
        pid = -1
        if self._twins < MAX_TWINS:
            with suppress(OSError):  # no more processes
                pid = os.fork()
        if pid:
            self._twins += pid > 0
            os.close(fd)
        else:
            self._sock.close()
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
            self._twins = 0

    def handle(self, message: memoryview) -> bytes | None:
        """The answer to a message of at least a header; None where there is none."""
        request = Request(message)
        if request.op in _SILENT:
            self._forget(request)
            return None
        try:
            if self._readonly and request.op in abi.CHANGES:
                raise OSError(EROFS, "folder")
            call = self._calls.get(request.op)
            if call is None:
                raise OSError(ENOSYS, "operation")
            body, error = call(request), 0
        except OSError as failure:
            body, error = b"", failure.errno or EIO
        except (StructError, ValueError, OverflowError):
            body, error = b"", EINVAL
        except MemoryError:
            body, error = b"", ENOMEM
        return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(body), -error, request.unique) + body

    def close(self) -> None:
        self._destroy(None)
        self._sock.close()

    # The session.

    def _init(self, request: Request) -> bytes:
        major, _, readahead, flags = request.take(abi.INIT_IN)
        if major != abi.MAJOR:
            raise OSError(EINVAL, "version")
        flags &= abi.ASYNC_READ | abi.BIG_WRITES | abi.PARALLEL_DIROPS | abi.MAX_PAGES
        pages = abi.MAX_WRITE >> 12
        return abi.INIT_OUT.pack(abi.MAJOR, abi.MINOR, readahead, flags, 16, 12, abi.MAX_WRITE, 1, pages, 0, 0)

    def _destroy(self, _request: Request | None) -> bytes:
        for fd, _ in self._handles.values():
            os.close(fd)
        self._handles.clear()
        self._listed = 0
        return b""

    def _forget(self, request: Request) -> None:
        try:
            if request.op == Op.FORGET:
                self._tree.forget(request.node, *request.take(abi.FORGET_IN))
            elif request.op == Op.BATCH_FORGET:
                for _ in range(request.take(abi.BATCH_FORGET_IN)[0]):
                    self._tree.forget(*request.take(abi.FORGET_ONE))
        except StructError:
            pass  # nobody is answered

    # Names and attributes.

    def _entry(self, parent: int, name: bytes) -> bytes:
        number, found = self._tree.look_up(parent, name)
        return abi.ENTRY.pack(number, 0, CACHE_SECONDS, CACHE_SECONDS, 0, 0) + attributes(found)

    def _attributes(self, number: int) -> bytes:
        return abi.ATTR_OUT.pack(CACHE_SECONDS, 0, 0) + attributes(os.fstat(self._tree.node(number).fd))

    def _getattr(self, request: Request) -> bytes:
        return self._attributes(request.node)

    def _setattr(self, request: Request) -> bytes:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = request.take(
            abi.SETATTR_IN
        )
        if valid & abi.SET_SIZE:
            fd = self._handle(handle) if valid & abi.SET_HANDLE else self._tree.open(request.node, os.O_WRONLY)
            try:
                os.ftruncate(fd, size)
            finally:
                if not valid & abi.SET_HANDLE:
                    os.close(fd)
        if valid & (abi.SET_UID | abi.SET_GID):
            folder, name = self._tree.place(request.node)
            owner, group = (uid if valid & abi.SET_UID else -1), (gid if valid & abi.SET_GID else -1)
            os.chown(name, owner, group, dir_fd=folder, follow_symlinks=False)
        if valid & abi.SET_MODE:
            fd = self._tree.open(request.node, os.O_RDONLY)
            try:
                os.fchmod(fd, mode & 0o1777)  # set-uid would be a trap for the host's users
            finally:
                os.close(fd)
        if valid & (abi.SET_ATIME | abi.SET_MTIME):
            now = os.fstat(self._tree.node(request.node).fd)
            times = (
                atime * 10**9 + atime_ns if valid & abi.SET_ATIME else now.st_atime_ns,
                mtime * 10**9 + mtime_ns if valid & abi.SET_MTIME else now.st_mtime_ns,
            )
            folder, name = self._tree.place(request.node)
            os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
        return self._attributes(request.node)

    def _readlink(self, request: Request) -> bytes:
        return os.readlink(b"", dir_fd=self._tree.node(request.node).fd)

    def _made(self, request: Request, name: bytes) -> bytes:
        """What was just made belongs to who made it, as far as we may say so."""
        entry = self._entry(request.node, name)
        if self._owns:
            folder = self._tree.node(request.node).fd
            os.chown(name, request.uid, request.gid, dir_fd=folder, follow_symlinks=False)
            self._tree.forget(abi.ENTRY.unpack_from(entry)[0], 1)
            entry = self._entry(request.node, name)
        return entry

    def _symlink(self, request: Request) -> bytes:
        name, target = component(request.name()), request.name()
        os.symlink(target, name, dir_fd=self._tree.node(request.node).fd)
        return self._made(request, name)

    def _mknod(self, request: Request) -> bytes:
        mode, _, umask, _ = request.take(abi.MKNOD_IN)
        name = component(request.name())
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise OSError(EPERM, "device file")  # it would be one of the host's
        os.mknod(name, mode & ~umask & (0o777 | stat.S_IFMT(mode)), dir_fd=self._tree.node(request.node).fd)
        return self._made(request, name)

    def _mkdir(self, request: Request) -> bytes:
        mode, umask = request.take(abi.MKDIR_IN)
        name = component(request.name())
        os.mkdir(name, mode & ~umask & 0o1777, dir_fd=self._tree.node(request.node).fd)
        return self._made(request, name)

    def _unlink(self, request: Request) -> bytes:
        os.unlink(component(request.name()), dir_fd=self._tree.node(request.node).fd)
        return b""

    def _rmdir(self, request: Request) -> bytes:
        os.rmdir(component(request.name()), dir_fd=self._tree.node(request.node).fd)
        return b""

    def _rename(self, request: Request) -> bytes:
        return self._move(request, *request.take(abi.RENAME_IN))

    def _rename2(self, request: Request) -> bytes:
        target, flags, _ = request.take(abi.RENAME2_IN)
        if flags:
            raise OSError(EINVAL, "flags")  # exchange and whiteout have no call in Python; the guest copes
        return self._move(request, target)

    def _move(self, request: Request, target: int) -> bytes:
        old, new = component(request.name()), component(request.name())
        source, folder = self._tree.node(request.node).fd, self._tree.node(target).fd
        os.rename(old, new, src_dir_fd=source, dst_dir_fd=folder)
        # The node must be found by its new name from now on.
        number, _ = self._tree.look_up(target, new)
        self._tree.forget(number, 1)
        return b""

    def _link(self, request: Request) -> bytes:
        (old,) = request.take(abi.LINK_IN)
        name = component(request.name())
        folder, seen = self._tree.place(old)
        target = self._tree.node(request.node).fd
        os.link(seen, name, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)
        return self._entry(request.node, name)

    def _statfs(self, request: Request) -> bytes:
        found = os.fstatvfs(self._tree.node(abi.ROOT).fd)
        return abi.STATFS_OUT.pack(
            found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree, found.f_bsize, found.f_namemax,
            found.f_frsize, 0,
        )  # fmt: skip

    # Data.

    def _handle(self, number: int) -> int:
        try:
            return self._handles[number][0]
        except KeyError:
            raise OSError(EBADF, "handle") from None

    def _opened(self, fd: int) -> bytes:
        if len(self._handles) >= MAX_HANDLES:
            os.close(fd)
            raise OSError(EMFILE, "handles")
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = (fd, [])
        return abi.OPEN_OUT.pack(number, 0, 0)

    def _open(self, request: Request) -> bytes:
        flags, _ = request.take(abi.OPEN_IN)
        flags &= _OPEN_FLAGS
        if self._readonly and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(EROFS, "folder")
        return self._opened(self._tree.open(request.node, flags & ~os.O_APPEND))

    def _create(self, request: Request) -> bytes:
        flags, mode, umask, _ = request.take(abi.CREATE_IN)
        name = component(request.name())
        folder = self._tree.node(request.node).fd
        made = True
        how = flags & _OPEN_FLAGS & ~os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, how | os.O_CREAT | os.O_EXCL, mode & ~umask & 0o777, dir_fd=folder)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            fd, made = os.open(name, how, dir_fd=folder), False
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(EINVAL, "special file")
            entry = self._made(request, name) if made else self._entry(request.node, name)
        except BaseException:
            os.close(fd)
            raise
        return entry + self._opened(fd)

    def _read(self, request: Request) -> bytes:
        handle, offset, size, *_ = request.take(abi.READ_IN)
        return os.pread(self._handle(handle), min(size, abi.MAX_WRITE), offset)

    def _write(self, request: Request) -> bytes:
        handle, offset, size, *_ = request.take(abi.WRITE_IN)
        if size > len(request.body):
            raise OSError(EINVAL, "size")
        return abi.WRITE_OUT.pack(os.pwrite(self._handle(handle), request.body[:size], offset), 0)

    def _release(self, request: Request) -> bytes:
        handle, *_ = request.take(abi.RELEASE_IN)
        os.close(self._handle(handle))
        self._listed -= _size(self._handles.pop(handle)[1])
        return b""

    def _fsync(self, request: Request) -> bytes:
        handle, only_data, _ = request.take(abi.FSYNC_IN)
        (os.fdatasync if only_data & 1 else os.fsync)(self._handle(handle))
        return b""

    def _fallocate(self, request: Request) -> bytes:
        handle, offset, length, mode, _ = request.take(abi.FALLOCATE_IN)
        if mode:
            raise OSError(ENOSYS, "mode")
        os.posix_fallocate(self._handle(handle), offset, length)
        return b""

    def _lseek(self, request: Request) -> bytes:
        handle, offset, whence, _ = request.take(abi.LSEEK_IN)
        return abi.LSEEK_OUT.pack(os.lseek(self._handle(handle), offset, whence))

    # Directories.

    def _opendir(self, request: Request) -> bytes:
        fd = self._tree.open(request.node, os.O_RDONLY | os.O_DIRECTORY)
        try:
            listed = self._list(fd)
        except BaseException:
            os.close(fd)
            raise
        answer = self._opened(fd)
        self._handles[abi.OPEN_OUT.unpack(answer)[0]][1][:] = listed
        self._listed += _size(listed)
        return answer

    def _list(self, fd: int) -> list[bytes]:
        """Every entry as the guest gets it."""
        listed = [_dirent(b".", 1, 1, stat.S_IFDIR >> 12), _dirent(b"..", 1, 2, stat.S_IFDIR >> 12)]
        left = MAX_LISTED - self._listed
        with os.scandir(fd) as entries:  # of a copy of the descriptor
            for entry in entries:
                listed.append(_dirent(os.fsencode(entry.name), entry.inode(), len(listed) + 1, _kind(entry)))
                left -= len(listed[-1]) + _OVERHEAD
                if left < 0:
                    raise OSError(ENOMEM, "directory")
        return listed

    def _readdir(self, request: Request) -> bytes:
        handle, offset, size, *_ = request.take(abi.READ_IN)
        self._handle(handle)
        out, left = [], min(size, abi.MAX_WRITE)
        for entry in self._handles[handle][1][offset:]:
            left -= len(entry)
            if left < 0:
                break
            out.append(entry)
        return b"".join(out)


def _dirent(name: bytes, inode: int, following: int, kind: int) -> bytes:
    """struct fuse_dirent. ``following``: where the next one is."""
    entry = abi.DIRENT.pack(inode, following, len(name), kind) + name
    return entry + bytes(-len(entry) % 8)


def _size(listed: list[bytes]) -> int:
    return sum(map(len, listed)) + len(listed) * _OVERHEAD


def _kind(entry: os.DirEntry[str]) -> int:
    """d_type of readdir(3)."""
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    return (stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG) >> 12
