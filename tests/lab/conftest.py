"""Labs for tests. Outside: `lab`, a machine with a real ``/dev/kvm``. Inside (``inside/``): what runs in it.

One lab is brought up by the first test that wants one, with the checkout in it. Each suite runs in a fork of that one.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator

import lab_kit
import pytest
from lab_suites import Runs, wanted

INSIDE = "POSADA_LAB" in os.environ
collect_ignore_glob = ["test_*.py"] if INSIDE else ["inside/*"]


class Broken(Exception):
    """The lab could not be made. ``told``: a test has failed of it; the others only refer to that one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.told = False


Source = lab_kit.Lab | lab_kit.NoLab | Broken


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    """What all labs are forks of, or why there is none. From nothing it takes minutes: lab tests have their own time limit.

    It never raises: pytest would repeat the same error for each test that wants a lab.
    """

    def say(text: str) -> None:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
            if reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(text)

    with contextlib.ExitStack() as stack:
        found: Source
        try:
            found = stack.enter_context(lab_kit.labs(say))
        except lab_kit.NoLab as error:
            found = error
        except Exception as error:
            found = Broken("the lab could not be made:\n" + "".join(traceback.format_exception(error)))
        yield found


@pytest.fixture(scope="session")
def runs(source: Source, request: pytest.FixtureRequest) -> Iterator[Runs | None]:
    """All suites of this session. The first test's wait is for them all, so to say: each has its own limit of time."""
    if not isinstance(source, lab_kit.Lab):
        yield None
        return
    with contextlib.closing(Runs(source, wanted(request.session.items))) as found:
        yield found
        _summaries.extend(f"lab fault: {fault}" for fault in found.faults)


#: What suites in labs came to, for the end of the outer session's output.
_summaries: list[str] = []


@pytest.fixture
def suite(source: Source, runs: Runs | None, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Waits for the test's suite (`lab_suites.runs`); the test fails with the inner reports of what failed there.

    Skips, with the reason, on a computer that cannot have a lab. On one that can, and where it could not be made, one test
    fails with the reason, and the others are skipped.
    """
    if isinstance(source, lab_kit.NoLab):
        pytest.skip(str(source))
    if isinstance(source, Broken):
        if source.told:
            pytest.skip("there is no lab: an earlier test has failed with the reason")
        source.told = True
        pytest.fail(str(source), pytrace=False)
    assert runs is not None
    node, mine = request.node, runs

    def wait() -> None:
        try:
            report = mine.result(node.nodeid)
        except lab_kit.Overran as error:
            pytest.fail(str(error), pytrace=False)
        node.add_report_section("call", "in the lab", report.table())
        _summaries.append(f"{node.name}: {report.summary()}")
        problems = report.problems(may_skip=node.function.suite.may_skip)
        if problems:
            pytest.fail(problems, pytrace=False)

    return wait


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _summaries:
        terminalreporter.section("in the lab")
        for line in _summaries:
            terminalreporter.write_line(line)
