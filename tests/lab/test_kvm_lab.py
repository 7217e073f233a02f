"""The kvm engine where ``/dev/kvm`` is real: in labs (see lab_kit.py). Each test here waits for a suite that runs in one.

The suites begin in this order, several at once. The longest are first, so that none of them is the last to end.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lab_parts import ROOT
from lab_suites import runs

pytestmark = pytest.mark.timeout(1800)

Suite = Callable[[], None]

#: QEMU 7.2 does not give a guest's guest its debug registers; 10 does. Each test finds that out by itself.
NO_BREAKPOINTS = "no hardware breakpoints for guests"


@runs("tests/lab/inside/test_real_kvm.py", timeout=60)
def test_hardware_runs_guests_in_the_lab(suite: Suite) -> None:
    suite()


@runs(
    "tests/contract",
    env={"POSADA_ENGINES": "kvm"},
    timeout=1500,
    may_skip="only the fake engine fails on demand",
)
def test_the_contract_holds_on_the_kvm_engine(suite: Suite) -> None:
    suite()


@runs(
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/unit/test_kvm_*.py")),
    timeout=400,
    may_skip=NO_BREAKPOINTS,
)
def test_kvm_on_the_kernels_own_terms(suite: Suite) -> None:
    """The ioctl layer's tests, that run on any /dev/kvm, on one that is not emulated by its host."""
    suite()


@runs("tests/lab/inside/test_boot.py", timeout=400)
def test_debians_kernels_boot(suite: Suite) -> None:
    suite()


@runs("tests/lab/inside/test_debian.py", timeout=400)
def test_debian_uses_its_devices(suite: Suite) -> None:
    suite()


@runs("tests/lab/inside/test_debug.py", timeout=400, may_skip=NO_BREAKPOINTS)
def test_a_debian_kernel_is_debugged(suite: Suite) -> None:
    suite()


@runs("tests/lab/inside/test_folders.py", timeout=300)
def test_debian_has_folders_of_the_host(suite: Suite) -> None:
    suite()


@runs("tests/lab/inside/test_migrate.py", timeout=300)
def test_debian_moves_to_another_monitor(suite: Suite) -> None:
    suite()


@runs("tests/lab/inside/test_reset.py", timeout=200)
def test_debian_is_put_back_in_place(suite: Suite) -> None:
    suite()
