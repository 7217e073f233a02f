"""One keeper: starts a QEMU in its jail, then stays beside it.

Command line: ``key=value…  --  qemu argv…`` (the keys are those of `Job`). On the descriptor ``control`` it answers one
line, ``ok PID START KEEPER_PID KEEPER_START`` or ``error TEXT``, and then waits for the byte ``c`` (commit). If the
client's end closes before that, the client has died or given up, and the machine ends with it. What is not QEMU's own
(console, deadlines, ownership, exit record) is `posada.runtime`, which the kvm engine's monitor uses too.

If the keeper itself is killed, QEMU goes on: its console and second monitor find their peers gone and drop output.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import sys
import time

from posada.engine.qemu.keeper.jail import Confinement
from posada.runtime import ending
from posada.runtime.console import Console, PathLog, Recent
from posada.runtime.deadlines import Deadlines
from posada.runtime.owner import Owner, Starter, open_owner, start_time
from posada.runtime.watch import Poll

STDERR_TAIL = 8 << 10
#: A monitor line longer than this is not one of ours.
MONITOR_LINE = 1 << 20


class Job:
    """What the command line says. Integers unless noted."""

    def __init__(self, words: list[str]) -> None:
        end = words.index("--")
        given = dict(word.split("=", 1) for word in words[:end])
        self.argv = words[end + 1 :]
        self.runtime = given["runtime"]
        """Path of the machine's runtime directory."""
        self.log = given["log"]
        self.log_max = int(given["log_max"])
        self.control = int(given["control"])
        self.console = int(given["console"])
        """Our end of the serial line."""
        self.listener = int(given["listener"])
        """Listening socket for console clients."""
        self.monitor = int(given["monitor"])
        """Our end of the second QMP session."""
        pairs = (pair.split(":") for pair in given["fds"].split(",") if pair)
        self.fds = {int(ours): int(theirs) for ours, theirs in pairs}
        self.uid = int(given["uid"]) if given["uid"] else None
        self.groups = [int(g) for g in given["groups"].split(",") if g]
        self.nofile = int(given["nofile"])
        self.cgroups = [c for c in given["cgroups"].split(",") if c]
        """Directories made by the client; we join QEMU to them and remove them."""
        self.owner = tuple(int(x) for x in given["owner"].split(":")) if given["owner"] else None
        """pid and start time of the process the machine dies with."""
        self.lifetime = float(given["lifetime"]) if given["lifetime"] else None
        self.idle = float(given["idle"]) if given["idle"] else None
        self.action = given["action"]
        """``kill`` or ``pause``: what happens at a deadline."""


def spawn(job: Job, stderr: int) -> int:
    """QEMU's pid, once it has been exec'd. Raises OSError with what failed."""
    jail = Confinement(uid=job.uid, groups=job.groups, nofile=job.nofile, fds=job.fds)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        step = "confine"
        try:
            os.close(reader)
            jail.report = writer
            jail.enter(stderr, writer)
            step = "run"
            os.execvpe(job.argv[0], job.argv, {"PATH": os.defpath, "MALLOC_ARENA_MAX": "2"})
        except BaseException as error:
            os.write(jail.report, f"cannot {step} {job.argv[0]}: {error}".encode())
        finally:
            os._exit(127)
    os.close(writer)
    with open(reader, "rb") as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(pid, 0)
        raise OSError(failure.decode(errors="replace"))
    return pid


def limit(pid: int, cgroups: list[str]) -> None:
    """Move QEMU into its cgroups. The first move waits for an RCU grace period (12 ms): QEMU starts up meanwhile."""
    for path in cgroups:
        try:
            with open(f"{path}/cgroup.procs", "w") as file:
                file.write(str(pid))
        except OSError:
            pass  # no limit, as where cgroups are not writable at all


