"""Figures of the kvm engine that a host gives directly, toy guests on /dev/kvm: ``python -m bench.kvm [--runs N] [--no-write]``.

Written to docs/BENCH-KVM.md with how they were taken; nothing here passes or fails. Each series runs in a process of its
own, started like a monitor (``python -I -S``), on all of the host's processors: take them on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SERIES = ("fork", "touched", "memory", "reset", "exits")

Values = dict[str, Any]


def run(series: str, runs: int) -> Values:
    """One series in a fresh interpreter. Raises CalledProcessError."""
    command = [sys.executable, "-I", "-S", str(ROOT / "bench" / "kvm_series.py"), series, str(runs)]
    env = {"MALLOC_ARENA_MAX": "2", "LD_BIND_NOW": "1"}  # as `posada.engine.kvm.spawn`
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600, env=env)
    return dict(json.loads(done.stdout))


def through_the_api(runs: int) -> Values:
    """`bench.kvm_api`, in a Python with posada's dependencies. Raises CalledProcessError."""
    command = [sys.executable, str(ROOT / "bench" / "kvm_api.py"), "api", str(runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return dict(json.loads(done.stdout))


def how() -> str:
    """``chrt -r 10 python -m bench.kvm`` gives figures on a host that others use as well; the report says so."""
    real = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    return (
        "; taken at real-time priority, which keeps others off the processors but not out of the caches" if real else ""
    )


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def spread(values: list[float]) -> str:
    """p50, p99, the least and p10, in the values' unit: the latter two say what a busy host hides."""
    least, p10, p50, p99 = min(values), *(percentile(values, share) for share in (0.1, 0.5, 0.99))
    return f"p50 {p50:.2f}, p99 {p99:.2f} (least {least:.2f}, p10 {p10:.2f})"


def markdown(found: dict[str, Values], facts: dict[str, str]) -> str:
    fork, touched, memory, reset, exits, api = (found[name] for name in (*SERIES, "api"))
    rows = [
        ("fork of a 256 MiB toy guest, call → child's first exit, ms", spread(fork["first"]), "p50 ≤ 1.5, p99 ≤ 5"),
        ("the same, processor time of parent and child on the way there, ms", spread(fork["spent"]), "–"),
        ("the same → first exit answered by a device of the child, ms", spread(fork["answered"]), "–"),
        ("its parent stands still, ms", spread(fork["pause"]), "–"),
        ("fork through the Python API (`VM.fork`), no disk, no network, ms", spread(api["plain"]["took"]), "p50 ≤ 5"),
        ("its caller's processor time, ms", spread(api["plain"]["spent"]), "–"),
        ("fork through the Python API with a disk, ms", spread(api["disk"]["took"]), "–"),
        ("fork with all of the 256 MiB touched, first exit, ms", spread(touched["first"]), "–"),
        ("… with transparent huge pages (`hugepages`), ms", spread(touched["huge"]), "–"),
        (
            "in-place reset, 50 dirty pages, with the guest's run that dirties them, per second of processor",
            f"{reset['with_run']:,.0f}",
            "≥ 3,000",
        ),
        ("the reset alone, per second of processor", f"{reset['alone']:,.0f}", "–"),
        ("… of a machine that runs in its own thread, per second", f"{reset['threaded']:,.0f}", "–"),
        ("private memory of the first monitor, MiB", f"{memory['first'] / 1024:.1f}", "≤ 30"),
        ("private memory of a forked child, MiB", f"{memory['child'] / 1024:.1f}", "≤ 6"),
        ("port writes answered by a Python device, exits per second of one vcpu", f"{exits['pio']:,.0f}", "–"),
        ("MMIO reads answered by a Python device, exits per second", f"{exits['mmio']:,.0f}", "–"),
        ("KVM_RUN alone, exits per second (no device, no thread)", f"{exits['bare']:,.0f}", "–"),
    ]
    lines = [
        "# Figures of the kvm engine, taken directly",
        "",
        "Written by `python -m bench.kvm`; do not edit. Toy guests on the host's `/dev/kvm`; what needs a stock kernel is",
        "taken in the lab. Reported, never asserted.",
        "",
        f"Taken {facts['taken']} on {facts['processor']}, {facts['memory']}, {facts['system']}, Python {facts['python']}.",
        f"Load average before: {facts['load']}{facts['how']}. {facts['runs']} forks, 20 ms apart; {reset['count']:,} resets.",
        "",
        "| figure | measured | reach |",
        "| --- | --- | --- |",
        *(f"| {what} | {value} | {reach} |" for what, value, reach in rows),
        "",
        "## How",
        "",
        "- **Fork**: a whole `Machine` (serial, RTC, power, rng, balloon, vsock), 1 vcpu, in-kernel irqchip, a guest that",
        "  counts and writes the count to a port. From the call of `Forker.fork` in the parent, vcpu running, to the return of",
        "  the child's first KVM_RUN, by one monotonic clock. *Answered*: the child has its own descriptors, and its device",
        "  got the write.",
        "- **Through the API**: `posada.connect`, then `fork(same_identity=True)` of a guest that halts, one child at a time;",
        "  from the call to the return, when the child is recorded and on its own.",
        "- **Reset**: the guest writes one word in each of 50 pages, and to a port; `Point.put_back` puts memory, vcpu,",
        "  interrupt chips and devices back. Per second of this process's processor time, the guest's instructions included in",
        "  *with the guest's run*.",
        "- **Private memory**: `Private_Dirty` of /proc/self/smaps without guest memory, after the first exits. The child's:",
        f"  {', '.join(f'{kib} KiB {name}' for name, kib in memory['parts'].items())}.",
        "  Page tables and kernel objects are not in it.",
        "- **Exits**: the vcpu in its own thread, the loop idle; a second of them.",
        "",
        "## Where the time of a fork goes",
        "",
        "Microseconds from the call, median; each step ends there.",
        "",
        "| step | at |",
        "| --- | --- |",
        *(f"| {name} | {percentile(values, 0.5):,.0f} |" for name, values in fork["steps"].items()),
        "",
        f"Page faults of the child until its first exit: {percentile(fork['faults'], 0.5):.0f}.",
        "",
        "## Where the time of an exit goes",
        "",
        "Share of samples of the vcpu's thread by function (a sampler on the main thread, every millisecond).",
        "",
        "| function | share |",
        "| --- | --- |",
        *(f"| `{name}` | {share:.0%} |" for name, share in exits["profile"].items()),
        "",
        "## Where the time of a reset goes",
        "",
        "| request | µs |",
        "| --- | --- |",
        *(f"| {name} | {cost:.1f} |" for name, cost in reset["costs"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    from bench import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise SystemExit("/dev/kvm cannot be opened for reading and writing")
    facts = report.machine() | {"taken": datetime.now(UTC).date().isoformat(), "runs": str(options.runs), "how": how()}
    found = {series: run(series, options.runs) for series in SERIES}
    text = markdown(found | {"api": through_the_api(options.runs // 3)}, facts)
    if options.no_write:
        print(text)
    else:
        (ROOT / "docs" / "BENCH-KVM.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
