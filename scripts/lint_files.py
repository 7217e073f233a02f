"""Rules about files that no other linter knows.

- No source file is longer than 700 lines; above 400 it is named, not refused.
- A line that touches a raw pointer says on itself, or in the comment above it, why that is safe: ``SAFETY:``.
- Nothing names a place that exists on one person's machine only.
- Every path that ARCHITECTURE.md or a hazard's row names exists, and so does every relative link in a Markdown file.
- What runs without posada's environment imports the standard library only.
- Every module of posada says in a docstring what it is.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

WARN_LINES, MAX_LINES = 400, 700
SOURCES = {".py", ".c", ".h", ".sh", ".js", ".css", ".html"}
TEXTS = SOURCES | {".md", ".toml", ".yml", ".yaml", ".json", ""}

#: Generated: their source is checked instead.
GENERATED = ("src/posada/client/_sync/", "tests/client/_sync/")

#: Runs under ``python -I -S``: no site-packages; of posada only what is listed.
_MONITOR = (
    "posada.runtime", "posada.errors", "posada.kvm", "posada.vmm", "posada.proto.cbor", "posada.proto.monitor",
    "posada.proto.qcow2", "posada.proto.migration",
)  # fmt: skip
STDLIB_ONLY = {
    "src/posada/engine/qemu/keeper/": ("posada.runtime", "posada.engine.qemu.keeper"),
    "src/posada/runtime/": ("posada.runtime",),
    "src/posada/kvm/": ("posada.kvm", "posada.errors"),
    "src/posada/vmm/": _MONITOR,
    "src/posada/proto/monitor.py": ("posada.proto.cbor", "posada.errors"),
    "src/posada/proto/cbor.py": (),
    "src/posada/proto/qcow2.py": ("posada.errors", "posada.model.units"),
    "src/posada/model/units.py": ("posada.errors",),
}

RAW_POINTER = re.compile(
    r"ctypes\.(cast|string_at|wstring_at|memmove|memset|addressof|pointer|byref)\(|\.from_address\(|\.from_buffer\("
)
ONE_MACHINE = re.compile(r"(?<![\w.$~{}/-])/(home/[a-z]\w*|roo[t]/\.|User[s]/|wor[k]/|tm[p]/[a-z]{1,2}/)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
QUOTED = re.compile(r"`([\w.-]+(?:/[\w.*-]+)*/?)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class Finding(str):
    """One broken rule, as ``path:line: what``."""


def repository_files(root: Path) -> list[str]:
    """Every file git tracks or would track, that exists."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def check_length(name: str, text: str) -> tuple[Finding | None, str | None]:
    """(what is refused, what is only worth a look)."""
    lines = text.count("\n")
    if lines > MAX_LINES:
        return Finding(f"{name}: {lines} lines; split it (at most {MAX_LINES})"), None
    return None, f"{name}: {lines} lines" if lines > WARN_LINES else None


def check_pointers(name: str, text: str) -> Iterator[Finding]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not RAW_POINTER.search(line) or line.lstrip().startswith("#"):
            continue
        above = number - 2
        comment = line
        while above >= 0 and lines[above].lstrip().startswith("#"):
            comment += lines[above]
            above -= 1
        if "SAFETY:" not in comment:
            yield Finding(f"{name}:{number}: a raw pointer without a SAFETY: comment that says why it holds")


def check_places(name: str, text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), 1):
        found = ONE_MACHINE.search(line)
        if found:
            yield Finding(f"{name}:{number}: {found[0]!r} is a place on one machine")


def check_stdlib_only(name: str, text: str, allowed: Sequence[str] = ()) -> Iterator[Finding]:
    """``allowed``: modules of posada, with what is below them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or "."
            modules = [whole] if not node.level else [] if node.level == 1 else [".."]
            if whole in ("posada", "posada.proto"):
                modules = [f"{whole}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            ours = any(module == known or module.startswith(f"{known}.") for known in allowed)
            if module.partition(".")[0] not in {*sys.stdlib_module_names, "_typeshed"} and not ours:
                yield Finding(f"{name}:{node.lineno}: imports {module}; it has to do with the standard library")


def check_docstring(name: str, text: str) -> Iterator[Finding]:
    if text.strip() and ast.get_docstring(ast.parse(text)) is None:
        yield Finding(f"{name}:1: no docstring says what the module is")


def check_links(name: str, text: str, root: Path) -> Iterator[Finding]:
    folder = (root / name).parent
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" not in target and not target.startswith("mailto:") and not (folder / target).exists():
            yield Finding(f"{name}: links to {target}, which does not exist")


def check_named_paths(name: str, text: str, files: Sequence[str]) -> Iterator[Finding]:
    """A quoted word that looks like a file or folder must end the path of one."""
    known = {f"/{f}" for f in files} | {f"/{parent}/" for f in files for parent in Path(f).parents}
    for token in QUOTED.findall(FENCE.sub("", text)):
        is_path = token.endswith((".py", ".c", ".md", "/")) or token.startswith(("src/", "docs/", "tests/", "scripts/"))
        if is_path and not any(k.endswith("/" + token) or k.rstrip("/").endswith("/" + token) for k in known):
            yield Finding(f"{name}: names {token}, which does not exist")


def check_all(root: Path) -> tuple[list[Finding], list[str]]:
    """Every finding, and what is only worth a look."""
    files = repository_files(root)
    findings: list[Finding] = []
    notes: list[str] = []
    for name in files:
        path = Path(name)
        if path.suffix not in TEXTS or name.startswith(GENERATED) or name == "LICENSE":
            continue
        try:
            text = (root / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a corpus of bytes with no suffix
        findings += check_places(name, text)
        if path.suffix in SOURCES:
            refused, note = check_length(name, text)
            findings += [refused] if refused else []
            notes += [note] if note else []
        if path.suffix == ".py" and name.startswith("src/"):
            findings += check_pointers(name, text)
            findings += check_docstring(name, text)
        for room, allowed in STDLIB_ONLY.items():
            if name.startswith(room):
                findings += check_stdlib_only(name, text, allowed)
        if path.suffix == ".md":
            findings += check_links(name, text, root)
        if name in ("docs/ARCHITECTURE.md", "docs/hazards.md", "CONTRIBUTING.md"):
            findings += check_named_paths(name, text, files)
    return findings, notes


def main() -> int:
    findings, notes = check_all(Path(__file__).resolve().parent.parent)
    for note in notes:
        print(f"note: {note}")
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
