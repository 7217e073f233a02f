"""Guest memory: copies, seals, files, and the private pages of another process."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posada.engine.qemu import mirror, pages, ram
from posada.engine.qemu.mapping import Mapping
from posada.errors import EngineError, HostError, ImageError

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def new() -> Iterator[Callable[[], int]]:
    """Makes memfds that are closed again."""
    made: list[int] = []

    def make(size: int = SIZE) -> int:
        made.append(ram.create(size))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def fill(fd: int, *pieces: tuple[int, bytes]) -> None:
    for offset, data in pieces:
        os.pwrite(fd, data, offset)


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0)


def test_a_copy_is_equal_and_as_sparse(new: Callable[[], int]) -> None:
    source, target = new(), new()
    fill(source, (0, b"a" * 5000), (4 * MIB + 100, b"b"), (SIZE - 1, b"z"))
    copied = ram.copy(source, target)
    assert content(target) == content(source)
    assert copied == sum(end - start for start, end in ram.extents(source)) < MIB
    assert list(ram.extents(target)) == list(ram.extents(source))


def test_an_empty_memory_has_no_extents(new: Callable[[], int]) -> None:
    assert list(ram.extents(new())) == []


def test_nobody_changes_a_sealed_memory(new: Callable[[], int]) -> None:
    fd = new()
    fill(fd, (0, b"kept"))
    ram.seal(fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"lost", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    punch_hole_and_keep_size = 3  # the balloon's way
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, punch_hole_and_keep_size, ctypes.c_long(0), ctypes.c_long(MIB)) == -1
    assert ctypes.get_errno() == errno.EPERM
    with pytest.raises(PermissionError):
        Mapping(fd, SIZE, writable=True)
    assert content(fd)[:4] == b"kept"


def test_a_mapped_memory_cannot_be_sealed(new: Callable[[], int]) -> None:
    """So a seal that succeeded means that nobody can write any more."""
    fd = new()
    view = Mapping(fd, SIZE, writable=True)
    with pytest.raises(OSError, match="busy"):
        ram.seal(fd, patience=0.05)
    view.close()
    ram.seal(fd)


def test_a_seal_waits_for_who_still_holds_the_memory(new: Callable[[], int]) -> None:
    fd = new()
    view = Mapping(fd, SIZE, writable=True)
    sealed = threading.Event()
    sealing = threading.Thread(target=lambda: (ram.seal(fd, patience=60), sealed.set()))
    sealing.start()
    assert not sealed.wait(0.3)  # longer than the kernel itself waits
    view.close()
    sealing.join(60)
    assert sealed.is_set()
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"lost", 0)


def test_it_is_saved_and_loaded(new: Callable[[], int], tmp_path: Path) -> None:
    source, target = new(), new()
    fill(source, (MIB, os.urandom(MIB)), (6 * MIB, b"end"))
    written = ram.save(source, tmp_path / "memory", SIZE)
    info = (tmp_path / "memory").stat()
    assert info.st_size == SIZE
    assert written < 2 * MIB
    assert info.st_blocks * 512 < 3 * MIB
    assert info.st_mode & 0o077 == 0
    ram.load(tmp_path / "memory", target, SIZE)
    assert content(target) == content(source)


def test_a_file_of_another_size_is_sealed(new: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(ImageError, match="100 bytes instead of"):
        ram.load(tmp_path / "short", new(), SIZE)
    with pytest.raises(HostError, match="cannot open"):
        ram.load(tmp_path / "none", new(), SIZE)
    (tmp_path / "link").symlink_to(tmp_path / "short")
    with pytest.raises(HostError, match="cannot open"):
        ram.load(tmp_path / "link", new(), SIZE)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="not the memory"):
        ram.load(tmp_path / "fifo", new(), SIZE)


def test_a_save_that_finds_no_space_says_so(new: Callable[[], int]) -> None:
    with pytest.raises(HostError, match="cannot write the guest's memory to"):
        ram.save(new(), Path("/dev/full/memory"), SIZE)


def test_a_mapping_is_not_left(new: Callable[[], int]) -> None:
    view = Mapping(new(), SIZE, writable=False)
    for start, length in ((-1, 1), (0, SIZE + 1), (SIZE, 1), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            view.write_to(new(), start, length)
    view.close()
    with pytest.raises(ValueError, match="not inside"):
        view.populate(0, 1)


PLAYER = """
import mmap, os, sys
fd, shared, size = int(sys.argv[1]), sys.argv[2] == "shared", int(sys.argv[3])
view = mmap.mmap(fd, size, flags=mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
for line in sys.stdin:
    for word in line.split():
        offset, text = word.split("=")
        view[int(offset):int(offset) + len(text)] = text.encode()
    print("ok", flush=True)
"""


class Player:
    """A process that maps guest memory as QEMU does, and writes what it is told."""

    def __init__(self, fd: int, how: str) -> None:
        command = [sys.executable, "-I", "-c", PLAYER, str(fd), how, str(SIZE)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True, bufsize=1
        )

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        assert self.process.stdout.readline() == "ok\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def play() -> Iterator[Callable[[int, str], Player]]:
    made: list[Player] = []

    def start(fd: int, how: str) -> Player:
        made.append(Player(fd, how))
        made[-1].write("")
        return made[-1]

    yield start
    for player in made:
        player.close()


def test_private_pages_are_found_exactly(new: Callable[[], int], play: Callable[[int, str], Player]) -> None:
    base = new()
    fill(base, (0, b"base" * 4096))
    player = play(base, "private")
    assert pages.private(player.process.pid) == []
    player.write(f"100=hello {MIB}=x {MIB + 4096}=y {SIZE - 1}=z")
    found = [(offset, length) for _, offset, length in pages.private(player.process.pid)]
    assert found == [(0, 4096), (MIB, 8192), (SIZE - 4096, 4096)]


def test_both_ways_of_reading_the_page_map_agree(new: Callable[[], int], play: Callable[[int, str], Player]) -> None:
    player = play(new(), "private")
    player.write(" ".join(f"{i * 12288}=x" for i in range(600)))
    (area,) = pages.areas(player.process.pid)
    fd = os.open(f"/proc/{player.process.pid}/pagemap", os.O_RDONLY)
    try:
        slow = pages._read(fd, area)
        assert len(slow) == 600
        try:
            fast = pages._scan(fd, area)
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN (6.7)")
        assert fast == slow
    finally:
        os.close(fd)


def test_a_scan_goes_on_when_its_buffer_is_full(
    new: Callable[[], int], play: Callable[[int, str], Player], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_REGIONS", 7)
    player = play(new(), "private")
    player.write(" ".join(f"{i * 8192}=x" for i in range(100)))
    assert len(pages.private(player.process.pid)) == 100


@pytest.mark.parametrize("how", ["shared", "private"])
def test_a_mirror_is_what_the_process_sees(
    new: Callable[[], int], play: Callable[[int, str], Player], how: str
) -> None:
    base = new()
    fill(base, (0, b"base" * 4096), (5 * MIB, b"more"))
    player = play(base, how)
    player.write(f"3=first {7 * MIB}=early")
    target = new()
    copy = mirror.Mirror(player.process.pid, target, SIZE)
    copy.prepare()
    player.write(f"3=later {2 * MIB}=new")  # between prepare and the pause
    copy.copy()
    copy.close()
    ram.seal(target)
    expected = bytearray(SIZE)
    expected[: 4 * 4096] = b"base" * 4096
    for offset, text in ((5 * MIB, b"more"), (3, b"later"), (7 * MIB, b"early"), (2 * MIB, b"new")):
        expected[offset : offset + len(text)] = text
    assert content(target) == bytes(expected)
    player.write("3=after")
    assert content(target) == bytes(expected)
    if how == "private":
        assert content(base)[:8] == b"basebase"


def test_a_process_without_guest_memory_is_sealed(new: Callable[[], int]) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(EngineError, match="cannot be found"):
            mirror.Mirror(sleeper.pid, new(), SIZE)
        with pytest.raises(EngineError, match="no memory file"):
            ram.of_process(sleeper.pid, SIZE)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_memory_of_another_size_is_not_taken(new: Callable[[], int], play: Callable[[int, str], Player]) -> None:
    player = play(new(), "shared")
    with pytest.raises(EngineError, match="no memory file"):
        ram.of_process(player.process.pid, 2 * SIZE)
