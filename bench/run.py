"""Measure everything, or what is named: ``python -m bench.run [--quick] [--only fork,exec] [--runs N] [--no-write]``.

Medians of at least 20 runs; the table goes to docs/BENCH.md. With ``--quick`` three runs each, printed and not written.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import posada
from bench import control, guests, peers, report, storm
from bench.series import Figure, written

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (*guests.ALL, "version", "ps", "storm", "peers")
STORM_CYCLES = 200


def tell(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def image_files(host: posada.Host) -> dict[str, Path]:
    """What the peers boot: the kernel, initramfs and disk of the image that posada's own figures use."""
    record = host.images.get(guests.IMAGE).record
    folder = host.home / record.path
    if record.kernel is None or record.disk is None:
        raise SystemExit(f"{guests.IMAGE} is no image that posada built")
    made = sorted((folder.parent / ".initrd").glob(f"{record.digest[:32]}-*"), key=lambda path: path.stat().st_mtime)
    return {
        "kernel": folder / record.kernel, "initrd": made[-1], "disk": folder / record.disk,
        "format": Path(record.disk_format),
    }  # fmt: skip


def measure(host: posada.Host, wanted: set[str], runs: int, cycles: int) -> list[Figure]:
    figures: list[Figure] = []

    def group(name: str, take: Callable[[], list[Figure]]) -> None:
        if name in wanted:
            began = time.monotonic()
            print(f"{name} …", file=sys.stderr, flush=True)
            figures.extend(take())
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    for name, function in guests.ALL.items():
        group(name, lambda function=function: function(host, runs, tell))  # type: ignore[misc]
    group("ps", lambda: control.thousand(runs, tell))
    group("version", lambda: control.start_up(runs, tell))
    group("storm", lambda: storm.figures(cycles, tell))
    if "peers" in wanted:
        files = image_files(host)
        for peer in peers.ALL:
            for key, text in peer(files, min(runs, 20), tell).items():
                for figure in figures:
                    if figure.key == key:
                        figure.peers[peer.__name__] = text
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=STORM_CYCLES, help="of the leak storm")
    parser.add_argument("--quick", action="store_true", help="3 runs, 5 cycles, nothing written")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    if wanted - set(GROUPS):
        parser.error(f"unknown: {', '.join(sorted(wanted - set(GROUPS)))}")
    runs, cycles = (3, 5) if options.quick else (options.runs, options.cycles)

    facts = report.machine()
    home = ROOT / ".cache/demo"  # shares the demo's image
    home.mkdir(parents=True, exist_ok=True)
    tag = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    runtime = Path(tempfile.gettempdir(), f"posada-demo-{os.getuid()}-{tag}")
    runtime.mkdir(mode=0o700, exist_ok=True)
    os.environ |= {"POSADA_HOME": str(home), "POSADA_RUNTIME": str(runtime)}
    with posada.connect(home=home, runtime=runtime) as host:
        host.recover()
        for left in host.vms.list():
            left.delete()
        if not any(guests.IMAGE in image.names for image in host.images.list()):
            print(f"building {guests.IMAGE} …", file=sys.stderr, flush=True)
            host.images.build(guests.IMAGE)
        with host.run(guests.IMAGE, **guests.SPEC) as vm:
            running = vm.refresh().running
            accelerator = running.accelerator if running else "?"
        figures = measure(host, wanted, runs, cycles)
    shutil.rmtree(runtime, ignore_errors=True)
    whole = wanted == set(GROUPS) and not options.quick and not options.no_write
    if whole:
        report.write(figures, facts, accelerator, ROOT / "docs")
        print("written to docs/BENCH.md")
    for figure in figures:
        reach = f"(reach {figure.statistic} ≤ {written(figure.reach, figure.unit)})" if figure.reach is not None else ""
        print(f"{written(figure.result, figure.unit):>10}  {figure.what} {reach} {figure.verdict}")
        for text in (figure.note, *figure.peers.values()):
            if text:
                print(f"{'':>10}    {text}")
    return 1 if any(figure.verdict == "MISSED" for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
