"""What the child does between fork and exec: give up everything QEMU does not need."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import fcntl
import os

from posada.runtime import confine

#: Above every descriptor QEMU is given, so that moving them into place never overwrites one that is still to be moved.
_PARKING = 1024


class Confinement:
    """How QEMU is confined. ``uid`` None: stay who we are (rootless)."""

    def __init__(self, *, uid: int | None, groups: list[int], nofile: int, fds: dict[int, int]) -> None:
        self.uid = uid
        self.groups = groups
        self.nofile = nofile
        self.fds = fds
        self.report = -1

    def enter(self, stderr: int, report: int) -> None:
        """In the child. Raises OSError; ``report`` (moved out of the way) and ``stderr`` survive, all else is closed.

        Returns with stdin on /dev/null, stdout and stderr on ``stderr``, and each descriptor of ``fds`` at its number.
        """
        confine.limit(self.nofile)
        self._place(stderr, report)
        os.umask(0o077)
        confine.expendable()
        if self.uid is not None:
            confine.become(self.uid, self.groups)
        else:
            # A later posada process must be able to read a child's memory (fork of a fork), and has the same uid anyway.
            confine.readable_by_own_user()
        confine.no_new_privileges()
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
