"""Hostile saved states: whatever is in the files of a snapshot, loading it raises a posada error or gives a machine."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posada.errors import KvmError, StateError
from posada.vmm import memfile
from posada.vmm.memory import PAGE
from posada.vmm.snapshot import Document, restore

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))  # the kits are there
from kvm_kit import needs_kvm
from machine_kit import MIB, config, counter, spin, tidy, toy

EXAMPLES = int(os.environ.get("POSADA_FUZZ_EXAMPLES", "60"))
slow = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
quick = settings(max_examples=20 * EXAMPLES, deadline=None)

numbers = st.integers(-(1 << 64), 1 << 64) | st.sampled_from([0, 1, 255, 1 << 31, (1 << 32) - 1, (1 << 64) - 1])
leaves = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8) | st.binary(max_size=64)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    machine, _ = toy(cpus=2)
    machine.start()
    spin(machine, lambda: counter(machine) > 10)
    machine.pause()
    state = machine.save()
    machine.close()
    return state


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, by the keys that lead to it."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*path, index))
    return found


def spoil(data: st.DataObject, state: dict[str, Any]) -> dict[str, Any]:
    """A copy with a few places changed: another value, gone, or a byte of it flipped."""
    state = copy.deepcopy(state)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(state)))
        inside: Any = state
        for key in path[:-1]:
            inside = inside[key]
        old = inside[path[-1]]
        if isinstance(old, bytes) and old and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(old) - 1))
            inside[path[-1]] = old[:at] + data.draw(st.binary(min_size=1, max_size=8)) + old[at + 1 :]
        elif isinstance(inside, dict) and data.draw(st.booleans()):
            del inside[path[-1]]
        else:
            inside[path[-1]] = data.draw(values)
    return state


@needs_kvm
@slow
@given(data=st.data())
def test_spoiled_states_are_refused_or_load(saved: dict[str, Any], data: st.DataObject) -> None:
    memory = os.memfd_create("memory")
    os.ftruncate(memory, 16 * MIB)
    try:
        machine = restore(config(cpus=2), Document(16 * MIB, (), spoil(data, saved)), [memory])
    except (StateError, KvmError):
        return
    machine.start(paused=True)
    machine.save()
    machine.close()


@quick
@given(data=st.data())
def test_spoiled_documents_are_refused_or_read(data: st.DataObject) -> None:
    good = bytearray(Document(16 * MIB, (((0, PAGE), (8 * PAGE, PAGE)),), {"version": 1, "cpus": [{}]}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        document = Document.decode(bytes(good))
    except StateError:
        return
    for layer in document.layers:
        memfile.check_runs(layer, document.size)


@quick
@given(st.binary(max_size=200))
def test_anything_is_no_document(data: bytes) -> None:
    with pytest.raises(StateError):
        Document.decode(data)


@quick
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), max_size=6))
def test_runs_are_checked(some: list[tuple[int, int]]) -> None:
    """Whatever passes the check can be laid over memory without leaving it."""
    packed = memfile.pack_runs([(at * PAGE // 2, length * PAGE // 2) for at, length in some])
    try:
        runs = memfile.unpack_runs(packed, 32 * PAGE)
    except StateError:
        return
    assert all(0 <= at < at + length <= 32 * PAGE for at, length in runs)


assert tidy  # a fixture for every test here
