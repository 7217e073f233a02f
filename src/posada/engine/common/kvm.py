"""Does hardware run guests here? Measured: that /dev/kvm exists says nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

#: Instructions per second at ring 0. Hardware does thousands of millions; kernels that emulate it two.
USEFUL_RATE = 50e6
#: Slower than that, hardware still runs it if it keeps step with the host's own code: the host is an emulated machine.
USEFUL_SHARE = 0.2
#: Seconds for a measurement that takes 20 ms where it is quiet; a busy host that emulates takes its time.
TIMEOUT = 10


def kvm_rate() -> tuple[float, bool, str]:
    """(instructions per second at ring 0, whether hardware runs them, in words). 0 when /dev/kvm cannot be used at all."""
    if not os.path.exists("/dev/kvm"):
        return 0.0, False, "there is no /dev/kvm"
    program = Path(__file__).with_name("kvmprobe.py")
    try:
        command = [sys.executable or "python3", "-I", "-S", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0.0, False, f"/dev/kvm did not run a test guest within {TIMEOUT} s"
    word, _, rest = done.stdout.strip().partition(" ")
    if word != "rate":
        return 0.0, False, f"/dev/kvm does not run a test guest: {rest or done.stderr.strip()[-200:]}"
    rate, own = map(float, rest.split())
    useful = rate >= USEFUL_RATE or 0 < own * USEFUL_SHARE <= rate
    verdict = "hardware runs it" if useful else "the host emulates it, which is too slow"
    return rate, useful, f"/dev/kvm runs guest kernel code at {rate / 1e6:.1f} million instructions/s: {verdict}"


def kvm_nests(modules: Path = Path("/sys/module")) -> bool:
    """The kernel's kvm_intel or kvm_amd lets guests have guests. ``Y`` or ``1``, by the module and its version."""
    for module in ("kvm_intel", "kvm_amd"):
        with contextlib.suppress(OSError):
            if (modules / module / "parameters/nested").read_text().strip() in ("Y", "1"):
                return True
    return False
