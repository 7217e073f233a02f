"""The server of a folder as a process: what is left of the host in its jail, and that it still serves."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posada.vmm.folder import abi, jail, main
from posada.vmm.folder.abi import Op
from posada.vmm.jail import policy

SRC = str(Path(__file__).parents[2] / "src")
root = os.geteuid() == 0
landlock = jail._libc.syscall(jail._CREATE_RULESET, None, 0, jail._VERSION) >= 2

PRELUDE = f"""
import os, sys, errno, ctypes, socket
package = type(sys)("posada")
package.__path__ = [{SRC + "/posada"!r}]
sys.modules["posada"] = package
from posada.vmm.folder import jail
folder = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
outside = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECTORY)

def refused(call, *args, **named):
    try:
        call(*args, **named)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "allowed"
"""


def run(folder: Path, code: str) -> str:
    words = [sys.executable, "-I", "-S", "-c", PRELUDE + code, str(folder), str(folder.parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


@pytest.mark.skipif(not landlock, reason="the kernel has no Landlock")
def test_even_an_open_directory_outside_is_of_no_use(folder: Path) -> None:
    """As if the server had been taken over, and had found a descriptor."""
    said = run(
        folder,
        "jail.enter(folder, readonly=False)\n"
        "print(refused(os.open, 'secret', os.O_RDONLY, dir_fd=outside))\n"
        "print(refused(os.open, 'secret', os.O_RDWR, dir_fd=outside))\n"
        "print(refused(os.unlink, 'secret', dir_fd=outside))\n"
        "print(refused(os.mkdir, 'new', dir_fd=outside))\n"
        "print(refused(os.rename, 'hello', 'there', src_dir_fd=folder, dst_dir_fd=outside))\n"
        "print(refused(os.open, 'hello', os.O_RDWR, dir_fd=folder))\n"
        "print(refused(os.rename, 'hello', 'sub/moved', src_dir_fd=folder, dst_dir_fd=folder))\n",
    )
    *outside, inside, moved = said.split()
    assert set(outside) <= {"EACCES", "EXDEV"} and len(outside) == 5
    assert (inside, moved) == ("allowed", "allowed")
    assert (folder.parent / "secret").read_text() == "not yours"


@pytest.mark.skipif(not landlock, reason="the kernel has no Landlock")
def test_read_only_is_the_kernels_word(folder: Path) -> None:
    said = run(
        folder,
        "jail.enter(folder, readonly=True)\n"
        "print(refused(os.open, 'hello', os.O_RDONLY, dir_fd=folder))\n"
        "print(refused(os.open, 'hello', os.O_RDWR, dir_fd=folder))\n"
        "print(refused(os.unlink, 'hello', dir_fd=folder))\n"
        "print(refused(os.mkdir, 'new', dir_fd=folder))\n"
        "print(refused(os.symlink, 'x', 'new', dir_fd=folder))\n",
    )
    assert said.split() == ["allowed", "EACCES", "EACCES", "EACCES", "EACCES"]
    assert (folder / "hello").read_text() == "hello, guest"


@pytest.mark.skipif(not policy.SUPPORTED, reason="the filters are for x86-64")
def test_calls_that_are_refused_and_that_are_death(folder: Path) -> None:
    said = run(
        folder,
        "jail.enter(folder, readonly=False)\n"
        "print(refused(socket.socket), refused(os.getpgid, 1), refused(os.pipe2, 0), flush=True)\n",
    )
    assert said.split() == ["EPERM", "EPERM", "EPERM"]
    for call in ("os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 0)", "os.chroot('.')", "os.setuid(0)"):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            run(folder, f"jail.enter(folder, readonly=False)\n{call}")
        assert caught.value.returncode == -31, call


class Served:
    """A server in its jail, spoken to as the monitor does."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        argv = [sys.executable, "-I", "-S", str(main.__file__), str(fd), str(theirs.fileno()), mode]
        done = subprocess.run(argv, pass_fds=(fd, theirs.fileno()), capture_output=True, timeout=30)
        assert done.returncode == 0, done.stderr
        self.pid = next(pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _holds(pid, theirs))
        theirs.close()
        os.close(fd)

    def fork(self) -> Served:
        """What serves the fork of a guest."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(10)
        self.sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, theirs.fileno().to_bytes(4, sys.byteorder))])
        twin = Served.__new__(Served)
        twin.sock = ours
        assert twin.ask(Op.STATFS, 1, b"")[0] == 0
        twin.pid = next(pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _holds(pid, theirs))
        theirs.close()
        return twin

    def ask(self, op: Op, node: int, body: bytes) -> tuple[int, bytes]:
        self.sock.send(abi.IN_HEADER.pack(40 + len(body), op, 5, node, 7, 8, 1, 0) + body)
        answer = self.sock.recv(200_000)
        return -abi.OUT_HEADER.unpack_from(answer)[1], answer[16:]

    def status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _holds(pid: int, sock: socket.socket) -> bool:
    mine = os.fstat(sock.fileno()).st_ino
    try:
        held = [os.stat(f"/proc/{pid}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return pid != os.getpid() and mine in held


@pytest.fixture(params=["rw", "ro"])
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    if root:
        os.chown(folder, 1234, 1235)
    found = Served(folder, request.param)
    ended = os.pidfd_open(found.pid)
    yield found
    found.sock.close()
    assert select.select([ended], [], [], 10)[0], "the server outlives its monitor"
    os.close(ended)


def test_what_the_process_has_given_up(served: Served, folder: Path) -> None:
    status = served.status()
    assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
    assert status["PPid"] != str(os.getpid())
    files = {os.readlink(f"/proc/{served.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{served.pid}/fd")}
    assert {name for name in files if not name.startswith("socket:")} == {"/dev/null", str(folder)}
    if root:  # it acts for the folder's owner
        assert status["Uid"].split() == ["1234"] * 4 and status["Gid"].split() == ["1235"] * 4
        assert status["Groups"] == "" and os.readlink(f"/proc/{served.pid}/root") == str(folder)


def test_it_serves(served: Served, folder: Path) -> None:
    error, entry = served.ask(Op.LOOKUP, 1, b"hello\0")
    assert error == 0
    (node, *_) = abi.ENTRY.unpack_from(entry)
    error, opened = served.ask(Op.OPEN, node, abi.OPEN_IN.pack(os.O_RDONLY, 0))
    assert error == 0
    handle, *_ = abi.OPEN_OUT.unpack(opened)
    assert served.ask(Op.READ, node, abi.READ_IN.pack(handle, 0, 100, 0, 0, 0, 0)) == (0, b"hello, guest")
    error, _ = served.ask(Op.MKDIR, 1, abi.MKDIR_IN.pack(0o755, 0) + b"made\0")
    assert (error == 0) is (folder / "made").is_dir()
    error, opened = served.ask(Op.OPENDIR, 1, abi.OPEN_IN.pack(0, 0))
    handle, *_ = abi.OPEN_OUT.unpack(opened)
    error, listed = served.ask(Op.READDIR, 1, abi.READ_IN.pack(handle, 0, 4096, 0, 0, 0, 0))
    assert error == 0 and b"hello" in listed and b"sub" in listed


def test_a_fork_of_the_guest_gets_a_server_of_its_own(folder: Path) -> None:
    """With all that is open in it, of which each closes its own."""
    served = Served(folder, "rw")
    node = abi.ENTRY.unpack_from(served.ask(Op.LOOKUP, 1, b"hello\0")[1])[0]
    handle = abi.OPEN_OUT.unpack(served.ask(Op.OPEN, node, abi.OPEN_IN.pack(os.O_RDWR, 0))[1])[0]
    (folder / "hello").unlink()
    twin = served.fork()
    with twin.sock, served.sock:
        assert served.ask(Op.RELEASE, node, abi.RELEASE_IN.pack(handle, 0, 0, 0)) == (0, b"")
        assert twin.ask(Op.READ, node, abi.READ_IN.pack(handle, 0, 100, 0, 0, 0, 0)) == (0, b"hello, guest")
        assert served.ask(Op.READ, node, abi.READ_IN.pack(handle, 0, 100, 0, 0, 0, 0))[0] == errno.EBADF
        assert twin.pid != served.pid and twin.status()["Seccomp"] == "2"
        ends = {pid: os.pidfd_open(pid) for pid in (served.pid, twin.pid)}
        served.sock.close()
        assert select.select([ends[served.pid]], [], [], 10)[0]
        grandchild = twin.fork()
        assert twin.ask(Op.LOOKUP, 1, b"sub\0")[0] == 0  # it outlives the one it comes from
        grandchild.sock.close()
        twin.sock.close()
        assert select.select([ends[twin.pid]], [], [], 10)[0]
        for end in ends.values():
            os.close(end)


@pytest.mark.skipif(not root, reason="needs root")
def test_a_folder_of_roots_is_served_by_root_with_three_capabilities(folder: Path) -> None:
    (folder / "hello").chmod(0o600)
    os.chown(folder / "hello", 4321, 4321)
    served = Served(folder, "rw")
    try:
        assert int(served.status()["CapEff"], 16) == 0b1011
        assert served.ask(Op.MKDIR, 1, abi.MKDIR_IN.pack(0o755, 0) + b"made\0")[0] == 0
        assert ((folder / "made").stat().st_uid, (folder / "made").stat().st_gid) == (7, 8)
        node = abi.ENTRY.unpack_from(served.ask(Op.LOOKUP, 1, b"hello\0")[1])[0]
        assert served.ask(Op.OPEN, node, abi.OPEN_IN.pack(os.O_RDWR, 0))[0] == 0
    finally:
        served.sock.close()


def test_a_server_that_cannot_be_says_why(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    argv = [sys.executable, "-I", "-S", str(main.__file__), str(fd), str(theirs.fileno()), "rw"]
    with ours, theirs:
        done = subprocess.run(argv, pass_fds=(fd, theirs.fileno()), capture_output=True, timeout=30, text=True)
    os.close(fd)
    assert done.returncode == 1 and "Not a directory" in done.stderr
