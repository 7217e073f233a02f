"""Figures of the kvm engine on stock kernels, beside QEMU with KVM: ``make bench-lab``.

Both run in the lab (tests/lab/lab_kit.py), a machine with a real /dev/kvm on any computer. Its processor is emulated, so
absolute times say little; the ratios compare monitors on one machine. A part is two to four minutes, in a lab of its own;
what it finds goes to docs/bench-lab.json, and what stands there, of this part and the others, to docs/BENCH-LAB.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests/lab")]

import lab_kit  # type: ignore[import-not-found]  # noqa: E402

import posada  # noqa: E402
from bench import lab_report, report  # noqa: E402

PARTS = ("boot", "fork", "blk", "net", "compute")
#: Seconds of one part in the lab.
TIMEOUT = 200.0


def compile_program(folder: Path) -> Path:
    """bench/guest_io.c, static: it runs in any guest. Raises CalledProcessError."""
    program = folder / "guest_io"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-std=gnu11", "-O2", "-static"]
    subprocess.run([*compiler, "-o", str(program), str(ROOT / "bench/guest_io.c")], check=True)
    return program


def measure(part: str, runs: int) -> dict[str, Any]:
    """``values`` (figure → who → values) and ``died`` (who → guests that did). Raises NoLab, CommandError.

    A lab that dies, as emulated ones do, has still said what it found until then.
    """
    output = b""
    with tempfile.TemporaryDirectory(prefix="posada-bench-") as scratch, lab_kit.labs(tell) as lab:
        lab.vm.files.upload(compile_program(Path(scratch)), "/root/guest_io")
        argv = ["python3", "-m", "bench.lab_inside", "/root/guest_io", str(runs), part]
        where = {"cwd": lab_kit.TREE, "env": lab_kit.ENVIRONMENT, "timeout": TIMEOUT, "check": True}
        try:
            with lab.vm.exec(*argv, stream=True, **where) as process:
                for event in process:
                    if event.stream == "stdout":
                        output += event.data
                    else:
                        print(event.text, end="", file=sys.stderr, flush=True)
                process.wait()
        except posada.Timeout as error:
            tell(f"the lab does not answer any more: {error}")
    return collect(output)


def collect(output: bytes) -> dict[str, Any]:
    """From the lines of `bench.lab_inside`. Of each the runs in which all took part."""
    values: dict[str, dict[str, list[float]]] = {}
    died: dict[str, int] = {}
    for line in output.splitlines():
        found = json.loads(line)
        if "died" in found:
            died[found["died"]] = died.get(found["died"], 0) + 1
        else:
            values.setdefault(found["key"], {}).setdefault(found["who"], []).append(found["value"])
    for key, of in values.items():
        enough = {who: taken for who, taken in of.items() if len(taken) > 1} or of  # a guest may die at once
        least = min(map(len, enough.values()))
        values[key] = {who: taken[:least] for who, taken in enough.items()}
    return {"values": values, "died": died}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=10, help="of each figure, beside one that does not count")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if set(wanted) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(set(wanted) - set(PARTS)))}")
    path = ROOT / "docs/bench-lab.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in wanted:
        facts = report.machine() | {"taken": datetime.now(UTC).date().isoformat()}
        kept[part] = {"facts": facts, **measure(part, options.runs)}
        if not options.no_write:
            path.write_text(json.dumps(kept, indent=1) + "\n")
            (ROOT / "docs/BENCH-LAB.md").write_text(lab_report.markdown(kept))
    print("\n".join(lab_report.table({part: kept[part] for part in wanted})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