class Keeper:
    """The loop beside one QEMU. ``run`` returns when QEMU has ended and its exit record is written."""

    def __init__(self, job: Job, pid: int, stderr: int, wake: int) -> None:
        self.job, self.pid = job, pid
        self.poll = Poll()
        self.qemu = os.pidfd_open(pid)
        self.stderr, self.tail = stderr, Recent(STDERR_TAIL)
        self.monitor_data = b""
        self.ended = False
        self.reason = ""
        """Set when we, or the guest through QMP, said why it ends."""
        self.panicked = False
        self.wake = wake
        for fd in (self.qemu, stderr, job.console, job.monitor, wake):
            os.set_blocking(fd, False)
        self.poll.watch(self.qemu, self._qemu_ended)
        self.poll.watch(stderr, lambda _: self.tail.add(self._read(stderr)))
        self.poll.watch(job.console, lambda _: self._console())
        self.poll.watch(job.monitor, lambda _: self._monitor())
        self.poll.watch(wake, self._woken)
        self.console = Console(self.poll, job.listener, PathLog(job.log, job.log_max), self._typed)
        self.starter = Starter(self.poll, job.control, lambda: self.end("the client that started it is gone"))
        self.deadlines = Deadlines(
            job.lifetime, job.idle, f"{job.runtime}/activity", self._expire, repeat=job.action == "pause"
        )
        if job.owner is not None:
            Owner(self.poll, open_owner(*job.owner), self._owner_gone)

    def _owner_gone(self) -> None:
        if not os.path.exists(f"{self.job.runtime}/disowned"):
            self.end("its owner is gone")

    def end(self, reason: str) -> None:
        """Kill QEMU and say why. The pidfd makes it certain that it is QEMU."""
        self.reason = self.reason or reason
        try:
            _signal.pidfd_send_signal(self.qemu, _signal.SIGKILL)
        except ProcessLookupError:
            pass

    def run(self) -> None:
        self._ask("qmp_capabilities")
        while not self.ended:
            self.poll.once(self.deadlines.left())
            if not self.ended:
                self.deadlines.check()
        self._finish()

    def _qemu_ended(self, _: int) -> None:
        self.ended = True
        self.poll.unwatch(self.qemu)

    def _woken(self, _: int) -> None:
        os.read(self.wake, 64)
        self.end("killed")

    def _read(self, fd: int) -> bytes:
        """What is there; at its end the descriptor leaves the loop."""
        try:
            data = os.read(fd, 64 << 10)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.poll.unwatch(fd)
        return data

    def _console(self) -> None:
        self.console.output(self._read(self.job.console))

    def _typed(self, data: bytes) -> None:
        os.write(self.job.console, data)  # BlockingIOError: the guest does not take input now

    def _ask(self, command: str) -> bool:
        """Send a command on our monitor. False when QEMU does not take it: it has ended, or hangs."""
        try:
            os.write(self.job.monitor, b'{"execute":"%s"}\n' % command.encode())
        except OSError:
            return False
        return True

    def _monitor(self) -> None:
        self.monitor_data += self._read(self.job.monitor)
        *lines, self.monitor_data = self.monitor_data.split(b"\n")
        if len(self.monitor_data) > MONITOR_LINE:
            self.monitor_data = b""
        for line in lines:
            if b'"SHUTDOWN"' in line or b'"GUEST_PANICKED"' in line:
                self._event(line)

    def _event(self, line: bytes) -> None:
        import json

        try:
            message = json.loads(line)
            event, why = message["event"], message.get("data", {}).get("reason", "")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return  # QEMU may have been taken over by its guest: what it says is only believed where it does no harm
        if event == "GUEST_PANICKED":
            self.panicked = True
        elif event == "SHUTDOWN":
            reasons = {
                "guest-shutdown": ending.POWERED_OFF,
                "guest-reset": ending.REBOOTED,
                "guest-panic": ending.PANICKED,
                "host-qmp-quit": "quit by request",
            }
            self.reason = self.reason or reasons.get(str(why), "ended")

    def _expire(self, reason: str) -> None:
        if self.job.action == "kill":
            self.end(reason)
            return
        try:
            os.close(os.open(f"{self.job.runtime}/paused", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError:
            pass  # its directory was deleted under it
        if not self._ask("stop"):
            self.end(reason)  # it cannot be paused, and must not outlive its deadline

    def _finish(self) -> None:
        """Drain what QEMU left, write the exit record, remove the cgroups."""
        _, status = os.waitpid(self.pid, 0)
        for fd, drain in ((self.job.console, self._console), (self.job.monitor, self._monitor)):
            while self.poll.watched(fd) and select.select([fd], [], [], 0)[0]:
                drain()
        while self.poll.watched(self.stderr) and select.select([self.stderr], [], [], 0)[0]:
            self.tail.add(self._read(self.stderr))
        self.console.flush()
        ending.write_path(f"{self.job.runtime}/exit.json", self._record(status))
        for path in self.job.cgroups:
            for _ in range(20):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.001)  # Linux 6.18 takes a dead process out a moment after it has told of its death

    def _record(self, status: int) -> bytes:
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        crashed = False
        reason = self.reason
        panic = ending.panic_reason(reason, self.panicked, self.console.recent.get())
        if panic is not None:
            reason, crashed = panic, True
        elif os.path.exists(f"{self.job.runtime}/kill"):
            reason = ending.KILLED
        elif not reason:
            crashed = True
            reason = f"QEMU was killed by signal {signal}" if signal else f"QEMU ended with status {code}"
        elif code:
            crashed = True
        stderr = self.tail.get().decode(errors="replace")
        return ending.record(reason, crashed=crashed, code=code, signal=signal, stderr=stderr)


def catch_signals() -> int:
    """SIGTERM makes the returned descriptor readable; a terminal's signals are ignored."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGTERM, lambda *_: None)
    for number in (_signal.SIGHUP, _signal.SIGINT):
        _signal.signal(number, _signal.SIG_IGN)
    return reader


def main() -> None:
    """Become a daemon, start QEMU, keep it."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    job = Job(sys.argv[1:])
    wake = catch_signals()
    me = os.getpid()
    with open(f"{job.runtime}/keeper.pid", "w") as file:
        file.write(f"{me} {start_time(me)}")
    stderr, stderr_w = os.pipe2(os.O_CLOEXEC)
    try:
        pid = spawn(job, stderr_w)
    except Exception as error:
        os.write(job.control, f"error {error}\n".encode())
        return
    os.close(stderr_w)
    for fd in job.fds:
        os.close(fd)
    try:
        os.write(job.control, f"ok {pid} {start_time(pid)} {me} {start_time(me)}\n".encode())
    except OSError:
        pass  # the client is gone already: the loop finds its end closed and ends the machine
    limit(pid, job.cgroups)
    Keeper(job, pid, stderr, wake).run()
