#!/usr/bin/env python3
"""Bring a lab up and run something in it: ``scripts/lab.py kvm [-- COMMAND…]``. Without a command: a shell.

``kvm``: Debian with a real /dev/kvm, whatever this computer has (tests/lab/lab_kit.py). The checkout is in /posada, where
commands start; what is done in the lab is gone with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/lab"), str(ROOT / "src")]

import lab_kit  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", choices=["kvm"])
    parser.add_argument("command", nargs="*", help="what to run; a shell if there is none")
    arguments = parser.parse_args()
    try:
        with lab_kit.labs(lambda text: print(text, file=sys.stderr)) as lab:
            return inside(lab, arguments.command)
    except lab_kit.NoLab as error:
        print(error, file=sys.stderr)
        return 1


def inside(lab: lab_kit.Lab, command: list[str]) -> int:
    """By the command line of posada itself: it knows terminals, streams and exit statuses."""
    argv = [sys.executable, "-m", "posada", "exec" if command else "shell", f"--workdir={lab_kit.TREE}"]
    argv += [f"--env={key}={value}" for key, value in lab_kit.ENVIRONMENT.items()]
    home, runtime = lab_kit.places()
    places = {"POSADA_HOME": str(home), "POSADA_RUNTIME": str(runtime), "PYTHONPATH": str(ROOT / "src")}
    argv += [lab.vm.name, *(["--", *command] if command else [])]
    return subprocess.run(argv, env={**os.environ, **places}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
