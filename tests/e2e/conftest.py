"""Real guests: one state directory for the session, with images that are kept from one session to the next.

After each test nothing may be left of what it made: no machine, no process, no file in the run directory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import posada

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "debian:12"


@functools.cache
def make_places() -> tuple[Path, Path]:
    """(home, runtime) of the session. The home is kept in .cache for its images; POSADA_TEST_HOME names another.

    Whatever a session that was killed has left in it is removed. Called once, when it is known that it is needed.
    """
    home = Path(os.environ.get("POSADA_TEST_HOME", ROOT / ".cache/e2e"))
    home.mkdir(parents=True, exist_ok=True)
    runtime = Path(tempfile.mkdtemp(prefix="posada-e2e-"))
    with posada.connect(home=home, runtime=runtime) as host:
        host.recover()
        for vm in host.vms.list():
            vm.delete()
    return home, runtime


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the image before the first test, outside of any test's time limit."""
    if session.config.option.collectonly or not any("image" in getattr(i, "fixturenames", ()) for i in session.items):
        return
    home, runtime = make_places()
    with posada.connect(home=home, runtime=runtime) as host:
        if not any(IMAGE in found.names for found in host.images.list()):
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.write_line(f"building {IMAGE} for the tests, once …")
            host.images.build(IMAGE)


@pytest.fixture(scope="session")
def places() -> Iterator[tuple[Path, Path]]:
    """(home, runtime): what `posada` the command and `posada.run` use during this session, too."""
    home, runtime = make_places()
    patch = pytest.MonkeyPatch()
    patch.setenv("POSADA_HOME", str(home))
    patch.setenv("POSADA_RUNTIME", str(runtime))
    yield home, runtime
    patch.undo()
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture(scope="session")
def image(places: tuple[Path, Path]) -> str:
    """The name of a Debian 12 image with posada's agent."""
    return IMAGE


@pytest.fixture
def host(places: tuple[Path, Path]) -> Iterator[posada.Host]:
    """This host, empty but for images; and empty again afterwards, or the test fails."""
    home, runtime = places
    with posada.connect(home=home, runtime=runtime) as host:
        yield host
        left = host.vms.list()
        for vm in left:
            with contextlib.suppress(posada.NotFound):
                vm.delete()
        names = [vm.record.name for vm in left]
        assert not names, f"the test left machines: {names}"
        leaks = leaked_files(home, runtime)
        assert not leaks, f"the test left files: {leaks}"


def leaked_files(home: Path, runtime: Path) -> list[str]:
    """What is there with no machine to own it: machines' directories, disk layers, run directories."""
    found = [*home.glob("vms/*"), *home.glob("layers/*"), *runtime.glob("vms/*")]
    return sorted(str(path) for path in found)


@pytest.fixture
def vm(host: posada.Host, image: str) -> Iterator[posada.VM]:
    """A machine of 512 MiB that runs and answers; deleted afterwards."""
    with host.run(image, memory="512MiB") as machine:
        yield machine
