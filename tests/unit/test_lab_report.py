"""What a lab's suite came to: no inner failure and no inner skip is lost on the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))

from lab_report import Report, read_junit

INNER = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_bad(n): assert n == 1, "the inner reason"

@pytest.fixture
def broken(): raise RuntimeError("no such device")

def test_error(broken): pass

def test_skipped(): pytest.skip("there is no passt")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("inner")
    (folder / "test_inner.py").write_text(INNER)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    done = subprocess.run([*argv, "--junitxml=r.xml"], cwd=folder, capture_output=True, text=True, check=False)
    return Report(read_junit((folder / "r.xml").read_bytes()), done.returncode, done.stdout)


def test_each_inner_test_is_there(report: Report) -> None:
    assert [(r.name.partition("::")[2], r.outcome) for r in report.results] == [
        ("test_good", "passed"), ("test_bad[1]", "passed"), ("test_bad[2]", "failed"), ("test_error", "error"),
        ("test_skipped", "skipped"),
    ]  # fmt: skip
    assert report.summary().startswith("2 passed, 1 failed, 1 error, 1 skipped in ")
    assert all(r.name in report.table() for r in report.results)


def test_failures_come_out_with_their_reports(report: Report) -> None:
    problems = report.problems(may_skip="passt")
    assert "test_bad[2]" in problems
    assert "the inner reason" in problems
    assert "no such device" in problems
    assert "test_skipped" not in problems


def test_a_skip_that_was_not_allowed_is_a_problem(report: Report) -> None:
    assert "skipped: there is no passt" in report.problems()
    assert "skipped: there is no passt" in report.problems(may_skip="hugepages")


@pytest.mark.parametrize("status", [5, 2, None, -9])
def test_a_suite_that_ran_nothing_is_a_problem(status: int | None) -> None:
    assert "no tests ran" in Report([], status, "no tests ran in 0.1 s").problems()


def test_all_well_is_no_problem(report: Report) -> None:
    good = Report([r for r in report.results if r.outcome == "passed"], 0, "")
    assert good.problems() == ""
    assert Report(good.results, 3, "internal error").problems() != ""
