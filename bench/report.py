"""The table as people read it (docs/BENCH.md), and all values as JSON beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import posada
from bench.series import Figure, percentile, written


def machine() -> dict[str, str]:
    """What the figures are taken on. To be asked before they are taken."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    system = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    qemu = shutil.which("qemu-system-x86_64")
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout if qemu else "none"
    return {
        "processor": f"{len(os.sched_getaffinity(0))} × {model}",
        "memory": f"{memory} GiB",
        "system": system.get("PRETTY_NAME", "?").strip('"') + f", Linux {platform.release()}",
        "python": platform.python_version(),
        "qemu": version.splitlines()[0],
        "posada": posada.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def markdown(figures: Sequence[Figure], facts: dict[str, str], accelerator: str, taken: str) -> str:
    lines = [
        "# Figures",
        "",
        "Written by `make bench`; do not edit. Every value was verified before it counted: a reply, a nonce that only the",
        "source's memory held, a count. Guests: Debian 12, 1 vCPU, 512 MiB. Peers ran on the same machine in the same run.",
        "",
        f"Taken {taken} with posada {facts['posada']} on {facts['processor']}, {facts['memory']}, {facts['system']};",
        f"{facts['qemu']}; accelerator: {accelerator}; Python {facts['python']}. Load average before it began:",
        f"{facts['load']}.",
        "",
        "| figure | reach | measured | min – p99 | runs | verdict | peers, same run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for figure in figures:
        reach = f"{figure.statistic} ≤ {written(figure.reach, figure.unit)}" if figure.reach is not None else ""
        spread = ""
        if len(figure.values) > 1:
            low, high = (written(percentile(figure.values, name), figure.unit) for name in ("min", "p99"))
            spread = f"{low} – {high}"
        peers = "<br>".join(figure.peers.values())
        lines.append(
            f"| {figure.what} | {reach} | {written(figure.result, figure.unit)} | {spread} | {len(figure.values)} "
            f"| {figure.verdict} | {peers} |"
        )
    notes = [f"- **{figure.what}**: {figure.note}" for figure in figures if figure.note]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"


def write(figures: Sequence[Figure], facts: dict[str, str], accelerator: str, docs: Path) -> None:
    """docs/BENCH.md and docs/bench.json."""
    taken = datetime.now(UTC).strftime("%Y-%m-%d")
    (docs / "BENCH.md").write_text(markdown(figures, facts, accelerator, taken))
    data = {
        "taken": taken, "machine": facts, "accelerator": accelerator,
        "figures": {figure.key: figure.as_json() for figure in figures},
    }  # fmt: skip
    (docs / "bench.json").write_text(json.dumps(data, indent=1) + "\n")
