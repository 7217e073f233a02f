"""The file system device and the folder's server, driven as the guest's kernel does it, over a real folder."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from posada.vmm.folder import abi, main, tree
from posada.vmm.folder.abi import Op
from posada.vmm.folder.server import Server
from posada.vmm.virtio.fs import MAX_MESSAGE, Fs
from posada.vmm.virtio.testing import FakeDriver

REQUESTS = 1


class Guest:
    """The guest's kernel: FUSE requests through the device to a server in a thread."""

    def __init__(self, stack: ExitStack, folder: Path, *, readonly: bool = False) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server = Server(os.open(folder, os.O_PATH), theirs, readonly=readonly)
        thread = threading.Thread(target=self.server.run, daemon=True)
        thread.start()
        self.device = Fs("shared", ours.detach())
        self.driver = FakeDriver(self.device, memory_size=64 << 20)
        stack.callback(self.server.close)
        stack.callback(thread.join)
        stack.callback(self.driver.loop.close)
        stack.callback(self.device.close)
        self.unique = 0
        self.ask(Op.INIT, 0, struct.pack("<IIII", 7, 36, 1 << 17, 0xFFFF_FFFF))

    def try_(self, op: int, node: int, body: bytes = b"", room: int = 4096, queue: int = REQUESTS) -> tuple[int, bytes]:
        """(errno, answer)."""
        self.unique += 1
        header = abi.IN_HEADER.pack(40 + len(body), op, self.unique, node, os.getuid(), os.getgid(), 1, 0)
        self.driver.put([header, body] if body else [header], [16, room], queue=queue)
        self.driver.kick(queue)
        found: list[bytes] = []

        def came() -> bool:
            found.extend(done.data for done in self.driver.collect(queue))
            return bool(found)

        self.driver.until(came)
        length, error, unique = abi.OUT_HEADER.unpack_from(found[0])
        assert unique == self.unique and length == len(found[0])
        return -error, found[0][16:]

    def ask(self, op: int, node: int, body: bytes = b"", room: int = 4096) -> bytes:
        error, answer = self.try_(op, node, body, room)
        assert error == 0, os.strerror(error)
        return answer

    def look_up(self, name: str, parent: int = abi.ROOT) -> int:
        return int(abi.ENTRY.unpack_from(self.ask(Op.LOOKUP, parent, name.encode() + b"\0"))[0])

    def open(self, node: int, flags: int = os.O_RDONLY, op: Op = Op.OPEN) -> int:
        return int(abi.OPEN_OUT.unpack(self.ask(op, node, struct.pack("<II", flags, 0)))[0])

    def read(self, handle: int, offset: int = 0, size: int = 4096, op: Op = Op.READ) -> bytes:
        return self.ask(op, 1, abi.READ_IN.pack(handle, offset, size, 0, 0, 0, 0), room=size)

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        body = abi.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0, 0) + data
        return int(abi.WRITE_OUT.unpack(self.ask(Op.WRITE, 1, body))[0])

    def create(self, name: str, mode: int = 0o644) -> tuple[int, int]:
        body = abi.CREATE_IN.pack(os.O_RDWR, mode, 0o022, 0) + name.encode() + b"\0"
        answer = self.ask(Op.CREATE, abi.ROOT, body)
        return abi.ENTRY.unpack_from(answer)[0], abi.OPEN_OUT.unpack_from(answer, 128)[0]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(folder: Path) -> Path:
    (folder / "out").symlink_to("../secret")
    (folder / "loop").symlink_to("..")
    return folder


