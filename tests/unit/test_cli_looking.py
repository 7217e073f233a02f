"""``posada info`` on what is inside a machine, and ``posada debug``. On the fake engine, and on toys of the kvm engine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_home import IMAGE, Posada, paths, posada_cli
from kvm_engine_kit import kernel, needs_kvm

__all__ = ["paths", "posada_cli"]


def test_info_shows_counters_and_registers_on_request(posada_cli: Posada) -> None:
    assert posada_cli("run", "-d", "--engine", "fake", "--name", "one", IMAGE).status == 0
    shown = posada_cli("info", "one")
    assert "vcpu 0: HLT 1" in shown.out and "rip" not in shown.out
    assert "rip 0000" in posada_cli("info", "--registers", "one").out
    inside = json.loads(posada_cli("info", "one", "--format", "json").out)["inside"]
    assert inside["exits"] == [{"HLT": 1}] and inside["registers"] == []
    assert posada_cli("stop", "one").status == 0
    assert json.loads(posada_cli("info", "one", "--format", "json").out)["inside"] is None


def test_debug_is_refused_where_the_engine_cannot(posada_cli: Posada) -> None:
    assert posada_cli("run", "-d", "--engine", "fake", "--name", "one", IMAGE).status == 0
    refused = posada_cli("debug", "one")
    assert refused.status == 1 and "gdb" in refused.err
    assert posada_cli("stop", "one").status == 0
    assert "start it first" in posada_cli("debug", "one").err or posada_cli("debug", "one").status == 1


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command line with a short state directory of its own, in which the toy ``one`` runs."""
    with tempfile.TemporaryDirectory(prefix="pk-") as folder:
        home = Path(folder)
        (home / "kernel").write_bytes(kernel())
        (home / "spec.json").write_text(
            json.dumps({"name": "one", "engine": "kvm", "memory": "64MiB", "nics": [], "boot": {"kernel": str(home / "kernel")}})
        )

        def run(*argv: str) -> subprocess.CompletedProcess[str]:
            env = {
                "POSADA_HOME": str(home / "home"),
                "POSADA_RUNTIME": str(home / "run"),
                "POSADA_KVM_SLOW": "1",
                "PYTHONPATH": ":".join(sys.path),
                "PATH": "/usr/bin:/bin",
            }
            words = [sys.executable, "-m", "posada", *argv]
            return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)

        done = run("create", "-f", str(home / "spec.json"))
        assert done.returncode == 0, done.stderr
        done = run("start", "one")
        assert done.returncode == 0, done.stderr
        yield run
        assert run("rm", "-f", "one").returncode == 0
        assert not list((home / "run" / "vms").glob("*"))


@needs_kvm
def test_a_toy_from_the_command_line(toy: Any) -> None:
    shown = toy("info", "--registers", "one")
    assert shown.returncode == 0, shown.stderr
    assert "seccomp" in shown.stdout and "IO " in shown.stdout and "rip 0000000000100" in shown.stdout
    bound = json.loads(toy("debug", "one", "--format", "json").stdout)
    with socket.create_connection(("127.0.0.1", bound["port"]), timeout=10) as gdb:
        gdb.settimeout(10)
        gdb.sendall(b"+$?#3f")
        said = b""
        while b"#" not in said:
            said += gdb.recv(100)
        assert b"$S05" in said or b"$T05" in said
    assert toy("pause", "one").returncode == 0
    assert toy("resume", "one").returncode == 0
    assert "toy" in toy("logs", "one").stdout
