"""What keeper and monitor share: logs, deadlines, owners, exit records. The console itself: test_qemu_keeper.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from posada.engine.common import process
from posada.runtime import ending
from posada.runtime.console import DescriptorLog, PathLog
from posada.runtime.deadlines import IDLE_TOO_LONG, LIFETIME_OVER, Deadlines
from posada.runtime.owner import Owner, Starter, open_owner
from posada.runtime.watch import Poll


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@pytest.mark.parametrize("kind", ["path", "descriptors"])
def test_a_log_keeps_its_last_bytes_in_two_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    log = PathLog(str(path), 100) if kind == "path" else DescriptorLog(opened(path), opened(tmp_path / "log.1"), 100)
    lines = [b"line %02d, of ten\n" % n for n in range(30)]
    for line in lines:
        log.write(line)
    both = (tmp_path / "log.1").read_bytes() + path.read_bytes()
    assert b"".join(lines).endswith(both) and len(both) > 100
    assert path.stat().st_size <= 100 and (tmp_path / "log.1").stat().st_size <= 100


def test_a_log_on_descriptors_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"before\n")
    log = DescriptorLog(opened(tmp_path / "log"), -1, 20)
    log.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\nafter\n"
    log.write(b"long enough\n")
    assert (tmp_path / "log").read_bytes() == b"long enough\n", "without a second file the first begins again"
    log.close()
    log.close()
    log.write(b"nobody has it\n")
    DescriptorLog(-1, -1, 20).write(b"nor this\n")


def test_trouble_with_the_disk_only_loses_log() -> None:
    log = DescriptorLog(os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC), -1, 100)
    log.write(b"lost\n")
    log.close()


def test_a_lifetime_ends_once() -> None:
    said: list[str] = []
    deadlines = Deadlines(0.01, None, -1, said.append, repeat=False)
    left = deadlines.left()
    assert left is not None and 0 < left <= 0.01
    time.sleep(left)
    deadlines.check()
    deadlines.check()
    assert said == [LIFETIME_OVER] and deadlines.left() is None


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_idleness_counts_from_the_last_touch(tmp_path: Path, by: str) -> None:
    path = tmp_path / "activity"
    fd = opened(path)
    said: list[str] = []
    deadlines = Deadlines(None, 100, str(path) if by == "path" else fd, said.append, repeat=True)
    deadlines.check()
    assert not said
    os.utime(path, (time.time() - 101,) * 2)
    assert deadlines.left() == 0
    deadlines.check()
    deadlines.check()
    assert said == [IDLE_TOO_LONG], "then it counts again from now"
    os.utime(path, (time.time() + 1000,) * 2)
    assert deadlines.left() == 100, "a clock that jumped back is no idleness"
    os.close(fd)
    path.unlink()
    assert deadlines.left() == 100


def test_an_owner_is_watched_by_pid_and_start(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    found = process.find(child.pid)
    assert open_owner(found.pid, found.start + 1) == -1
    poll, said = Poll(), []
    Owner(poll, open_owner(found.pid, found.start), lambda: said.append("gone"))
    kept = Owner(poll, open_owner(found.pid, found.start), lambda: said.append("not mine"))
    kept.forget()
    poll.once(0)
    assert not said
    child.kill()
    child.wait()
    poll.once(10)
    assert said == ["gone"]
    Owner(poll, open_owner(found.pid, found.start), lambda: said.append("at once"))
    assert said == ["gone", "at once"]


@pytest.mark.parametrize(
    ("act", "gone"), [(lambda s: s.send(b"c"), False), (lambda s: s.close(), True), (lambda s: s.send(b"x"), True)]
)
def test_a_starter_commits_or_takes_us_along(act: object, gone: bool) -> None:
    poll, said = Poll(), []
    ours, theirs = socket.socketpair()
    starter = Starter(poll, theirs.detach(), lambda: said.append("gone"))
    starter.tell(b"ok\n")
    assert ours.recv(10) == b"ok\n"
    act(ours)  # type: ignore[operator]
    poll.once(10)
    assert (bool(said), starter.committed) == (gone, not gone)
    ours.close()


@pytest.mark.parametrize(
    ("reason", "panicked", "recent", "words"),
    [
        ("guest powered off", False, b"Kernel panic - not syncing: quoted by somebody\n", None),
        (
            "guest rebooted",
            False,
            b"[1] Kernel panic - not syncing: no init\nmore",
            "guest panicked: Kernel panic - not syncing: no init",
        ),
        ("guest rebooted", False, b"all is well", None),
        ("", True, b"", "guest panicked"),
    ],
)
def test_a_panic_is_told_by_its_words(reason: str, panicked: bool, recent: bytes, words: str | None) -> None:
    assert ending.panic_reason(reason, panicked, recent) == words


def test_an_exit_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = ending.record("killed", crashed=False, signal=9, stderr="last words")
    ending.write_path(str(tmp_path / "exit.json"), data)
    found = process.read_exit(tmp_path)
    assert found is not None
    assert (found.reason, found.crashed, found.signal, found.stderr) == ("killed", False, 9, "last words")
    fd = opened(tmp_path / "other")
    ending.write_descriptor(fd, data)
    os.close(fd)
    assert json.loads((tmp_path / "other").read_bytes())["reason"] == "killed"
    ending.write_path(str(tmp_path / "gone/exit.json"), data)
