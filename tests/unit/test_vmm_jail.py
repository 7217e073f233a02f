"""The jail, in processes that go into it: what is gone, what still works, above all fork and threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posada.vmm.jail import bpf, policy
from posada.vmm.jail.bpf import ALLOW, Argument, Rule

SRC = str(Path(__file__).parents[2] / "src")

pytestmark = pytest.mark.skipif(not policy.SUPPORTED, reason="the filters are for x86-64")

PRELUDE = f"""
import os, sys, errno, threading, ctypes, time, fcntl, mmap, signal
package = type(sys)("posada")
package.__path__ = [{SRC + "/posada"!r}]
sys.modules["posada"] = package
from posada.vmm import jail
from posada.vmm.config import JailConfig
libc = ctypes.CDLL(None, use_errno=True)

def refused(call, *args):
    try:
        call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "allowed"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-I", "-S", "-c", PRELUDE + code]
    return subprocess.run(words, capture_output=True, text=True, timeout=30)


def test_in_the_jail_there_is_nothing_to_open_or_to_talk_to() -> None:
    done = run(
        """
root = os.getuid() == 0
had = jail.enter(JailConfig(uid=1_900_000_007 if root else -1))
print(sorted(os.listdir("/")) if "mount" in had else [])
print(os.getuid(), os.geteuid(), os.getgid(), os.getgroups() if root else [])
jail.lock_main(JailConfig())
print(refused(os.open, "/etc/passwd", os.O_RDONLY))
import _socket
print(refused(_socket.socket, _socket.AF_INET, _socket.SOCK_STREAM))
print(refused(os.listdir, "/"))
print(refused(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_EXEC))
print(",".join(had))
"""
    )
    assert done.returncode == 0, done.stderr
    files, who, *refusals, had = done.stdout.splitlines()
    assert files == "[]"
    if os.getuid() == 0:
        assert who == "1900000007 1900000007 1900000007 []"
        assert "no capabilities" in had
    assert set(refusals) == {"EPERM"}


def test_in_the_jail_one_can_fork_and_start_threads() -> None:
    done = run(
        """
signal.signal(signal.SIGUSR1, lambda *_: None)
jail.enter(JailConfig(uid=1_900_000_007 if os.getuid() == 0 else -1))
jail.lock_main(JailConfig())

def work(out):
    jail.lock_vcpu(JailConfig())
    out.append(refused(os.fork))
    time.sleep(60)  # until the signal

def machine(depth):
    out = []
    thread = threading.Thread(target=work, args=(out,), daemon=True)
    thread.start()
    while not out:
        time.sleep(0.001)
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    reader, writer = os.pipe()
    os.close(reader), os.close(writer)
    os.write(1, f"{depth} {out}\\n".encode())
    if depth < 2:
        pid = os.fork()
        if pid == 0:
            machine(depth + 1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
machine(0)
os.write(1, b"done\\n")
os._exit(0)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{depth} ['EPERM']" for depth in range(3)] + ["done"]


@pytest.mark.parametrize(
    "deed",
    [
        'os.execv("/bin/true", ["true"])',
        "os.kill(os.getppid(), 0)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.unshare(0x10000000)",
        'os.chroot("/")',
        "libc.syscall(425, 1, 0)",
        "libc.setresuid(0, 0, 0)",
        "libc.syscall(56, 0x10000011, 0, 0, 0, 0)",  # clone into a new user namespace
        "libc.syscall(0x40000000 + 39)",  # the x32 ABI
    ],
)
def test_what_only_a_takeover_asks_for_is_death(deed: str) -> None:
    done = run(f"jail.enter(JailConfig(namespaces=False))\njail.lock_main(JailConfig())\n{deed}\nprint('lives')")
    assert done.returncode == -signal.SIGSYS, (done.stdout, done.stderr)


def test_a_traceback_in_the_jail_is_still_printed() -> None:
    done = run("jail.enter(JailConfig())\njail.lock_main(JailConfig())\nraise ValueError('so it ends')")
    assert done.returncode == 1
    assert "ValueError: so it ends" in done.stderr


def evaluate(program: bytes, number: int, *arguments: int, arch: int = 0xC000003E) -> int:
    """What the kernel would do, by the few instructions we use."""
    import struct

    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("<HBBI", program))
    at, value = 0, 0
    while True:
        op, true, false, k = code[at]
        at += 1
        if op == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
        elif op == 0x54:
            value &= k
        elif op == 0x15:
            at += true if value == k else false
        elif op == 0x35:
            at += true if value >= k else false
        elif op == 0x06:
            return int(k)


def test_the_first_rule_that_fits_decides() -> None:
    rules = [
        Rule(5, tests=(Argument(0, 1), Argument(1, 0x200, 0xFF00))),
        Rule(5, bpf.errno(2), tests=(Argument(0, 1),)),
        Rule(7),
        Rule(5, bpf.KILL),
    ]
    program = bpf.assemble(rules, bpf.errno(1))
    assert evaluate(program, 5, 1, 0x2AA) == ALLOW
    assert evaluate(program, 5, 1, 0x3AA) == bpf.errno(2)
    assert evaluate(program, 5, 2, 0x2AA) == bpf.KILL
    assert evaluate(program, 7, 5) == ALLOW
    assert evaluate(program, 6) == bpf.errno(1)
    assert evaluate(program, 7, arch=0x40000003) == bpf.KILL
    assert evaluate(program, 7 | 0x40000000) == bpf.KILL


@pytest.mark.parametrize("program", [policy.main_thread(), policy.vcpu_thread()], ids=["main", "vcpu"])
def test_no_thread_opens_connects_or_executes(program: bytes) -> None:
    for number in (2, 257, 437, 85, 41, 42, 49, 53, 59, 86, 87, 82, 90, 92):  # open… socket, connect, bind, execve …
        assert evaluate(program, number) != ALLOW
    assert evaluate(program, 16, 3, 0xAE80) == ALLOW  # KVM_RUN
    assert evaluate(program, 16, 3, 0x5412) != ALLOW  # TIOCSTI
    assert len(program) // 8 < 4096, "BPF_MAXINSNS"
