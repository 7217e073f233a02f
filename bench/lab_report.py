"""docs/BENCH-LAB.md, from what `bench.lab` has kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.series import percentile, written

#: Who is compared with the kvm engine, and what the columns are called.
PEERS = {"microvm": "QEMU, microvm", "pc": "QEMU, pc with PCI", "engine": "posada's qemu engine"}


@dataclass(frozen=True)
class Line:
    """One figure. ``reach``: bound on kvm divided by ``against`` (of several, the best); from above for times, from below
    for rates. No ``against``: reported only.
    """

    part: str
    key: str
    what: str
    unit: str
    reach: float
    against: tuple[str, ...]
    more_is_better: bool = True

    def ratio(self, values: Mapping[str, list[float]]) -> tuple[float, str]:
        """By medians, to the best of the peers; and who that is."""
        medians = {who: percentile(values[who], "p50") for who in self.against}
        best = (max if self.more_is_better else min)(medians, key=lambda who: medians[who])
        return percentile(values["kvm"], "p50") / medians[best], best

    def reached(self, ratio: float) -> bool:
        return ratio >= self.reach if self.more_is_better else ratio <= self.reach


VIRTIO = ("microvm", "pc")
LINES = (
    Line("boot", "boot", "boot of one kernel and initramfs to the agent's answer", "ms", 1.0, ("microvm",), False),
    Line("boot", "first", "the same, the first machine that a process starts", "ms", 1.0, ("microvm",), False),
    Line("fork", "fork", "fork of a running Debian guest → verified reply", "ms", 0.2, ("engine",), False),
    Line("blk", "random1", "virtio-blk, 4 KiB random reads, one at a time", "/s", 0.7, VIRTIO),
    Line("blk", "random8", "the same, eight at a time", "/s", 0.7, VIRTIO),
    Line("blk", "stream", "virtio-blk, 1 MiB reads in order", "MiB/s", 0.95, VIRTIO),
    Line("net", "send", "virtio-net, TCP stream out of the guest, passt", "MiB/s", 0.95, ("pc",)),
    Line("net", "receive", "virtio-net, TCP stream into the guest, passt", "MiB/s", 0.95, ("pc",)),
    Line("net", "send1500", "the same out at an MTU of 1500", "MiB/s", 0.95, ("pc",)),
    Line("net", "receive1500", "the same in at an MTU of 1500", "MiB/s", 0.95, ("pc",)),
    Line("compute", "loop", "a loop in the guest's user space", "M turns/s", 0.99, VIRTIO),
)


def table(kept: Mapping[str, Any]) -> list[str]:
    columns = ["figure", "kvm engine", *PEERS.values(), "kvm ÷ the best", "reach", "verdict"]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for line in LINES:
        values = kept.get(line.part, {}).get("values", {}).get(line.key, {})
        if not {"kvm", *line.against} <= values.keys():
            continue
        cells = [line.what, *(_cell(values.get(who), line.unit) for who in ("kvm", *PEERS))]
        ratio, _ = line.ratio(values)
        sign = "≥" if line.more_is_better else "≤"
        cells += [f"{ratio:.2f}", f"{sign} {line.reach:g}", "reached" if line.reached(ratio) else "MISSED"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(values: list[float] | None, unit: str) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{written(percentile(values, 'p50'), unit)} ({written(low, unit)} – {written(high, unit)})"


def markdown(kept: Mapping[str, Any]) -> str:
    return "\n".join([*HEAD, *table(kept), "", *_taken(kept), "", *HOW]) + "\n"


def _taken(kept: Mapping[str, Any]) -> list[str]:
    lines = ["| part | taken | on | load before | runs | guests that died |", "| --- | --- | --- | --- | --- | --- |"]
    for part, found in kept.items():
        facts = found["facts"]
        counts = {len(taken) for of in found["values"].values() for taken in of.values()} or {0}
        runs = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
        died = ", ".join(f"{who} {count}" for who, count in found["died"].items()) or "none"
        machine = f"{facts['processor']}, {facts['memory']}, {facts['system']}, {facts['qemu']}"
        lines.append(f"| {part} | {facts['taken']} | {machine} | {facts['load']} | {runs} | {died} |")
    return lines


HEAD = [
    "# Figures of the kvm engine on stock kernels",
    "",
    "Written by `make bench-lab`; do not edit. Taken in the lab (ADR 11): Debian 12 with its own `kvm_amd` in a machine whose",
    "processor QEMU emulates. The ratios count; the times are those of an emulated machine. Medians (least – most).",
    "",
]

HOW = """\
## How

- **One lab for all of a part**, the processor and nothing else emulated by QEMU without KVM; in it Debian's `kvm_amd`, two
  vcpus, and QEMU 7.2 from Debian. Parts are taken apart from each other: `make bench-lab BENCH_ARGS="--only blk"`.
- **Who is compared takes turns within each run**, and the first run does not count: the emulator translates code when it is
  first met. All guests: the image's own kernel 6.1 (`vmlinux`, entered by PVH), the same initramfs, a qcow2 layer on the same
  disk, 1 vCPU, 256 MiB, `mitigations=off norandmaps`.
- **Boot**: from the call of the engine's `start`, or the exec of QEMU, to the answer of the guest's agent, by one client
  (vsock with the kvm engine, virtio-serial with QEMU). microvm: `acpi=on,rtc=on,isa-serial=on,pcie=off`, command line with the
  same `pci=off i8042.*`; `pit=off` was slower. The first machine that a
  process starts with the kvm engine waits for an interpreter and its imports (`src/posada/vmm/nursery.py`), later ones do not.
- **Fork**: from the call of `vm.fork(1)` to a file of the source's memory, read through the child's own agent; without network.
- **virtio-blk**: `bench/guest_io.c` in the guest reads a raw, read-only disk of 96 MiB past the guest's page cache; the host has
  it in its own. QEMU: `-drive` with its defaults. microvm has virtio on MMIO like the kvm engine, pc has it on PCI.
- **virtio-net**: one TCP stream between the guest and a C program on the lab's loopback, 2 s, counted until the receiver has
  read all; the same passt with the same options in front of both monitors, `host_mtu` set for QEMU (pc). 32,768 bytes is the MTU
  that guests of the kvm engine have.
- **Compute**: turns of an empty loop in 2 s.
- A guest that dies while it boots is started again, and counted in the table above: guests of an emulated lab do, with any
  monitor.
""".splitlines()
