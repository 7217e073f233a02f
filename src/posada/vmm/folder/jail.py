"""What the server of a folder gives up before the first message: all of the host but the folder.

In order: the folder becomes its root (only root may do that), it becomes the folder's owner, or stays root with three
capabilities; Landlock (where the kernel has it) ties every open, make and remove to the folder, and to reading where it
is read-only; seccomp leaves the calls on files that the protocol needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from posada.runtime import confine
from posada.vmm.jail import bpf, policy
from posada.vmm.jail.bpf import Rule
from posada.vmm.jail.namespaces import drop_capabilities

# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 12
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_READ = _READ_FILE | _READ_DIR
_CHANGE = (
    _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_SYM | _REFER
    | _TRUNCATE
)  # fmt: skip
#: How many rights each version knows; the first cannot let files be moved between directories, and is not used.
_RIGHTS = {2: 14, 3: 15, 4: 15, 5: 16}

#: capabilities(7): files of any owner, as the root of a root-owned folder has them. Not CAP_FSETID: a write by the guest
#: must take a set-uid bit away.
_CHOWN, _DAC_OVERRIDE, _FOWNER = 0, 1, 3

#: Beside those of the monitor that move data (`posada.vmm.jail.policy`). Never a path of more than one component: `tree`.
_FILES = {
    "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "readlinkat": 267, "renameat2": 316, "fchmod": 91, "getdents64": 217,
    "fstatfs": 138, "statx": 332,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def enter(folder: int, *, readonly: bool) -> None:
    """``folder``: descriptor of the directory. No thread may have been started. Raises OSError."""
    owner = os.fstat(folder)
    if os.geteuid() == 0:
        os.fchdir(folder)
        os.chroot(".")
        if owner.st_uid:
            os.setgroups([])
            os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
            os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    confine.no_new_privileges()
    _landlock(folder, _READ if readonly else _READ | _CHANGE)
    drop_capabilities((_CHOWN, _DAC_OVERRIDE, _FOWNER) if os.geteuid() == 0 else ())
    if policy.SUPPORTED:
        bpf.install(_filter())


def _landlock(folder: int, rights: int) -> None:
    """Nothing, where the kernel has none of it (or the host has switched it off)."""
    version = _libc.syscall(_CREATE_RULESET, None, 0, _VERSION)
    if version < 2:
        return
    handled = (1 << _RIGHTS[min(version, max(_RIGHTS))]) - 1
    attributes = ctypes.create_string_buffer(struct.pack("<Q", handled))
    # SAFETY: struct landlock_ruleset_attr, of which the first 8 bytes are given; it outlives the call.
    ruleset = _libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), 8, 0)
    _check(ruleset, "landlock_create_ruleset")
    try:
        rule = ctypes.create_string_buffer(struct.pack("<Qi", rights & handled, folder))
        # SAFETY: struct landlock_path_beneath_attr (packed: 12 bytes); it outlives the call.
        _check(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0), "landlock_add_rule")
        _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _filter() -> bytes:
    """Files, the socket, memory, fork. What only an attacker asks for is death, as in the monitor."""
    rules = [*policy.common(), *(Rule(number) for number in _FILES.values())]
    others = [Rule(policy.LOOP[name]) for name in ("sendto", "sendmsg", "recvfrom", "recvmsg", "getsockname", "wait4")]
    return bpf.assemble([*rules, *others, *policy.forking()], bpf.errno(errno.EPERM))
