"""What the child does between fork and exec: give up everything QEMU does not need."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import ctypes
import fcntl
import os
import resource

PR_SET_NO_NEW_PRIVS = 38
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

#: Above every descriptor QEMU is given, so that moving them into place never overwrites one that is still to be moved.
_PARKING = 1024


class Confinement:
    """How QEMU is confined. ``uid`` None: stay who we are (rootless)."""

    def __init__(self, *, uid: int | None, groups: list[int], nofile: int, fds: dict[int, int]) -> None:
        self.uid = uid
        self.groups = groups
        self.nofile = nofile
        self.fds = fds
        # Loaded before fork: nothing but system calls happens in the child.
        self.report = -1
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def enter(self, stderr: int, report: int) -> None:
        """In the child. Raises OSError; ``report`` (moved out of the way) and ``stderr`` survive, all else is closed.

        Returns with stdin on /dev/null, stdout and stderr on ``stderr``, and each descriptor of ``fds`` at its number.
        """
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = self.nofile if hard == resource.RLIM_INFINITY else min(self.nofile, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._place(stderr, report)
        os.umask(0o077)
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("200")  # a guest goes before the host's own services
        except OSError:
            pass
        if self.uid is not None:
            os.setgroups(self.groups)
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        else:
            # Under Yama only a parent may read another process's memory. A later posada process must be able to (fork
            # of a fork), and has the same uid anyway. EINVAL: there is no Yama.
            self._prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
        if self._prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
        # Python ignores these two, and ignored signals survive exec.
        _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
        _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
        for number in (_signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, _signal.SIG_DFL)

    def _place(self, stderr: int, report: int) -> None:
        parked = {target: fcntl.fcntl(source, fcntl.F_DUPFD, _PARKING) for source, target in self.fds.items()}
        out = fcntl.fcntl(stderr, fcntl.F_DUPFD, _PARKING)
        null = os.open("/dev/null", os.O_RDWR)
        last = max(self.fds.values(), default=2) + 1
        os.dup2(report, last, inheritable=False)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for target, source in parked.items():
            os.dup2(source, target)
        os.closerange(last + 1, _PARKING * 64)
        self.report = last
