"""The command line on real guests."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import posada
from cli_terminal import Terminal

POSADA = [sys.executable, "-m", "posada"]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    monkeypatch.setenv("TERM", "xterm")


def run(*arguments: str, status: int = 0, input: bytes = b"") -> str:
    """What it prints."""
    done = subprocess.run([*POSADA, *arguments], input=input, capture_output=True, timeout=120)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture
def web(host: posada.Host, image: str) -> Iterator[str]:
    """The name of a machine that runs."""
    assert run("run", "-d", "--name", "web", "-p", "8080", image) == "web\n"
    yield "web"
    run("rm", "-f", "web")


def test_one_command_and_the_machine_is_gone(host: posada.Host, image: str) -> None:
    out = run("run", image, "--", "sh", "-c", "uname -s; cat /etc/debian_version; exit 7", status=7)
    assert out.startswith("Linux\n12")
    assert host.vms.list() == []


def test_a_session(web: str, tmp_path: Path) -> None:
    (vm,) = json.loads(run("ps", "--format", "json"))
    assert (vm["name"], vm["state"], vm["ports"][0]["guest"]) == ("web", "running", 8080)
    assert run("exec", "-i", web, "tee", "/root/note", input=b"one\n") == "one\n"
    run("snapshot", "create", web, "one")
    run("exec", web, "--", "sh", "-c", "echo two > /root/note")
    run("fork", web, "--snapshot", "one", "past")
    run("fork", web, "present")
    assert (run("exec", "past", "cat", "/root/note"), run("exec", "present", "cat", "/root/note")) == ("one\n", "two\n")
    assert len({run("exec", name, "cat", "/etc/machine-id") for name in (web, "past", "present")}) == 3
    run("rm", "-f", "past", "present")
    run("snapshot", "restore", web, "one")
    assert run("exec", web, "cat", "/root/note") == "one\n"

    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(bytes(1 << 20))
    run("cp", str(tmp_path / "tree"), f"{web}:/root/tree")
    assert run("exec", web, "stat", "-c", "%s", "/root/tree/file").strip() == str(1 << 20)
    run("cp", f"{web}:/root/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "file").stat().st_size == 1 << 20
    archive = subprocess.run([*POSADA, "cp", f"{web}:/root/tree", "-"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        assert "tree/file" in opened.getnames()

    run("attach", web, "data", "--size", "64MiB")
    assert "vdb" in run("exec", web, "lsblk")
    run("detach", web, "data")
    run("stop", web)
    assert run("wait", web) == "stopped\n"
    run("resize", web, "--memory", "640MiB", "--cpus", "2")
    run("start", web)
    assert run("exec", web, "nproc") == "2\n"
    assert run("exec", web, "cat", "/root/note") == "one\n"


def test_a_command_that_goes_on_by_itself(host: posada.Host, image: str) -> None:
    run("run", "-d", "--name", "ticker", image, "--", "sh", "-c", "while :; do echo tick; sleep 0.1; done")
    host.vms.get("ticker").wait_for.text("tick", timeout=20)
    assert "tick\n" in run("logs", "-n", "3", "ticker")
    run("rm", "-f", "ticker")


def test_an_interactive_shell_and_the_console(host: posada.Host, image: str) -> None:
    shell = Terminal(*POSADA, "run", "--name", "here", image, rows=33, columns=111)
    try:
        shell.type("stty size; id -un\n")
        shell.expect("33 111", timeout=60)
        shell.expect("root")
        console = Terminal(*POSADA, "console", "here")
        try:
            console.expect("posada-agent: ready")
            console.type("\x1d")
            assert console.wait() == 0
        finally:
            console.close()
        shell.type("echo still; exit 6\n")
        shell.expect("still\r\n")
        assert shell.wait() == 6
    finally:
        shell.close()
    assert host.vms.list() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("delay", [0.4, 1.0, 4.0])
def test_a_signal_at_any_moment_leaves_nothing(
    host: posada.Host, image: str, places: tuple[Path, Path], number: signal.Signals, delay: float
) -> None:
    process = subprocess.Popen([*POSADA, "run", image, "--", "sleep", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(delay)  # the moment is what is tried
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number is signal.SIGKILL else 128 + number), err
    assert b"Traceback" not in err
    until = time.monotonic() + 10
    while (left := [*host.vms.list(), *places[1].glob("vms/*")]) and time.monotonic() < until:
        time.sleep(0.05)  # after kill -9 its keeper ends the machine, and whoever looks next clears up: soon, not at once
    assert left == []
