"""Leaving the host: an empty root, no network, nobody else's names; another user.

unshare(2), pivot_root(2), mount_namespaces(7), user_namespaces(7). All by ctypes: Python has these from 3.12 on.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET, _NEWCGROUP = (
    0x0002_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x4000_0000, 0x0200_0000,
)  # fmt: skip
#: No pid namespace: it dies with its first process, and forks outlive the machine they come from.
_EACH = {"net": _NEWNET, "ipc": _NEWIPC, "uts": _NEWUTS, "cgroup": _NEWCGROUP}

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_MOVE, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 8192, 16384, 1 << 18,
)  # fmt: skip
_LOCKED = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_MNT_DETACH = 2
_SYS_PIVOT_ROOT, _SYS_CAPSET = 155, 126
_CAPABILITY_VERSION_3 = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def enter(root: int) -> list[str]:
    """Go into namespaces of our own and an empty root. Returns what could be had; the single thread's business.

    ``root``: descriptor of an empty directory, for hosts that give us no mount namespace; or -1. Never raises OSError.
    """
    done: list[str] = []
    if os.geteuid() and _own_user():
        done.append("user")
    for name, flag in _EACH.items():
        if _libc.unshare(flag) == 0:
            done.append(name)
    try:
        _check(_libc.unshare(_NEWNS), "unshare")
        _empty_root()
        done.append("mount")
    except OSError:
        if root >= 0 and _chroot(root):
            done.append("chroot")
    return done


def _own_user() -> bool:
    """A user namespace in which we are who we were, and may make the others. Not where the host forbids it."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_NEWUSER):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _empty_root() -> None:
    """An empty, read-only file system in place of the host's, on a mount point that every host has."""
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount private")
    _check(_libc.mount(b"posada", b"/proc", b"tmpfs", _LOCKED, b"size=4k,nr_inodes=2,mode=555"), "mount tmpfs")
    os.chdir("/proc")
    if _libc.syscall(_SYS_PIVOT_ROOT, b".", b".") == 0:
        # The old root lies over the new one (pivot_root(2), "pivot_root(".", ".")").
        _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    else:  # the root is an initramfs, which cannot be left: cover it
        _check(_libc.mount(b".", b"/", None, _MS_MOVE, None), "mount move")
        os.chroot(".")
    os.chdir("/")
    _check(_libc.mount(None, b"/", None, _MS_REMOUNT | _MS_RDONLY | _LOCKED, None), "mount read-only")


def _chroot(root: int) -> bool:
    try:
        os.fchdir(root)
        os.chroot(".")
        os.chdir("/")
    except OSError:
        return False
    return True


def drop_capabilities(but: Iterable[int] = ()) -> None:
    """All of them ``but`` a few (capabilities(7), below 32), in whichever user namespace. Raises OSError."""
    kept = sum(1 << number for number in but)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    some = (ctypes.c_uint32 * 6)(kept, kept)  # effective, permitted, inheritable; then the same of those from 32 on
    # SAFETY: struct __user_cap_header_struct and two __user_cap_data_struct, of capset(2); both outlive the call.
    _check(_libc.syscall(_SYS_CAPSET, ctypes.byref(header), ctypes.byref(some)), "capset")
