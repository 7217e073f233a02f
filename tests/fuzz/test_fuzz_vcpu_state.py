"""Saved vcpu and chip state is untrusted: a changed document is loaded, or refused by us or by the kernel; nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from kvm_kit import Toy, needs_kvm

from posada.errors import KvmError, StateError
from posada.kvm import System
from posada.vmm import cpustate, vmstate

pytestmark = needs_kvm
EXAMPLES = int(os.environ.get("POSADA_FUZZ_EXAMPLES", "60"))
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System.open() as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(system: System) -> tuple[dict[str, Any], dict[str, Any]]:
    toy = Toy(system, b"\xf4", irqchip=True, long_mode=True)
    state = cpustate.save(toy.vcpu), vmstate.save(toy.vm)
    toy.close()
    return state


odd = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 65), 1 << 65)
    | st.binary(max_size=64)
    | st.text(max_size=5)
    | st.just([])
)


@st.composite
def changed(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """The document with some bytes of some values turned, or a value replaced or gone."""
    document = dict(document)
    for key in draw(st.lists(st.sampled_from(sorted(document)), min_size=1, max_size=3)):
        value = document.get(key)
        match draw(st.integers(0, 5)):
            case 0:
                document.pop(key, None)
            case 1:
                document[key] = draw(odd)
            case _ if isinstance(value, bytes) and value:
                data = bytearray(value)
                for _ in range(draw(st.integers(1, 8))):
                    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
                document[key] = bytes(data)
            case _ if isinstance(value, int):
                document[key] = draw(st.integers(-1, 1 << 64))
    return document


@many
@given(st.data())
def test_a_changed_vcpu_is_loaded_or_refused(system: System, saved: Any, data: st.DataObject) -> None:
    toy = Toy(system, irqchip=True)
    try:
        cpustate.load(toy.vcpu, data.draw(changed(saved[0])))
        cpustate.tell_paused(toy.vcpu)
        toy.vcpu.immediate_exit = 1
        toy.vcpu.run()
        cpustate.save(toy.vcpu)
    except (StateError, KvmError):
        pass
    finally:
        toy.close()


@many
@given(st.data())
def test_changed_chips_are_loaded_or_refused(system: System, saved: Any, data: st.DataObject) -> None:
    toy = Toy(system, irqchip=True)
    try:
        vmstate.load(toy.vm, data.draw(changed(saved[1])))
        toy.vcpu.immediate_exit = 1
        toy.vcpu.run()
        vmstate.save(toy.vm)
    except (StateError, KvmError):
        pass
    finally:
        toy.close()
