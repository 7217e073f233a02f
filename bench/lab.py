"""Figures of the kvm engine on stock kernels, beside QEMU with KVM: ``python -m bench.lab [--runs N] [--no-write]``.

Both run in the lab (tests/lab/lab_kit.py), a machine with a real /dev/kvm on any computer. Its processor is emulated, so
absolute times say little; the ratios compare two monitors on one machine. Written to docs/BENCH-LAB.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/lab")]

import lab_kit  # noqa: E402

from bench import report  # noqa: E402
from bench.series import percentile, written  # noqa: E402

#: Time in the lab for all of it, seconds.
TIMEOUT = 1800.0


@dataclass(frozen=True)
class Line:
    """One figure. ``reach``: bound on kvm divided by QEMU; from above for times, from below for rates."""

    key: str
    what: str
    unit: str
    reach: float
    more_is_better: bool = True

    def verdict(self, ratio: float) -> str:
        reached = ratio >= self.reach if self.more_is_better else ratio <= self.reach
        return "reached" if reached else "MISSED"


LINES = (
    Line("boot", "boot of one kernel and initramfs to the agent's answer (QEMU: microvm)", "ms", 1.0, False),
    Line("fork", "fork of a running Debian guest → verified reply (QEMU: posada's qemu engine)", "ms", 0.2, False),
    Line("random1", "virtio-blk, 4 KiB random reads, one at a time", "/s", 0.7),
    Line("random8", "the same, eight at a time", "/s", 0.7),
    Line("stream", "virtio-blk, 1 MiB reads in order", "MiB/s", 0.95),
    Line("loop", "a loop in the guest's user space", "M turns/s", 0.99),
)


def measure(runs: int) -> Mapping[str, Mapping[str, list[float]]]:
    """Key → engine → values. Raises posada.CommandError, NoLab, CalledProcessError."""
    with tempfile.TemporaryDirectory(prefix="posada-bench-") as scratch:
        program = Path(scratch) / "guest_io"
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-std=gnu11", "-O2", "-static"]
        subprocess.run([*compiler, "-o", str(program), str(ROOT / "bench/guest_io.c")], check=True)
        with lab_kit.labs(lambda text: print(text, file=sys.stderr)) as lab:
            lab.vm.files.upload(program, "/root/guest_io")
            output = lab.run("python3", "-m", "bench.lab_inside", "/root/guest_io", str(runs), timeout=TIMEOUT)
    return dict(json.loads(output))


def markdown(found: Mapping[str, Mapping[str, list[float]]], facts: Mapping[str, str]) -> str:
    lines = [
        "# Figures of the kvm engine on stock kernels",
        "",
        "Written by `python -m bench.lab`; do not edit. Taken in the lab: Debian 12 with its own `kvm_amd` in a machine whose",
        "processor QEMU emulates, posada's monitor and QEMU one after the other in the same lab. The ratios count, the times",
        "are those of an emulated machine. Guests: Debian 12, 1 vCPU, 256 MiB, `mitigations=off norandmaps`. Medians.",
        "",
        f"Taken {facts['taken']} on {facts['processor']}, {facts['memory']}, {facts['system']}; {facts['qemu']}, the same",
        f"version in the lab; load average before: {facts['load']}.",
        "",
        "| figure | kvm engine | QEMU with KVM | kvm ÷ QEMU | reach | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in LINES:
        mine, other = found[line.key]["kvm"], found[line.key]["qemu"]
        ratio = percentile(mine, "p50") / percentile(other, "p50")
        sign = "≥" if line.more_is_better else "≤"
        values = " | ".join(
            f"{written(percentile(v, 'p50'), line.unit)} ({written(min(v), line.unit)} – {written(max(v), line.unit)})"
            for v in (mine, other)
        )
        lines.append(f"| {line.what} | {values} | {ratio:.2f} | {sign} {line.reach:g} | {line.verdict(ratio)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    facts = report.machine() | {"taken": datetime.now(UTC).date().isoformat()}
    text = markdown(measure(options.runs), facts)
    if options.no_write:
        print(text)
    else:
        (ROOT / "docs" / "BENCH-LAB.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
