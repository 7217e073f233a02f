"""What the monitor's threads may ask of the kernel. x86-64 numbers (arch/x86/entry/syscalls/syscall_64.tbl).

Three answers. *Allowed*: what moves data between a guest and descriptors that are open already, what Python and the C
library need to breathe, and fork. *EPERM*: the rest, because a library that asks for more than it needs is no crime
(a traceback wants to read source files). *Death*: what only somebody asks for who has taken the monitor over.
"""

from __future__ import annotations

import errno
import os

from posada.vmm.jail import bpf
from posada.vmm.jail.bpf import ALLOW, KILL, Argument, Rule

# Data, between descriptors and memory.
_DATA = {
    "read": 0, "write": 1, "close": 3, "lseek": 8, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "sendfile": 40, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "fallocate": 285, "preadv": 295, "pwritev": 296,
    "preadv2": 327, "pwritev2": 328, "copy_file_range": 326, "splice": 275, "fadvise64": 221,
    "fstat": 5, "dup": 32, "dup3": 292, "utimensat": 280, "flock": 73, "fcntl": 72, "close_range": 436,
}  # fmt: skip
# Memory.
_MEMORY = {"munmap": 11, "brk": 12, "mremap": 25, "madvise": 28, "mincore": 27}
# Threads, time, signals: what the interpreter and the C library do by themselves.
_RUNTIME = {
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "nanosleep": 35, "getpid": 39,
    "exit": 60, "gettimeofday": 96, "getrusage": 98, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "set_tid_address": 218,
    "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "tgkill": 234, "set_robust_list": 273, "getrandom": 318, "membarrier": 324, "rseq": 334, "poll": 7, "ppoll": 271,
    "getppid": 110, "sysinfo": 99, "getcpu": 309,
}  # fmt: skip
# The loop, clients, new descriptors of kinds that reach nothing.
LOOP = {
    "epoll_wait": 232, "epoll_ctl": 233, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "accept4": 288, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "timerfd_create": 283,
    "timerfd_settime": 286, "wait4": 61, "pipe2": 293,
}  # fmt: skip

#: Asked once: in the jail nobody answers.
SUPPORTED = os.uname().machine == "x86_64"

_IOCTL, _MMAP, _MPROTECT, _CLONE, _FORK, _PRCTL, _CLONE3 = 16, 9, 10, 56, 57, 157, 435
_NEWFSTATAT = 262
_PROT_EXEC = 4
_AT_EMPTY_PATH = 0x1000
#: linux/sched.h: new namespaces; sharing an interpreter's memory without being its thread is for nobody.
_CLONE_NAMESPACES = 0x7E02_0080
#: The letter of KVM's ioctls (linux/kvm.h), in the second byte of their numbers.
_KVMIO = 0xAE
_FIONBIO, _FIOCLEX, _FIONREAD = 0x5421, 0x5451, 0x541B
#: A tap device's offloads and header (linux/if_tun.h): they follow the driver, and a fork has a new tap.
_TUN = (0x4004_54D0, 0x8004_54D2, 0x4004_54D8, 0x4004_54DC)
_PR_SET_NAME, _PR_SET_SECCOMP, _PR_SET_VMA = 15, 22, 0x5356_4D41

# Nobody does these by mistake.
_DEADLY = {
    "execve": 59, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kill": 62,
    "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "pidfd_getfd": 438,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "move_mount": 429,
    "open_tree": 428, "fsopen": 430, "init_module": 175, "finit_module": 313, "delete_module": 176,
    "kexec_load": 246, "kexec_file_load": 320, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "io_uring_setup": 425, "setuid": 105, "setgid": 106, "setreuid": 113, "setregid": 114, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capset": 126, "iopl": 172, "ioperm": 173,
    "keyctl": 250, "add_key": 248, "request_key": 249, "quotactl": 179, "swapon": 167, "reboot": 169,
    "open_by_handle_at": 304,
}  # fmt: skip


def common() -> list[Rule]:
    """What every process beside a guest may do, and what none may."""
    hot = [
        Rule(_IOCTL, tests=(Argument(1, _KVMIO << 8, 0xFF00),)),
        Rule(_IOCTL, tests=(Argument(1, _FIONBIO),)),
        Rule(_IOCTL, tests=(Argument(1, _FIOCLEX),)),
        Rule(_IOCTL, tests=(Argument(1, _FIONREAD),)),
        *(Rule(_IOCTL, tests=(Argument(1, number),)) for number in _TUN),
    ]
    memory = [
        # No memory is ever both made by us and run as code.
        Rule(_MMAP, tests=(Argument(2, 0, _PROT_EXEC),)),
        Rule(_MPROTECT, tests=(Argument(2, 0, _PROT_EXEC),)),
    ]
    asked = [
        # fstat(3) of newer C libraries; with an empty path it is of a descriptor.
        Rule(_NEWFSTATAT, tests=(Argument(3, _AT_EMPTY_PATH, _AT_EMPTY_PATH),)),
        Rule(_PRCTL, tests=(Argument(0, _PR_SET_NAME),)),
        Rule(_PRCTL, tests=(Argument(0, _PR_SET_VMA),)),
        Rule(_PRCTL, tests=(Argument(0, _PR_SET_SECCOMP),)),  # only ever takes away
    ]
    plain = [Rule(number) for names in (_DATA, _MEMORY, _RUNTIME) for number in names.values()]
    deadly = [Rule(number, KILL) for number in _DEADLY.values()]
    return [*hot, *memory, *asked, *plain, *deadly]


def forking() -> list[Rule]:
    """For who may fork, and start threads: what `common` leaves is refused without them."""
    return [
        Rule(_CLONE, tests=(Argument(0, 0, _CLONE_NAMESPACES),)),
        Rule(_CLONE, KILL),
        # Its flags lie in memory, where no filter sees them. Told that there is none, the C library takes clone(2).
        Rule(_CLONE3, bpf.errno(errno.ENOSYS)),
    ]


def main_thread() -> bytes:
    """The loop's thread: it also serves sockets, starts vcpu threads, and forks."""
    loop = [Rule(number) for number in LOOP.values()]
    return bpf.assemble([*common(), *loop, *forking()], bpf.errno(errno.EPERM))


def vcpu_thread() -> bytes:
    """A vcpu's thread runs the guest and devices' registers: no new processes, threads or connections."""
    allowed = [Rule(number, ALLOW) for name, number in LOOP.items() if name in _VCPU_LOOP]
    return bpf.assemble([*common(), *allowed], bpf.errno(errno.EPERM))


#: What a device may do when the guest writes one of its registers: send, wake the loop, change what it waits for.
_VCPU_LOOP = frozenset({"epoll_ctl", "eventfd2", "sendto", "sendmsg", "recvfrom", "recvmsg", "shutdown"})
