"""That the lab is one: its /dev/kvm is the kernel's own module on a processor that runs guests."""

from __future__ import annotations

from pathlib import Path

from posada.engine.common.kvm import kvm_rate
from posada.engine.registry import load

#: Kernels that emulate what guests run at ring 0 reach two million instructions a second.
EMULATED = 2e6


def test_guests_run_as_fast_as_the_lab_itself() -> None:
    rate, useful, words = kvm_rate()
    assert useful, words
    assert rate > 20 * EMULATED, words


def test_it_is_the_real_module() -> None:
    modules = Path("/proc/modules").read_text()
    assert any(line.startswith(("kvm_amd ", "kvm_intel ")) for line in modules.splitlines()), modules


def test_qemu_takes_it() -> None:
    assert load("qemu").capabilities().accelerator == "kvm"
