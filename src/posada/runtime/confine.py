"""What a process gives up before it comes near a guest. Each step is a system call or two; all raise OSError."""

from __future__ import annotations

import ctypes
import os
import resource

PR_SET_NO_NEW_PRIVS = 38
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

# Loaded at import: between fork and exec there is nothing but system calls.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def limit(nofile: int) -> None:
    """At most so many open descriptors, no core files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = nofile if hard == resource.RLIM_INFINITY else min(nofile, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def expendable() -> None:
    """A guest goes before the host's own services when memory runs out. Best effort."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("200")
    except OSError:
        pass


def become(uid: int, groups: list[int]) -> None:
    """Another user, for good: real, effective and saved, and its group of the same number."""
    os.setgroups(groups)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    if _prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def readable_by_own_user() -> None:
    """Where Yama lets only a parent read a process's memory: let all of the same uid. EINVAL: there is no Yama."""
    _prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
