"""One keeper: starts a QEMU in its jail, then stays beside it.

Command line: ``key=value…  --  qemu argv…`` (the keys are those of `Job`). On the descriptor ``control`` it answers one
line, ``ok PID START KEEPER_PID KEEPER_START`` or ``error TEXT``, and then waits for the byte ``c`` (commit). If the
client's end closes before that, the client has died or given up, and the machine ends with it.

If the keeper itself is killed, QEMU goes on: its console and second monitor find their peers gone and drop output.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import select
import sys
import time

from .console import RECENT, Client, Log, Recent
from .jail import Confinement

STDERR_TAIL = 8 << 10
#: A monitor line longer than this is not one of ours.
MONITOR_LINE = 1 << 20
MAX_CLIENTS = 32


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


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat. Raises OSError when there is no such process."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


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
        self.poll = select.poll()
        self.qemu = os.pidfd_open(pid)
        self.stderr, self.tail = stderr, Recent(STDERR_TAIL)
        self.log, self.recent = Log(job.log, job.log_max), Recent(RECENT)
        self.clients: dict[int, Client] = {}
        self.monitor_data = b""
        self.committed = False
        self.reason = ""
        """Set when we, or the guest through QMP, said why it ends."""
        self.panicked = False
        now = time.monotonic()
        self.deadline = now + job.lifetime if job.lifetime else None
        self.wake = wake
        for fd in (self.qemu, stderr, job.console, job.listener, job.monitor, job.control, wake):
            os.set_blocking(fd, False)
            self.poll.register(fd, select.POLLIN)
        self.owner = self._open_owner()

    def _open_owner(self) -> int:
        """A pidfd of the owner, or -1 without one. Ends the machine at once if it is gone already."""
        if self.job.owner is None:
            return -1
        pid, start = self.job.owner
        try:
            fd = os.pidfd_open(pid)
            if start_time(pid) == start:
                self.poll.register(fd, select.POLLIN)
                return fd
        except OSError:
            pass
        self._owner_gone()
        return -1

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
        while True:
            for fd, _ in self.poll.poll(self._timeout()):
                if fd == self.qemu:
                    self._finish()
                    return
                self._ready(fd)
            self._deadlines()

    def _ready(self, fd: int) -> None:
        job = self.job
        if fd == job.console:
            self._console()
        elif fd == self.stderr:
            self.tail.add(self._read(fd))
        elif fd == job.monitor:
            self._monitor()
        elif fd == job.listener:
            self._accept()
        elif fd == job.control:
            self._control()
        elif fd == self.owner:
            self.poll.unregister(fd)
            self._owner_gone()
        elif fd == self.wake:
            os.read(fd, 64)
            self.end("killed")
        elif fd in self.clients:
            self._client(fd)

    def _read(self, fd: int) -> bytes:
        """What is there; at its end the descriptor leaves the loop."""
        try:
            data = os.read(fd, 64 << 10)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self.poll.unregister(fd)
        return data

    def _control(self) -> None:
        data = self._read(self.job.control)
        if data == b"c":
            self.committed = True
            self.poll.unregister(self.job.control)
            os.close(self.job.control)
        elif not self.committed:
            self.end("the client that started it is gone")

    def _console(self) -> None:
        data = self._read(self.job.console)
        self.log.write(data)
        self.recent.add(data)
        for client in list(self.clients.values()):
            self._settle(client, client.send(data))

    def _settle(self, client: Client, keep: bool) -> None:
        if keep:
            self.poll.modify(client.fd, select.POLLIN | (select.POLLOUT if client.pending else 0))
        else:
            self.poll.unregister(client.fd)
            del self.clients[client.fd]
            os.close(client.fd)

    def _accept(self) -> None:
        try:
            fd, _ = _socket.socket(fileno=os.dup(self.job.listener))._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        if len(self.clients) >= MAX_CLIENTS:
            os.close(fd)
            return
        os.set_blocking(fd, False)
        client = self.clients[fd] = Client(fd, self.recent.get())
        self.poll.register(fd, select.POLLIN)
        self._settle(client, client.flush())

    def _client(self, fd: int) -> None:
        client = self.clients[fd]
        try:
            data = os.read(fd, 4096)
            if data:
                os.write(self.job.console, data)
        except BlockingIOError:
            data = b"-"  # the guest does not take input, or there was none: typed text may be lost, as on a real line
        except OSError:
            data = b""
        self._settle(client, bool(data) and client.flush())

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
                "guest-shutdown": "guest powered off",
                "guest-reset": "guest rebooted",
                "guest-panic": "guest panicked",
                "host-qmp-quit": "quit by request",
            }
            self.reason = self.reason or reasons.get(str(why), "ended")

    def _timeout(self) -> float | None:
        """Milliseconds until the next deadline may have come."""
        waits = []
        now = time.monotonic()
        if self.deadline is not None:
            waits.append(self.deadline - now)
        if self.job.idle is not None:
            waits.append(self._idle_left())
        return max(1.0, min(waits) * 1000) if waits else None

    def _idle_left(self) -> float:
        """Seconds left of the idle time, by the mtime of ``activity``; a clock that jumped back counts as activity."""
        idle = self.job.idle or 0.0
        try:
            passed = time.time() - os.stat(f"{self.job.runtime}/activity").st_mtime
        except OSError:
            passed = 0.0
        return min(idle, idle - passed) if passed >= 0 else idle

    def _deadlines(self) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.deadline = None
            self._expire("its lifetime is over")
        elif self.job.idle is not None and self._idle_left() <= 0:
            if self.job.action == "pause":
                # Counts again from now, so that a machine that is resumed gets its full idle time.
                os.utime(f"{self.job.runtime}/activity")
            self._expire("it was idle for too long")

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
            while select.select([fd], [], [], 0)[0] and self._registered(fd):
                drain()
        while select.select([self.stderr], [], [], 0)[0] and self._registered(self.stderr):
            self.tail.add(self._read(self.stderr))
        for client in list(self.clients.values()):
            client.flush()
        record = self._record(status)
        import json

        try:
            temporary = f"{self.job.runtime}/.exit.json"
            with open(temporary, "w") as file:
                json.dump(record, file)
            os.replace(temporary, f"{self.job.runtime}/exit.json")
        except OSError:
            pass  # the directory is gone: the machine was deleted
        for path in self.job.cgroups:
            for _ in range(20):
                try:
                    os.rmdir(path)
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.001)  # Linux 6.18 takes a dead process out a moment after it has told of its death

    def _registered(self, fd: int) -> bool:
        try:
            self.poll.modify(fd, select.POLLIN)
        except OSError:
            return False
        return True

    def _record(self, status: int) -> dict[str, object]:
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        asked = os.path.exists(f"{self.job.runtime}/kill")
        crashed = False
        reason = self.reason
        last_words = self.recent.get()
        panic = last_words.rfind(b"Kernel panic - not syncing")
        if reason == "guest panicked" or self.panicked or (reason == "guest rebooted" and panic >= 0):
            # A kernel without pvpanic resets itself (panic=-1); its console still says why.
            words = last_words[panic:].split(b"\n")[0].decode(errors="replace").strip() if panic >= 0 else ""
            reason, crashed = f"guest panicked: {words}" if words else "guest panicked", True
        elif asked:
            reason = "killed"
        elif not reason:
            crashed = True
            reason = f"QEMU was killed by signal {signal}" if signal else f"QEMU ended with status {code}"
        elif code:
            crashed = True
        stderr = self.tail.get().decode(errors="replace")
        return {
            "reason": reason, "crashed": crashed, "code": code, "signal": signal, "stderr": stderr, "time": time.time(),
        }  # fmt: skip


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
