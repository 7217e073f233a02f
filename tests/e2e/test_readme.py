"""What the README shows works: its Python example and its session, as they are printed there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import posada

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()

#: Lines of the session that need a terminal or the network; what stands in for them in the guest.
INSTEAD = {
    "posada exec web -- apt-get install -y nginx": "posada exec web -- mkdir -p /var/www/html",
    "posada exec -it web bash": "posada exec web -- bash -c true",
}


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_python_example(
    host: posada.Host, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name, script in {"setup.sh": "echo done > /var/log/app.log", "try": "echo tried $1 on $(hostname)"}.items():
        (app / name).write_text(f"#!/bin/sh\n{script}\n")
        (app / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {})  # noqa: S102  # it is ours
    said = capsys.readouterr().out
    assert "Linux" in said
    assert re.findall(r"tried (\d)", said) == ["0", "1", "2", "3"]
    assert len(set(re.findall(r" on (\S+)", said))) == 4
    assert host.vms.list() == []


def test_the_session(host: posada.Host, image: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("hello\n")
    commands = [line[2:].split("#")[0].strip() for line in block("console").splitlines() if line.startswith("$ ")]
    assert set(INSTEAD) <= set(commands)
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    said = {}
    try:
        for command in commands:
            words = shlex.split(INSTEAD.get(command, command))
            done = subprocess.run(
                [sys.executable, "-m", *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=120,
            )  # fmt: skip
            said[command] = done.stdout
            assert done.returncode == 0, f"{command}: {done.stderr}"
    finally:
        for vm in host.vms.list():
            vm.delete()
    assert said["posada ps"].count("running") == 4
    assert "bookworm" in said["posada run debian:12 -- cat /etc/os-release"]
    assert "qemu" in said["posada doctor"]
