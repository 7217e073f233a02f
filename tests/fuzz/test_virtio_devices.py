"""Every virtio device against hostile drivers. ``POSADA_FUZZ=n`` runs n programs each instead of a few.

Coverage-guided: ``python tests/fuzz/atheris_virtio.py``.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtio_hostile import run
from virtio_worlds import WORLDS

PROGRAMS = int(os.environ.get("POSADA_FUZZ", "150"))


@pytest.mark.parametrize("name", WORLDS)
@settings(
    max_examples=PROGRAMS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.binary(max_size=600) | st.lists(st.binary(max_size=30), max_size=30).map(b"".join))
def test_hostile_drivers(name: str, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    run(WORLDS[name], data)
    capsys.readouterr()
