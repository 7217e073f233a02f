"""The rules of scripts/lint_files.py, each shown to bite; and the documents against what they describe."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lint = load("lint_files")


def test_a_long_file_is_refused_and_a_longish_one_named() -> None:
    assert lint.check_length("a.py", "x\n" * 400) == (None, None)
    refused, note = lint.check_length("a.py", "x\n" * 500)
    assert refused is None
    assert "500" in note
    refused, note = lint.check_length("a.py", "x\n" * 701)
    assert "701" in refused


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("a = ctypes.string_at(p, 4)\n", 1),
        ("a = ctypes.string_at(p, 4)  # SAFETY: p is ours, 4 long\n", 0),
        ("# SAFETY: p is ours,\n# and 4 long\na = ctypes.string_at(p, 4)\n", 0),
        ("# SAFETY: p is ours\nb = 1\na = Reg.from_address(p)\n", 1),
        ("# ctypes.cast() is not used here\n", 0),
    ],
)
def test_raw_pointers_say_why_they_are_safe(text: str, findings: int) -> None:
    assert len(list(lint.check_pointers("a.py", text))) == findings


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("p = '/home/" "ann/x'", 1),
        ("see /wo" "rk/main", 1),
        ("/tmp/" "v/bin", 1),
        ("~/.local/share/x", 0),
        ("/tmp/posada-1000", 0),
        ("https://example.org/home/page", 0),
    ],
)  # fmt: skip
def test_places_of_one_machine_are_found(text: str, findings: int) -> None:
    assert len(list(lint.check_places("a.md", text))) == findings


def test_what_runs_alone_imports_the_standard_library_only() -> None:
    assert not list(lint.check_stdlib_only("k.py", "import os, _socket\nfrom pathlib import Path\nfrom . import me\n"))
    found = list(lint.check_stdlib_only("k.py", "import os\nimport msgspec\nfrom .. import x\nfrom posada import y\n"))
    assert len(found) == 3


def test_named_paths_and_links_must_exist(tmp_path: Path) -> None:
    files = ["src/posada/host/machines.py", "agent/main.c"]
    good = "read `machines.py`, `host/machines.py`, `agent/`; `proc/x`, `make lint` and `SEEK_DATA` are not paths"
    assert not list(lint.check_named_paths("a.md", good, files))
    assert len(list(lint.check_named_paths("a.md", "`nova.py` `src/posada/hosts/` `docs/none`", files))) == 3
    (tmp_path / "b.md").touch()
    text = "[b](b.md#part) [c](c.md) [w](https://example.org)\n```\n[d](d.md)\n```\n"
    assert len(list(lint.check_links("a.md", text, tmp_path))) == 1


def test_dependencies_are_justified_with_the_range_they_have() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["project"]["optional-dependencies"].values():
        declared += extra
    page = (ROOT / "docs/DEPENDENCIES.md").read_text()
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| .{10,} \|$", page, re.MULTILINE))
    split = [re.fullmatch(r"([\w.-]+)(.+)", d) for d in declared]
    assert listed == {m[1]: m[2] for m in split if m}
    for requirement in declared:
        assert re.search(r"[\w.-]+>=[\d.]+,<\d+$", requirement), f"{requirement} has no upper bound at a major version"


def test_every_hazard_has_a_test_or_is_accepted() -> None:
    page = (ROOT / "docs/hazards.md").read_text()
    lines = [line.strip("|") for line in page.splitlines() if line.startswith("| **")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert len(rows) >= 25
    tests = ROOT / "tests/e2e/test_hazards.py"
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", tests.read_text(), re.MULTILINE))
    named = set()
    for hazard, _policy, test, status in rows:
        assert status in ("holds", "partly", "accepted"), hazard
        if status != "accepted":
            assert test.strip("`") in defined, f"{hazard}: no such test: {test}"
            named.add(test.strip("`"))
    assert named == defined, "a test of a hazard that the page does not name"
