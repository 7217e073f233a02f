#!/usr/bin/env python3
"""Build the guest agent (agent/*.c) with zig's C compiler: static, musl, the same bytes every time.

    build_agent.py [--arch x86_64 --arch aarch64] [--out DIR] [--check-reproducible]

Standard library only: the wheel's build hook and a checkout's first use run it before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "agent"
OUT = ROOT / "src" / "posada" / "guest" / "bin"
ARCHES = ("x86_64", "aarch64")
FLAGS = [
    "-std=gnu11", "-D_GNU_SOURCE", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror",
    "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-Wl,--build-id=none",
    # The tree's place must not show in the binary.
    f"-ffile-prefix-map={ROOT}=.", "-g0", "-fno-ident",
]  # fmt: skip


def inputs() -> list[Path]:
    return sorted(SOURCES.glob("*.[ch]"))


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def fingerprint() -> str:
    """Changes when the sources or the way they are compiled change."""
    digest = hashlib.sha256(" ".join([version(), *(f for f in FLAGS if str(ROOT) not in f)]).encode())
    for path in inputs():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class BuildError(Exception):
    """The agent cannot be built; the text is the compiler's, or says what is missing."""


def compile_agent(arch: str, target: Path, *, cache: Path | None = None) -> None:
    """``cache``: an empty directory in place of zig's own cache, to build really everything. Raises BuildError."""
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("the ziglang package is missing: pip install 'ziglang>=0.13,<1'")
    sources = [p.relative_to(ROOT).as_posix() for p in inputs() if p.suffix == ".c"]
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]
    command = [*compiler, *FLAGS, f'-DAGENT_VERSION="{version()}"', "-o", str(target), *sources]
    fresh = {"ZIG_LOCAL_CACHE_DIR": str(cache), "ZIG_GLOBAL_CACHE_DIR": str(cache)} if cache else {}
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | fresh,
    )
    if done.returncode:
        raise BuildError(done.stdout.strip())


def build(arch: str, out: Path = OUT) -> Path:
    """The agent of ``arch``, built only when the sources changed. Several processes may call it at once.

    Raises BuildError, and OSError where ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    binary, stamp = out / f"posada-agent-{arch}", out / f".posada-agent-{arch}.stamp"
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = fingerprint()
        if binary.exists() and stamp.exists() and stamp.read_text() == wanted:
            return binary
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            fresh = Path(scratch) / binary.name
            compile_agent(arch, fresh)
            fresh.chmod(0o755)
            os.replace(fresh, binary)
        stamp.write_text(wanted)
    return binary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--arch", action="append", choices=ARCHES, help="default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check-reproducible", action="store_true", help="build again and compare the bytes")
    options = parser.parse_args()
    for arch in options.arch or ARCHES:
        try:
            binary = build(arch, options.out)
            if options.check_reproducible:
                with tempfile.TemporaryDirectory() as scratch:
                    compile_agent(arch, Path(scratch) / "again", cache=Path(scratch) / "cache")
                    if (Path(scratch) / "again").read_bytes() != binary.read_bytes():
                        raise BuildError(f"{arch} differs from one build to the next")
        except BuildError as error:
            print(f"build_agent: {error}", file=sys.stderr)
            return 1
        print(f"{binary}  {binary.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