def test_the_configuration(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    assert guest.driver.config() == b"shared".ljust(36, b"\0") + b"\1\0\0\0"


def test_files_are_read_and_written(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    handle = guest.open(guest.look_up("hello"))
    assert guest.read(handle) == b"hello, guest"
    assert guest.read(handle, 7, 3) == b"gue"
    guest.ask(Op.RELEASE, 1, abi.RELEASE_IN.pack(handle, 0, 0, 0))
    _, handle = guest.create("new", 0o666)
    data = os.urandom(abi.MAX_WRITE)
    assert guest.write(handle, data, 5) == len(data)
    assert guest.read(handle, 5, abi.MAX_WRITE) == data
    guest.ask(Op.FSYNC, 1, abi.FSYNC_IN.pack(handle, 0, 0))
    assert (folder / "new").read_bytes() == bytes(5) + data
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o644


def test_a_directory_is_listed_in_parts(stack: ExitStack, folder: Path) -> None:
    for number in range(300):
        (folder / f"file-{number}").touch()
    guest = Guest(stack, folder)
    handle = guest.open(abi.ROOT, op=Op.OPENDIR)
    names: list[str] = []
    while data := guest.read(handle, len(names), 1000, op=Op.READDIR):
        while data:
            _, at, length, _ = abi.DIRENT.unpack_from(data)
            names.append(data[24 : 24 + length].decode())
            assert at == len(names)
            data = data[-(-(24 + length) // 8) * 8 :]
    assert sorted(names) == sorted([".", "..", *os.listdir(folder)])


def test_what_changes_names(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    guest.ask(Op.MKDIR, 1, abi.MKDIR_IN.pack(0o777, 0o022) + b"made\0")
    made = guest.look_up("made")
    node = guest.look_up("hello")
    guest.ask(Op.RENAME, 1, abi.RENAME_IN.pack(made) + b"hello\0moved\0")
    assert (folder / "made/moved").read_text() == "hello, guest"
    assert guest.read(guest.open(node)) == b"hello, guest"  # by its new name
    guest.ask(Op.LINK, 1, abi.LINK_IN.pack(node) + b"second\0")
    assert (folder / "second").stat().st_nlink == 2
    guest.ask(Op.SYMLINK, 1, b"arrow\0/somewhere/else\0")
    assert guest.ask(Op.READLINK, guest.look_up("arrow")) == b"/somewhere/else"
    guest.ask(Op.UNLINK, made, b"moved\0")
    assert guest.try_(Op.RMDIR, 1, b"sub/../sub\0")[0] == errno.EINVAL
    guest.ask(Op.RMDIR, 1, b"sub\0")
    assert sorted(os.listdir(folder)) == ["arrow", "loop", "made", "out", "second"]
    assert len(guest.ask(Op.STATFS, 1)) == 80


def test_attributes_are_set(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    node = guest.look_up("hello")
    valid = abi.SET_MODE | abi.SET_SIZE | abi.SET_MTIME
    body = abi.SETATTR_IN.pack(valid, 0, 0, 5, 0, 0, 1000, 0, 0, 7, 0, 0o4751, 0, 0, 0, 0)
    guest.ask(Op.SETATTR, node, body)
    found = (folder / "hello").stat()
    assert (found.st_size, found.st_mtime_ns) == (5, 1000 * 10**9 + 7)
    assert stat.S_IMODE(found.st_mode) == 0o751  # no set-uid on the host


def test_nothing_outside_can_be_named(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    absolute = bytes(folder.parent / "secret")  # never a file of the host's: were it followed, it would be gone
    for name in (b"..", b".", b"", b"../secret", b"sub/../../secret", absolute, b"x" * 256):
        assert guest.try_(Op.LOOKUP, 1, name + b"\0")[0] in (errno.EINVAL, errno.ENAMETOOLONG)
        assert guest.try_(Op.UNLINK, 1, name + b"\0")[0] in (errno.EINVAL, errno.ENAMETOOLONG)
    for link in ("out", "loop"):
        node = guest.look_up(link)
        assert guest.try_(Op.OPEN, node, struct.pack("<II", 0, 0))[0] == errno.ELOOP
        assert guest.try_(Op.OPENDIR, node, struct.pack("<II", 0, 0))[0] == errno.ELOOP
        assert guest.try_(Op.LOOKUP, node, b"secret\0")[0] == errno.ENOTDIR
        size = abi.SETATTR_IN.pack(abi.SET_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        assert guest.try_(Op.SETATTR, node, size)[0] == errno.ELOOP
        create = abi.CREATE_IN.pack(os.O_RDWR | os.O_TRUNC, 0o644, 0, 0) + link.encode() + b"\0"
        assert guest.try_(Op.CREATE, 1, create)[0] == errno.ELOOP
    assert (folder.parent / "secret").read_text() == "not yours"


def test_a_file_that_the_host_swaps_for_a_link_is_not_followed(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    node = guest.look_up("hello")
    (folder / "hello").unlink()
    (folder / "hello").symlink_to("../secret")
    assert guest.try_(Op.OPEN, node, struct.pack("<II", 0, 0))[0] == errno.ELOOP
    (folder / "hello").unlink()
    (folder / "hello").write_text("another file")
    assert guest.try_(Op.OPEN, node, struct.pack("<II", 0, 0))[0] == errno.ESTALE
    assert guest.read(guest.open(guest.look_up("hello"))) == b"another file"


def test_a_directory_that_is_moved_out_takes_nothing_with_it(stack: ExitStack, folder: Path) -> None:
    (folder / "sub/file").write_text("inside")
    guest = Guest(stack, folder)
    sub = guest.look_up("sub")
    (folder / "sub").rename(folder.parent / "elsewhere")
    assert guest.try_(Op.LOOKUP, sub, b"..\0")[0] == errno.EINVAL  # the way up does not exist
    assert guest.look_up("file", sub)


def test_a_read_only_folder(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder, readonly=True)
    node = guest.look_up("hello")
    assert guest.read(guest.open(node)) == b"hello, guest"
    assert guest.try_(Op.OPEN, node, struct.pack("<II", os.O_RDWR, 0))[0] == errno.EROFS
    assert guest.try_(Op.OPEN, node, struct.pack("<II", os.O_TRUNC, 0))[0] == errno.EROFS
    for op in abi.CHANGES:
        assert guest.try_(op, 1, bytes(200))[0] == errno.EROFS
    assert sorted(os.listdir(folder)) == ["hello", "loop", "out", "sub"]


def test_device_files_are_not_made(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        assert guest.try_(Op.MKNOD, 1, abi.MKNOD_IN.pack(kind | 0o666, 0x103, 0, 0) + b"null\0")[0] == errno.EPERM
    guest.ask(Op.MKNOD, 1, abi.MKNOD_IN.pack(stat.S_IFIFO | 0o666, 0, 0, 0) + b"pipe\0")
    assert guest.try_(Op.OPEN, guest.look_up("pipe"), struct.pack("<II", 0, 0))[0] == errno.EINVAL


def test_what_is_forgotten_is_closed(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    node = guest.look_up("hello")
    assert guest.look_up("hello") == node
    assert len(guest.server._tree) == 2
    header = abi.IN_HEADER.pack(48, Op.FORGET, 99, node, 0, 0, 0, 0)
    guest.driver.put([header + abi.FORGET_IN.pack(1)], queue=0)
    guest.driver.kick(0)
    assert len(guest.driver.collect(0)) == 1  # without an answer
    assert guest.ask(Op.GETATTR, node, bytes(16))
    header = abi.IN_HEADER.pack(64, Op.BATCH_FORGET, 99, 0, 0, 0, 0, 0)
    guest.driver.put([header + abi.BATCH_FORGET_IN.pack(1, 0) + abi.FORGET_ONE.pack(node, 1)], queue=0)
    guest.driver.kick(0)
    assert guest.try_(Op.GETATTR, node, bytes(16))[0] == errno.ESTALE
    assert len(guest.server._tree) == 1


def test_files_that_are_known_are_bounded(stack: ExitStack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_NODES", 2)
    guest = Guest(stack, folder)
    guest.look_up("hello")
    assert guest.try_(Op.LOOKUP, 1, b"sub\0")[0] == errno.ENFILE


@pytest.mark.parametrize("op", [*range(60), 4096, 0xFFFF_FFFF])
def test_messages_cut_short_are_answered(stack: ExitStack, folder: Path, op: int) -> None:
    guest = Guest(stack, folder)
    if op in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):
        return
    for body in (b"", b"\0", b"abc", bytes(15), b"\xff" * 40, b"\xff" * 200):
        error, _ = guest.try_(op, 1, body)
        assert error or op in (Op.GETATTR, Op.OPEN, Op.OPENDIR, Op.STATFS, Op.FLUSH, Op.DESTROY, Op.INIT, Op.SETATTR)
    assert not guest.driver.needs_reset


@pytest.mark.parametrize(
    ("readable", "writable"), [([bytes(39)], [100]), ([bytes(40)], [15]), ([bytes(40)], []), ([], [99])]
)
def test_what_is_no_message_stops_the_device(
    stack: ExitStack, folder: Path, readable: list[bytes], writable: list[int]
) -> None:
    guest = Guest(stack, folder)
    guest.driver.put(readable, writable, queue=REQUESTS)
    guest.driver.kick(REQUESTS)
    assert guest.driver.needs_reset


def test_a_message_that_is_too_long(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    guest.driver.put([bytes(MAX_MESSAGE + 1)], [100], queue=REQUESTS)
    guest.driver.kick(REQUESTS)
    assert guest.driver.needs_reset


def test_a_server_that_dies(stack: ExitStack) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device = Fs("shared", ours.detach())
    driver = FakeDriver(device)
    stack.callback(driver.loop.close)
    for _ in range(3):
        driver.put([abi.IN_HEADER.pack(40, Op.STATFS, 7, 1, 0, 0, 0, 0)], [16, 80], queue=REQUESTS)
    driver.kick(REQUESTS)
    theirs.close()
    driver.spin()
    assert [abi.OUT_HEADER.unpack(done.data) for done in driver.collect(REQUESTS)] == [(16, -errno.EIO, 7)] * 3
    assert (
        driver.send([abi.IN_HEADER.pack(40, Op.STATFS, 8, 1, 0, 0, 0, 0)], [16, 80], queue=REQUESTS)[:4]
        == b"\x10\0\0\0"
    )
    assert driver.loop._epoll.poll(0) == []


def test_more_requests_than_the_server_takes(stack: ExitStack) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.enter_context(theirs)
    device = Fs("shared", ours.detach())
    driver = FakeDriver(device, memory_size=64 << 20)
    stack.callback(driver.loop.close)
    stack.callback(device.close)
    big = bytes(100_000)
    for unique in range(20):
        driver.put([abi.IN_HEADER.pack(40, Op.WRITE, unique, 1, 0, 0, 0, 0), big], [16, 8], queue=REQUESTS)
    driver.kick(REQUESTS)
    assert driver.loop._epoll.poll(0) == []
    answered: list[int] = []
    while len(answered) < 20:
        assert select.select([theirs], [], [], 5)[0]
        message = theirs.recv(200_000)
        theirs.send(abi.OUT_HEADER.pack(24, 0, abi.IN_HEADER.unpack_from(message)[2]) + bytes(8))
        driver.spin()
        answered += [abi.OUT_HEADER.unpack_from(done.data)[2] for done in driver.collect(REQUESTS)]
    assert answered == list(range(20))


def test_answers_after_a_reset_are_dropped(stack: ExitStack) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.enter_context(theirs)
    device = Fs("shared", ours.detach())
    driver = FakeDriver(device)
    stack.callback(driver.loop.close)
    stack.callback(device.close)
    driver.put([abi.IN_HEADER.pack(40, Op.STATFS, 1, 1, 0, 0, 0, 0)], [16, 80], queue=REQUESTS)
    driver.kick(REQUESTS)
    theirs.recv(100)
    driver.start()
    request = driver.put([abi.IN_HEADER.pack(40, Op.STATFS, 2, 1, 0, 0, 0, 0)], [16, 80], queue=REQUESTS)
    driver.kick(REQUESTS)
    theirs.recv(100)
    theirs.send(abi.OUT_HEADER.pack(16, 0, 1))
    driver.spin()
    assert driver.collect(REQUESTS) == []
    theirs.send(abi.OUT_HEADER.pack(16, 0, 2))
    driver.spin()
    assert [(d.head, d.data[8]) for d in driver.collect(REQUESTS)] == [(request.head, 2)]


def test_quiesce_waits_for_the_answers(stack: ExitStack, folder: Path) -> None:
    guest = Guest(stack, folder)
    guest.driver.put([abi.IN_HEADER.pack(40, Op.STATFS, 9, 1, 0, 0, 0, 0)], [16, 80], queue=REQUESTS)
    guest.driver.transport.notify(REQUESTS)
    guest.device.quiesce()
    assert guest.device.metrics()["pending"] == 0
    assert len(guest.driver.collect(REQUESTS)) == 1


def test_the_server_is_a_program(folder: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    argv = [sys.executable, "-I", "-S", str(main.__file__), str(fd), str(theirs.fileno()), "ro"]
    with ours, subprocess.Popen(argv, pass_fds=(fd, theirs.fileno())) as program:
        theirs.close()
        os.close(fd)
        ours.settimeout(10)
        ours.send(abi.IN_HEADER.pack(46, Op.LOOKUP, 5, 1, 0, 0, 0, 0) + b"hello\0")
        answer = ours.recv(4096)
        assert abi.OUT_HEADER.unpack_from(answer) == (144, 0, 5)
        ours.close()
        assert program.wait(10) == 0
