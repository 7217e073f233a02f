#!/usr/bin/env python3
"""Print the path of the QEMU that labs run best in; nothing where that is the one on the PATH.

Debian 12's QEMU 7.2 emulates AMD's virtualisation with a fault: now and then a guest's guest gets flags back that were
never its own, and crashes (docs/adr/0011). That of its backports is not known to. It is fetched into .cache once, and not
installed. Where hardware runs guests nothing is emulated, and nothing is needed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "src")]

import backports  # noqa: E402
import pytest  # noqa: E402

from posada.engine.common.kvm import kvm_rate  # noqa: E402

PROGRAM = "usr/bin/qemu-system-x86_64"


def find() -> str:
    """The path, or nothing. Why there is none goes to stderr."""
    if os.environ.get("POSADA_QEMU"):
        return os.environ["POSADA_QEMU"]
    if kvm_rate()[1]:
        return ""
    # Machines run as users of their own, who may not look into anybody's home.
    place = Path(tempfile.gettempdir(), f"posada-lab-qemu-{os.getuid()}")
    if (place / PROGRAM).exists() and place.stat().st_uid == os.getuid():
        return str(place / PROGRAM)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{place.name}-") as folder:
            backports.newer_qemu(ROOT / ".cache/qemu-backports", Path(folder) / "unpacked")
            unpacked = Path(folder) / "unpacked"
            unpacked.chmod(0o755)
            unpacked.rename(place)
    except (pytest.skip.Exception, AssertionError, OSError) as error:
        print(f"labs run in the system's QEMU: {error}", file=sys.stderr)
        return ""
    return str(place / PROGRAM)


if __name__ == "__main__":
    print(find())
