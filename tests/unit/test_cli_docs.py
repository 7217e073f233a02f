"""docs/cli.md and docs/api.md are generated, up to date, and tell the truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import posada
from posada.cli import shapes
from posada.errors import PosadaError
from posada.model.machine import make_spec
from posada.model.records import (
    Event,
    ImageRecord,
    OperationRecord,
    OperationState,
    PortRecord,
    Process,
    SnapshotKind,
    SnapshotRecord,
    VmRecord,
)
from posada.model.states import State

ROOT = Path(__file__).resolve().parents[2]
SPEC = make_spec(image="a:1")


@pytest.mark.parametrize("script", ["gen_cli_docs.py", "gen_api_docs.py"])
def test_the_documents_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_json_is_as_documented() -> None:
    vm = VmRecord(uuid="u", name="n", spec=SPEC, state=State.CREATED, engine="fake")
    printed = {
        "vm": shapes.vm(vm),
        "port": shapes.port(PortRecord(80, 8080, "127.0.0.1", "tcp")),
        "snapshot": shapes.snapshot(SnapshotRecord(id="i", vm="u", name="n", kind=SnapshotKind.FULL, spec=SPEC, disks=())),
        "image": shapes.image(ImageRecord(digest="d", names=(), path="p", arch="x86_64", created=0.0)),
        "operation": shapes.operation(
            OperationRecord(
                id="i", kind="k", target="t", state=OperationState.DONE, owner=Process(1, 1), created=0.0, updated=0.0
            )
        ),
        "event": shapes.event(Event(id=1, time=0.0, kind="k")),
    }
    for shape, data in printed.items():
        assert list(data) == list(shapes.FIELDS[shape]), shape
    assert list(shapes.vm_in_full(vm)) == [*shapes.FIELDS["vm"], *shapes.FIELDS["vm in full"]]


def test_every_export_is_in_the_api_document() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    for name in posada.__all__:
        value = getattr(posada, name)
        if name in ("__version__", "aio"):
            continue
        if isinstance(value, type) and issubclass(value, PosadaError):
            assert name in text
        else:
            assert f"\n### {name}\n" in text, name
