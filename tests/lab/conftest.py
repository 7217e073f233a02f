"""Labs for tests. Outside: `lab`, a machine with a real ``/dev/kvm``. Inside (``inside/``): what runs in it.

One lab is brought up for the session, with the checkout in it, and each test gets a fork of that one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import lab_kit
import pytest

INSIDE = "POSADA_LAB" in os.environ
collect_ignore_glob = ["test_*.py"] if INSIDE else ["inside/*"]

_stack = contextlib.ExitStack()
_lab: lab_kit.Lab | lab_kit.NoLab | None = None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Bring the lab up before the first test, outside of any test's time limit; a minute or two, once."""
    global _lab
    if session.config.option.collectonly or not any("lab" in getattr(i, "fixturenames", ()) for i in session.items):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    try:
        _lab = _stack.enter_context(lab_kit.labs(reporter.write_line if reporter is not None else print))
    except lab_kit.NoLab as error:
        _lab = error


def pytest_sessionfinish() -> None:
    _stack.close()


@pytest.fixture
def lab() -> Iterator[lab_kit.Lab]:
    """A lab of the test's own. Skips, with the reason, on a computer that cannot have one."""
    if isinstance(_lab, lab_kit.NoLab):
        pytest.skip(str(_lab))
    assert _lab is not None
    with _lab.fork() as mine:
        yield mine


#: What suites in labs came to, for the end of the outer session's output.
_summaries: list[str] = []


@pytest.fixture
def suite(lab: lab_kit.Lab, request: pytest.FixtureRequest) -> Iterator[lab_kit.Suite]:
    """Runs a suite in the test's lab; the test fails with the inner reports of what failed there."""
    runner = lab_kit.Suite(lab)
    yield runner
    _summaries.extend(f"{request.node.name}: {line}" for line in runner.summaries)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _summaries:
        terminalreporter.section("in the lab")
        for line in _summaries:
            terminalreporter.write_line(line)
