"""What tests do to a Debian guest that has no more than Debian's essential packages: perl is one, kmod and Python are not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import posada
from posada.engine.kvm import control
from posada.proto.monitor import Op
from posada.vmm import layout

#: An emulated lab translates a guest's code anew for each address it is at, and pays dearly for mitigations.
APPEND = "mitigations=off norandmaps"
KERNELS = Path(os.environ.get("POSADA_LAB", "/data"), "kernels")
SUITES = {"debian:12": "bookworm", "debian:13": "trixie"}

#: What EFLAGS can have: all but bits 3, 5, 15 and those from 22 on.
_FLAGS = 0x3F_7FD7
#: QEMU's emulation of SVM loses the flags of guests now and then (docs/adr/0011-the-lab-is-a-posada-vm.md).
_BOOTS = 3

#: finit_module(2)
_LOAD = 'open(M, "<", $ARGV[0]) or die; syscall(313, fileno(M), my $none = "", 0) == 0 or die "$ARGV[0]: $!"'


def impossible_flags(said: str) -> list[str]:
    """The values of EFLAGS in what a kernel said at its end that no processor can have: its processor is broken, not it."""
    return [found for found in re.findall(r"EFLAGS: ([0-9a-f]{8})\b", said) if int(found, 16) & ~_FLAGS]


@contextlib.contextmanager
def booted(image: str, **spec: Any) -> Iterator[posada.VM]:
    """A machine that is ready, deleted at the end. A boot in which the lab's processor is seen to be broken is repeated."""
    with posada.connect() as host:
        for left in reversed(range(_BOOTS)):
            vm = host.vms.create(image, engine="kvm", boot={"append": APPEND}, **{"memory": "256MiB", **spec})
            try:
                vm.start(timeout=120)
                break
            except posada.PosadaError:
                flags = impossible_flags(vm.logs())
                vm.delete()
                if not (left and flags):
                    raise
                sys.stderr.write(f"lab fault: EFLAGS {' '.join(flags)}; once more\n")
            except BaseException:
                vm.delete()
                raise
        try:
            yield vm
        finally:
            vm.delete()


def runtime(vm: posada.VM) -> Path:
    """Where its sockets are."""
    running = vm.refresh().running
    assert running is not None
    return Path(running.runtime)


def ask(vm: posada.VM, op: Op) -> Mapping[str, Any]:
    """A request to its monitor, as the engine would send it."""

    async def asked() -> Mapping[str, Any]:
        async with control.connect(runtime(vm)) as session:
            return await session.call(op)

    return asyncio.run(asked())


def sh(vm: posada.VM, script: str) -> str:
    return vm.shell(script, check=True).stdout


def perl(vm: posada.VM, script: str, *arguments: str) -> str:
    return vm.exec("perl", "-e", script, *arguments, check=True).stdout


def load_modules(vm: posada.VM, suite: str) -> None:
    """Those that the lab has for its tests (`lab_parts.EXTRA`) and no guest needs to boot."""
    vm.files.write_tar("/run/extra", [(KERNELS / suite / "extra.tar").read_bytes()])
    for path in sh(vm, "ls /run/extra/*.ko").split():
        perl(vm, _LOAD, path)


def symbols(vm: posada.VM, *names: str) -> list[int]:
    """Where the guest's kernel has them."""
    sh(vm, "echo 1 > /proc/sys/kernel/kptr_restrict")  # at 0 only hashes are shown, at 1 root sees all
    lines = sh(vm, f"grep -E ' ({'|'.join(names)})$' /proc/kallsyms").splitlines()
    found = {line.split()[2]: int(line.split()[0], 16) for line in lines}
    return [found[name] for name in names]


def mapped_device(vm: posada.VM) -> int:
    """The linear address at which the guest's kernel has the first virtio device's registers."""
    sh(vm, "echo 1 > /proc/sys/kernel/kptr_restrict")
    lines = sh(vm, "cat /proc/vmallocinfo")
    found = re.search(rf"^0x([0-9a-f]+)-.*phys=0x0*{layout.VIRTIO_MMIO:x} ioremap", lines, re.MULTILINE)
    assert found, lines
    return int(found[1], 16)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Fails when it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
