"""Suites in labs: several at once, each heard of by its own test, and an end at any time. The labs here are none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import posada

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))

import lab_suites
from lab_kit import Hung
from lab_report import Report
from lab_suites import Runs, Suite, runs, wanted


class Labs:
    """A lab whose suites run until `go`, or until it is killed."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.killed = threading.Event()
        self.running = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.most = self.now = self.hangs = 0
        self.vm = SimpleNamespace(kill=self.kill)

    @contextmanager
    def fork(self) -> Iterator[Labs]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            yield self
        finally:
            with self.lock:
                self.now -= 1

    def kill(self) -> None:
        self.killed.set()
        self.go.set()

    def pytest(self, *arguments: str, timeout: float, env: Any) -> Report:
        self.running.release()
        assert self.go.wait(10)
        if self.hangs:
            self.hangs -= 1
            raise Hung("it hangs")
        if self.killed.is_set():
            raise posada.GuestGone("the lab is gone")
        if arguments == ("bad",):
            raise RuntimeError("the reason")
        return Report((), 0, " ".join(arguments))


@pytest.fixture(autouse=True)
def _two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_suites, "AT_ONCE", 2)


def suites(*names: str) -> dict[str, Suite]:
    return {name: Suite((name,), 10) for name in names}


def test_two_at_a_time_and_each_test_hears_of_its_own() -> None:
    labs = Labs()
    found = Runs(labs, suites("a", "bad", "c"))  # type: ignore[arg-type]
    for _ in range(2):
        assert labs.running.acquire(timeout=10)
    assert labs.now == 2
    labs.go.set()
    assert (found.result("a").output, found.result("c").output) == ("a", "c")
    with pytest.raises(RuntimeError, match="the reason"):
        found.result("bad")
    found.close()
    assert (labs.most, labs.now) == (2, 0)


def test_an_early_end_waits_for_no_suite() -> None:
    labs = Labs()
    found = Runs(labs, suites("a", "b", "c", "d"))  # type: ignore[arg-type]
    for _ in range(2):
        assert labs.running.acquire(timeout=10)
    found.close()
    assert labs.killed.is_set()
    assert not labs.running.acquire(blocking=False), "another one began"
    with pytest.raises(posada.GuestGone):
        found.result("a")


def test_a_suite_whose_lab_hangs_is_run_once_more() -> None:
    labs = Labs()
    labs.go.set()
    labs.hangs = 1
    found = Runs(labs, suites("a"))  # type: ignore[arg-type]
    assert found.result("a").output == "a"
    assert len(found.faults) == 1
    labs.hangs = 2
    again = Runs(labs, suites("a"))  # type: ignore[arg-type]
    with pytest.raises(Hung):
        again.result("a")
    for each in (found, again):
        each.close()


def test_what_is_skipped_does_not_begin() -> None:
    @runs("x", timeout=5, may_skip="y")
    def test() -> None: ...

    def item(name: str, function: Any, *skips: bool) -> Any:
        marks = [SimpleNamespace(args=(skip,)) for skip in skips]
        return SimpleNamespace(nodeid=name, function=function, iter_markers=lambda kind: marks)

    items = [item("yes", test), item("no", test, False, True), item("other", wanted), item("too", test, False)]
    assert wanted(items) == dict.fromkeys(("yes", "too"), Suite(("x",), 5, None, "y"))
