"""Verbs that work inside a machine: exec, shell, cp, logs; images, operations and the host. On the fake engine."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from client_home import DIGEST, IMAGE, Posada, paths, posada_cli

__all__ = ["paths", "posada_cli"]


@pytest.fixture
def vm(posada_cli: Posada) -> str:
    """The name of a machine that runs."""
    assert posada_cli("run", "-d", "--engine", "fake", "--name", "a", IMAGE).status == 0
    return "a"


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.FileIO:
    """Write to it what the command line reads, then close it."""
    read, write = os.pipe()
    saved = os.dup(0)
    os.dup2(read, 0)
    os.close(read)
    feed = os.fdopen(write, "wb", buffering=0)
    yield feed  # type: ignore[misc]
    feed.close()
    os.dup2(saved, 0)
    os.close(saved)


def test_exec_status_and_streams(posada_cli: Posada, vm: str) -> None:
    done = posada_cli("exec", vm, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.status, done.out, done.err) == (3, "out\n", "err\n")
    assert posada_cli("exec", vm, "ls", "-d", "/").out == "/\n"
    assert posada_cli("exec", vm, "--", "sh", "-c", "kill -9 $$").status == 137
    assert posada_cli("exec", "--env", "A=b", vm, "sh", "-c", "echo $A").out == "b\n"
    assert posada_cli("exec", vm, "-w", "/run", "pwd").out.endswith("/run\n")


def test_exec_refusals(posada_cli: Posada, vm: str) -> None:
    done = posada_cli("exec", vm)
    assert (done.status, done.err.splitlines()[0]) == (2, "posada: error: which command? posada exec VM COMMAND...; "
                                                          "posada shell VM opens a shell")  # fmt: skip
    assert posada_cli("exec", vm, "/no/such/program").status == 1
    assert posada_cli("exec", "--timeout", "0.2", vm, "sleep", "60").status == 124
    assert posada_cli("exec", "nobody", "true").status == 1
    assert posada_cli("pause", vm).status == 0
    done = posada_cli("exec", vm, "true")
    assert (done.status, "hint: resume it first" in done.err) == (1, True)


def test_exec_feeds_stdin_when_asked(posada_cli: Posada, vm: str, stdin: io.FileIO) -> None:
    assert posada_cli("exec", vm, "cat").out == ""  # without -i it has none
    stdin.write(b"hello\n")
    stdin.close()
    assert posada_cli("exec", "-i", vm, "cat").out == "hello\n"


def test_exec_ends_when_the_command_does_not_read(posada_cli: Posada, vm: str, stdin: io.FileIO) -> None:
    done = posada_cli("exec", "-i", vm, "echo", "done")
    assert (done.status, done.out) == (0, "done\n")


def test_shell(posada_cli: Posada, vm: str, stdin: io.FileIO) -> None:
    assert posada_cli("shell", vm, "echo a | tr a b; exit 4").out == "b\n"
    assert posada_cli("shell", vm, "exit 4").status == 4
    stdin.write(b"echo from a script\nexit 5\n")
    stdin.close()
    done = posada_cli("shell", vm)
    assert (done.status, done.out) == (5, "from a script\n")


def test_cp_both_ways(posada_cli: Posada, vm: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content")
    assert posada_cli("cp", str(source), f"{vm}:/copy").status == 0
    done = posada_cli("cp", f"{vm}:/copy", str(tmp_path / "back"), "--format", "json")
    assert json.loads(done.out) == {"files": 1, "bytes": 7, "skipped": []}
    assert (tmp_path / "back" / "file").read_text() == "content"
    assert posada_cli("cp", f"{vm}:/copy/file", str(tmp_path)).status == 0
    assert (tmp_path / "file").read_text() == "content"
    assert posada_cli("run", "-d", "--engine", "fake", "--name", "b", IMAGE).status == 0
    assert posada_cli("cp", f"{vm}:/copy", "b:/copied").status == 0
    assert posada_cli("cp", "b:/copied/file", str(tmp_path / "again")).status == 0
    assert (tmp_path / "again").read_text() == "content"


def test_cp_of_archives(posada_cli: Posada, vm: str, stdin: io.FileIO, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("f")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    stdin.write(buffer.getvalue())
    stdin.close()
    assert posada_cli("cp", "-", f"{vm}:/in").status == 0
    out = posada_cli("cp", f"{vm}:/in", "-").out
    with tarfile.open(fileobj=io.BytesIO(out.encode())) as archive:
        assert "in/f" in archive.getnames()


def test_cp_refusals(posada_cli: Posada, vm: str, tmp_path: Path) -> None:
    assert posada_cli("cp", "a", "b").status == 2
    assert posada_cli("cp", str(tmp_path / "none"), f"{vm}:/x").status == 1
    assert posada_cli("cp", f"{vm}:/none", str(tmp_path)).status == 1
    (tmp_path / "with:colon").write_text("x")
    assert posada_cli("cp", f"{tmp_path}/with:colon", f"{vm}:/x").status == 0  # a / before the colon: a path


def test_logs(posada_cli: Posada, vm: str) -> None:
    assert "a booted" in posada_cli("logs", vm).out
    assert posada_cli("logs", "-n", "0", vm).out == ""
    assert posada_cli("stop", vm).status == 0
    assert "a booted" in posada_cli("logs", "-f", vm).out  # follows to the end, which has come


def test_images(posada_cli: Posada, vm: str, tmp_path: Path) -> None:
    (image,) = json.loads(posada_cli("image", "ls", "--format", "json").out)
    assert (image["digest"], image["names"], image["agent"]) == (DIGEST, [IMAGE], True)
    assert posada_cli("image", "ls").out.splitlines()[1].split()[:2] == [IMAGE, DIGEST[:12]]
    assert f"digest   {DIGEST}" in posada_cli("image", "inspect", IMAGE).out
    assert json.loads(posada_cli("image", "inspect", IMAGE, "--format", "json").out)["kernel"] == "vmlinuz"
    done = posada_cli("image", "rm", IMAGE)
    assert (done.status, "in use by a" in done.err) == (1, True)
    assert posada_cli("rm", "-f", vm).status == 0
    assert posada_cli("image", "rm", IMAGE).out == f"{IMAGE}\n"
    assert posada_cli("image", "inspect", IMAGE).status == 1
    assert posada_cli("image", "import", "--name", "x:1").status == 2


def test_operations_and_events(posada_cli: Posada, vm: str) -> None:
    operations = json.loads(posada_cli("op", "ls", "--format", "json").out)
    assert {"create", "start"} <= {operation["kind"] for operation in operations}
    id = operations[0]["id"]
    assert posada_cli("op", "ls").out.splitlines()[0].split()[:3] == ["ID", "KIND", "TARGET"]
    assert "state    done" in posada_cli("op", "show", id).out
    assert posada_cli("op", "watch", id).status == 0
    assert posada_cli("op", "cancel", id).status == 0
    assert posada_cli("op", "show", "nothing").status == 1
    lines = [json.loads(line) for line in posada_cli("events", "--format", "json").out.splitlines()]
    assert "vm.created" in [line["kind"] for line in lines]
    after = str(lines[-2]["id"])
    assert len(posada_cli("events", "--after", after).out.splitlines()) == 1


def test_the_host(posada_cli: Posada) -> None:
    checks = json.loads(posada_cli("doctor", "--format", "json").out)
    assert {"name", "ok", "detail", "hint"} == set(checks[0])
    assert posada_cli("doctor").out.splitlines()[0].split() == ["CHECK", "FOUND"]
    can = json.loads(posada_cli("capabilities", "fake", "--format", "json").out)
    assert can["features"]["fork of a running machine"]["ok"]
    assert posada_cli("capabilities", "fake").out.startswith("fake 1 fake\n")
    assert posada_cli("capabilities", "nonsense").status == 2
    assert posada_cli("recover").out == "nothing was left undone\n"
    assert json.loads(posada_cli("recover", "--rebuild", "--format", "json").out)["problems"] == []
