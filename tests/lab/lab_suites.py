"""Suites of tests that run in labs: each in a lab of its own, several at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from lab_kit import Hung, Lab
from lab_report import Report

import posada

#: A suite keeps one processor busy, and seldom two. Each lab takes one to two GiB of memory.
AT_ONCE = min(os.cpu_count() or 1, 3)


@dataclass(frozen=True)
class Suite:
    """What a test runs in a lab: pytest's arguments, and seconds that it may take. ``may_skip``: see `Report.problems`."""

    arguments: tuple[str, ...]
    timeout: float
    env: Mapping[str, str] | None = None
    may_skip: str | None = None


def runs(
    *arguments: str, timeout: float, env: Mapping[str, str] | None = None, may_skip: str | None = None
) -> Callable[[Any], Any]:
    """Says of a test what its `suite` is, so that it can begin while others run."""

    def mark(test: Any) -> Any:
        test.suite = Suite(arguments, timeout, env, may_skip)
        return test

    return mark


def wanted(items: Iterable[pytest.Item]) -> dict[str, Suite]:
    """The suites of the tests of this session, by their node ids; those that are skipped are not among them."""
    found = {}
    for item in items:
        suite = getattr(getattr(item, "function", None), "suite", None)
        if suite is not None and not any(mark.args[0] for mark in item.iter_markers("skipif")):
            found[item.nodeid] = suite
    return found


class Runs:
    """Begins all suites in their order, as processors come free."""

    def __init__(self, source: Lab, suites: Mapping[str, Suite]) -> None:
        self._source = source
        self.faults: list[str] = []
        """What went wrong with labs, and not with suites."""
        self._closing = False
        self._labs: set[Lab] = set()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="lab")
        self._found: dict[str, Future[Report]] = {
            name: self._pool.submit(self._run, suite) for name, suite in suites.items()
        }

    def _run(self, suite: Suite) -> Report:
        """Once more if the lab itself hangs, as emulated ones do now and then (ADR 11)."""
        try:
            return self._run_once(suite)
        except Hung as error:
            self.faults.append(f"{suite.arguments[0]} …: {error}, and it was run again")
            return self._run_once(suite)

    def _run_once(self, suite: Suite) -> Report:
        with self._source.fork() as lab:
            self._labs.add(lab)
            try:
                if self._closing:
                    raise posada.Cancelled("the session is over")
                return lab.pytest(*suite.arguments, timeout=suite.timeout, env=suite.env)
            finally:
                self._labs.discard(lab)

    def result(self, name: str) -> Report:
        """Waits for the suite. Raises what hindered it (posada.Timeout, posada.GuestError …)."""
        return self._found[name].result()

    def close(self) -> None:
        """What has not begun never will, and what runs ends with its lab."""
        self._closing = True
        for future in self._found.values():
            future.cancel()
        for lab in list(self._labs):
            with contextlib.suppress(posada.PosadaError):
                lab.vm.kill()
        self._pool.shutdown()
