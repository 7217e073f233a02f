"""Labs for tests. Outside: `lab`, a machine with a real ``/dev/kvm``. Inside (``inside/``): what runs in it.

One lab is brought up by the first test that wants one, with the checkout in it, and each test gets a fork of that one.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator

import lab_kit
import pytest

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


@pytest.fixture
def lab(source: Source) -> Iterator[lab_kit.Lab]:
    """A lab of the test's own. Skips, with the reason, on a computer that cannot have one.

    On one that can, and where it could not be made, one test fails with the reason, and the others are skipped.
    """
    if isinstance(source, lab_kit.NoLab):
        pytest.skip(str(source))
    if isinstance(source, Broken):
        if source.told:
            pytest.skip("there is no lab: an earlier test has failed with the reason")
        source.told = True
        pytest.fail(str(source), pytrace=False)
    with source.fork() as mine:
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
