"""qcow2 headers made of anything: an answer or an ImageError, and never less suspicious than QEMU."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posada.errors import ImageError
from posada.model.machine import MAX_DISK
from posada.storage import qcow2


def sample(backing: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        if backing:
            qcow2.create_overlay(path, size=1 << 20, backing=Path("/dev/null"), backing_format="raw")
        else:
            qcow2.create_empty(path, size=1 << 20)
        return path.read_bytes()


SAMPLES = [sample(False), sample(True)]
#: Where the fields are, so that changes hit something that matters.
OFFSETS = st.one_of(
    st.integers(0, 180), st.sampled_from([4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 79, 96, 100])
)
CHANGES = st.lists(st.tuples(OFFSETS, st.binary(min_size=1, max_size=8)), max_size=4)


def change(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    out = bytearray(data)
    for at, piece in changes:
        out[at : at + len(piece)] = piece
    return bytes(out)


@given(st.binary(max_size=300), st.integers(0, 1 << 64))
def test_any_bytes(data: bytes, length: int) -> None:
    for head in (data, qcow2.MAGIC + data, qcow2.MAGIC + b"\0\0\0\3" + data):
        try:
            info = qcow2.parse_header(head, length)
        except ImageError:
            continue
        assert 0 < info.size <= MAX_DISK


@settings(max_examples=500)
@given(st.sampled_from(SAMPLES), CHANGES, st.integers(0, 1 << 18))
def test_changed_headers(data: bytes, changes: list[tuple[int, bytes]], length: int) -> None:
    try:
        info = qcow2.parse_header(change(data, changes)[: 1 << 16], length)
    except ImageError:
        return
    assert 0 < info.size <= MAX_DISK
    assert 9 <= info.cluster_bits <= 21
    assert info.backing is None or len(info.backing) <= 1023


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.sampled_from(SAMPLES), changes=CHANGES)
def test_what_qemu_would_open_is_reported(tmp_path: Path, data: bytes, changes: list[tuple[int, bytes]]) -> None:
    """If posada takes a header for that of a plain disk, QEMU sees no other file in it, and the same size."""
    path = tmp_path / "disk"
    path.write_bytes(change(data, changes))
    try:
        info = qcow2.inspect(path)
    except ImageError:
        return
    if info.backing is not None or info.data_file or info.encrypted:
        return
    done = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", path], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return
    seen = json.loads(done.stdout)
    assert "backing-filename" not in seen
    assert "data-file" not in seen.get("format-specific", {}).get("data", {})
    assert not seen.get("encrypted", False)
    assert seen["virtual-size"] == info.size
