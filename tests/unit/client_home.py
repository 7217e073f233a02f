"""A state directory with an image of the fake engine's, for the tests of the client and the command line.

The fake engine's agent lives in the process that started the machine, and in its event loop. So command line tests in
this process run in the portal's loop (`posada_cli`), where the machine of one command is still there for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from posada.client import _portal
from posada.host.db import Database
from posada.host.paths import Paths
from posada.model.records import ImageRecord

IMAGE = "toy:1"
DIGEST = hashlib.sha256(b"toy").hexdigest()


def add_image(paths: Paths, name: str = IMAGE, digest: str = DIGEST, *, agent: bool = True) -> None:
    """An image for the fake engine, which needs no more than an empty disk and an empty kernel."""
    folder = paths.images / digest
    folder.mkdir(parents=True)
    (folder / "disk.raw").write_bytes(bytes(1 << 20))
    (folder / "vmlinuz").touch()
    database = Database(paths.database)
    record = ImageRecord(
        digest=digest,
        names=(name,),
        path=f"images/{digest}",
        arch="x86_64",
        created=1.0,
        disk="disk.raw",
        disk_size=1 << 20,
        kernel="vmlinuz",
        agent=agent,
        size=1 << 20,
        source="a test",
    )
    database.put_image(record)
    database.close()


@contextlib.contextmanager
def own_portal() -> Iterator[None]:
    """A portal that comes and goes with the test. The session's own may be in use: a lab's machines need it to the end."""
    before, _portal._portal = _portal._portal, None
    try:
        yield
        _portal.close_portal()
    finally:
        _portal._portal = before


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    """The state directory of the test, with one image. Its path is short, for the sockets below it."""
    scratch = Path(tempfile.mkdtemp(prefix="pc-"))
    monkeypatch.setenv("POSADA_HOME", str(scratch / "h"))
    monkeypatch.setenv("POSADA_RUNTIME", str(scratch / "r"))
    paths = Paths.default()
    paths.make()
    add_image(paths)
    with own_portal():
        yield paths
    shutil.rmtree(scratch)


@dataclass
class Outcome:
    """What a command line did."""

    status: int
    out: str
    err: str


Posada = Callable[..., Outcome]


@pytest.fixture
def posada_cli(paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Posada:
    """Run command lines in this process, one after the other in one event loop."""
    from posada.cli import main, session

    monkeypatch.setattr(session, "drive", lambda work: _portal.portal().run(work))

    def run(*argv: str) -> Outcome:
        capfd.readouterr()
        status = main.execute(argv)
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
