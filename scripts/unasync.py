#!/usr/bin/env python3
"""Generate the sync API (``client/_sync``) and its tests from the async ones. ``--check`` only compares.

The async source keeps to what the substitutions below can turn round: every call that waits goes through
``self._rt.run(coroutine)``, so the sync twin differs in keywords, names and the runtime it is made with.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "src" / "posada" / "client"
#: Single files: the tests of the API.
FILES = {ROOT / "tests/unit/test_client_async.py": ROOT / "tests/unit/test_client_sync.py"}

HEADER = "# Generated from {} by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.\n"

#: Whole lines that have no place in the sync twin.
DROP = re.compile(r"\s*@pending|from posada\.client\._pending import .*")

SUBSTITUTIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"posada\.client\._async", "posada.client._sync"),
        (r"posada\.aio\b", "posada"),
        (r"\basync (def|with|for)\b", r"\1"),
        (r"``async with", "``with"),
        (r"\bawait ", ""),
        (r"\bPending\[([\w.]+)\]", r"\1"),
        (r"\bAsyncRuntime\b", "SyncRuntime"),
        (r"\bAsyncIterator\b", "Iterator"),
        (r" \| AsyncIterable\[bytes\]", ""),
        (r"AsyncIterable, ", ""),
        (r"^from posada import aio as api", "import posada as api"),
        (r"\bAsyncExitStack\b", "ExitStack"),
        (r"\benter_async_context\b", "enter_context"),
        (r"__aenter__", "__enter__"),
        (r"__aexit__", "__exit__"),
        (r"__aiter__", "__iter__"),
    )
]


def unasync(text: str, name: str) -> str:
    """The sync twin of one file's text."""
    out = [HEADER.format(name)]
    for line in text.splitlines(keepends=True):
        if DROP.fullmatch(line.rstrip("\n")):
            continue
        for pattern, replacement in SUBSTITUTIONS:
            line = pattern.sub(replacement, line)
        out.append(line)
    return "".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a generated file is out of date")
    check = parser.parse_args().check
    stale = []
    wanted = {
        target: "# ruff: noqa: I001\n" + unasync(source.read_text(), source.name) for source, target in FILES.items()
    }
    for source in sorted((CLIENT / "_async").glob("*.py")):
        wanted[CLIENT / "_sync" / source.name] = unasync(source.read_text(), f"_async/{source.name}")
    for old in sorted((CLIENT / "_sync").glob("*.py")):
        if old not in wanted:
            stale.append(old)
            if not check:
                old.unlink()
    for target, text in wanted.items():
        if not target.exists() or target.read_text() != text:
            stale.append(target)
            if not check:
                target.write_text(text)
    if check and stale:
        print("out of date, run `python scripts/unasync.py`:", *stale, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
