"""What a suite that ran elsewhere came to, one inner test at a time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One inner test."""

    name: str
    outcome: str
    """``passed``, ``failed``, ``error`` or ``skipped``."""
    seconds: float
    text: str = ""
    """Why it was skipped, or the whole report of a failure."""


@dataclass(frozen=True)
class Report:
    """A suite's results; ``output`` is what pytest printed, ``exit_code`` what it ended with."""

    results: Sequence[Result]
    exit_code: int | None
    output: str

    def count(self, outcome: str) -> int:
        return sum(result.outcome == outcome for result in self.results)

    def summary(self) -> str:
        counts = [(name, self.count(name)) for name in ("passed", "failed", "error", "skipped")]
        took = sum(result.seconds for result in self.results)
        return ", ".join(f"{number} {name}" for name, number in counts if number) + f" in {took:.0f} s"

    def table(self) -> str:
        """A line for each inner test."""
        lines = [f"  {r.outcome:8}{r.seconds:7.1f} s  {r.name}" for r in self.results]
        return "\n".join([*lines, f"  {self.summary()}"])

    def problems(self, *, may_skip: str | None = None) -> str:
        """What an outer test fails with; empty when all is well.

        ``may_skip``: a regular expression for the reasons that are good ones to skip an inner test. Others are problems:
        a lab that lacks what a test needs is a broken lab.
        """
        bad = [f"{r.name}\n{r.text}" for r in self.results if r.outcome in ("failed", "error")]
        for result in self.results:
            if result.outcome == "skipped" and not (may_skip and re.search(may_skip, result.text)):
                bad.append(f"{result.name}\nskipped: {result.text}")
        if not bad and (self.exit_code != 0 or not self.count("passed")):
            bad.append(f"pytest ended with status {self.exit_code}:\n{self.output[-6000:]}")
        return "\n\n".join(f"inside the lab: {text}" for text in bad)


def read_junit(document: bytes) -> list[Result]:
    """pytest's ``--junitxml``. It comes from a machine that ran our own tests, so it is trusted as they are."""
    out = []
    for case in ElementTree.fromstring(document).iter("testcase"):
        name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        seconds = float(case.get("time") or 0)
        outcome, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped") and outcome in ("passed", "skipped"):
                outcome = {"failure": "failed"}.get(child.tag, child.tag)
                text = (child.text if outcome != "skipped" else child.get("message")) or child.get("message") or ""
        out.append(Result(name, outcome, seconds, text))
    return out
