"""scripts/bootstrap, on a machine made of a PATH and a few stubs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What a bare machine has of what the script uses.
COMMANDS = ("sh", "dirname", "tr", "cat", "sha256sum", "cut", "sed", "rm", "mkdir")
GUEST_TOOLS = ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "newuidmap")


class BareMachine:
    """A copy of the script in a directory of its own, with a PATH that holds only what it is given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        (root / "repo/scripts").mkdir(parents=True)
        text = (ROOT / "scripts/bootstrap").read_text()
        # The test's machine has what it has in /usr/sbin; the stubbed one must not see it.
        (root / "repo/scripts/bootstrap").write_text(text.replace("PATH=$PATH:/usr/sbin:/sbin\n", ""))
        shutil.copy(ROOT / "pyproject.toml", root / "repo")
        for name in COMMANDS:
            found = shutil.which(name)
            assert found
            (self.bin / name).symlink_to(found)

    def stub(self, name: str, script: str = "exit 0") -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def python(self) -> None:
        self.stub("python3", f'exec "{sys.executable}" "$@"')

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / "sh"), "repo/scripts/bootstrap", *args],
            cwd=self.root, env={"PATH": str(self.bin)}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> BareMachine:
    return BareMachine(tmp_path)


def test_without_root_it_says_exactly_what_to_install(machine: BareMachine) -> None:
    machine.python()
    machine.stub("apt-get", "echo apt-get must not run >&2; exit 9")
    machine.stub("id", "echo 1000")
    machine.stub("mmdebstrap")
    done = machine.run()
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sudo ")]
    wanted = line.removeprefix("sudo apt-get install --no-install-recommends -y ").split()
    assert {"qemu-system-x86", "qemu-utils", "e2fsprogs", "uidmap"} <= set(wanted)
    assert "mmdebstrap" not in wanted
    assert "python3-venv" not in wanted


def test_with_root_it_installs_what_is_missing_and_only_that(machine: BareMachine) -> None:
    machine.python()
    machine.stub("id", "echo 0")
    for tool in GUEST_TOOLS[1:]:
        machine.stub(tool)
    machine.stub("apt-get", f'echo "$@" >> {machine.root}/apt.log; case "$*" in *install*) exit 7;; esac')
    assert machine.run().returncode == 7  # apt's failure is ours: nothing goes on without it
    update, install = (machine.root / "apt.log").read_text().splitlines()
    assert "update" in update
    assert install.split()[-1] == "qemu-system-x86"
    assert not (machine.root / "repo/.venv").exists()


def test_a_finished_environment_is_left_alone(machine: BareMachine) -> None:
    machine.python()
    machine.stub("id", "echo 0")
    for tool in GUEST_TOOLS:
        machine.stub(tool)
    # A venv module that only leaves a trace, and an interpreter in it that says what was asked of pip.
    (machine.root / "repo/.venv/bin").mkdir(parents=True)
    fake = machine.root / "repo/.venv/bin/python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in "-V") exec "{sys.executable}" -V;; '
        f'*pip*) echo "$@" >> {machine.root}/pip.log;; esac\n'
    )
    fake.chmod(0o755)
    first = machine.run("dev")
    assert first.returncode == 0, first.stderr
    asked = (machine.root / "pip.log").read_text()
    assert "-e .[dev]" in asked
    assert machine.run("dev").returncode == 0
    assert machine.run().returncode == 0  # an environment for development runs the demo too
    assert (machine.root / "pip.log").read_text() == asked
    with (machine.root / "repo/pyproject.toml").open("a") as declaration:
        declaration.write("# changed\n")
    assert machine.run().returncode == 0
    assert (machine.root / "pip.log").read_text() != asked


def test_misuse(machine: BareMachine) -> None:
    assert machine.run("production").returncode == 2
