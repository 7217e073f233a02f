"""The saved device set: it comes from disk, so everything in it is checked."""

from __future__ import annotations

import msgspec
import pytest

from posada.engine.qemu.layout import DISK_SLOTS, Layout, new_layout, read_layout
from posada.errors import EngineError, Unsupported


def sample(*disks: str, **fields: object) -> Layout:
    known = {"machine": "pc-i440fx-7.2", "accelerator": "tcg", "cpus": 1, "memory": 1 << 29, "nics": 1}
    return new_layout(**{**known, "vsock": False, "agent": True, **fields}, disks=disks)  # type: ignore[arg-type]


def private(**changes: object) -> dict[str, object]:
    return {"layout": msgspec.to_builtins(sample("root")) | changes}


def test_it_comes_back_as_it_was_stored() -> None:
    layout = sample("root", "data")
    assert read_layout({"layout": msgspec.to_builtins(layout)}) == layout


def test_a_disk_keeps_its_slot_when_another_goes() -> None:
    layout = sample("root", "old", "data")
    kept = layout.without_disk("old")
    assert kept.slot("data") == layout.slot("data")
    assert kept.with_disk("new").slot("new") == layout.slot("old")


def test_a_full_bus_is_refused() -> None:
    layout = sample(*(f"d{i}" for i in range(len(DISK_SLOTS))))
    with pytest.raises(Unsupported, match="more than 22 disks"):
        layout.with_disk("more")
    with pytest.raises(Unsupported, match="network interfaces"):
        sample(nics=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "pc,accel=kvm"},
        {"machine": "pc -monitor stdio"},
        {"accelerator": "xen"},
        {"cpus": 0},
        {"memory": -1},
        {"nics": 9},
        {"version": 2},
        {"disks": [["root", 3]]},
        {"disks": [["root", 10], ["data", 10]]},
        {"disks": [["root", 10], ["root", 11]]},
        {"disks": [["a,b", 10]]},
        {"nested": "yes"},
        {"surprise": 1},
        {"cpus": "many"},
    ],
    ids=str,
)
def test_a_damaged_or_hostile_layout_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="damaged"):
        read_layout(private(**changes))


def test_a_layout_from_before_nesting_is_one_without() -> None:
    stored = msgspec.to_builtins(sample("root"))
    del stored["nested"]
    assert read_layout({"layout": stored}) == sample("root")


def test_a_missing_layout_is_refused() -> None:
    with pytest.raises(EngineError, match="damaged"):
        read_layout({})
