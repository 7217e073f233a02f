"""Buses: who answers where, and what nobody answers. Checked getters of saved state, and the configuration."""

from __future__ import annotations

from typing import Any

import pytest

from posada.errors import StateError
from posada.vmm import state
from posada.vmm.bus import Bus, Ignore
from posada.vmm.config import DiskConfig, MonitorConfig, NicConfig, NicKind, VsockConfig


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


def test_offsets_are_from_the_base() -> None:
    bus, device = Bus(), Recorder()
    bus.add(0x3F8, 8, device)
    assert bus.read(0x3FD, 1) == 5
    bus.write(0x3F8, 1, 0x41)
    assert device.seen == [(5, 1), (0, 1, 0x41)]


def test_nobody_there() -> None:
    bus = Bus()
    bus.add(0x100, 4, Recorder())
    assert bus.read(0xFF, 1) == 0xFF
    assert bus.read(0x104, 4) == 0xFFFF_FFFF
    assert bus.read(0x102, 4) == 0xFFFF_FFFF, "an access that leaves the range is nobody's"
    bus.write(0x99, 2, 0)
    assert bus.unclaimed == 4


@pytest.mark.parametrize(("base", "size"), [(0xFF, 2), (0x103, 1), (0x100, 4), (0x80, 0x200), (0x90, 0), (-1, 2)])
def test_overlaps_are_refused(base: int, size: int) -> None:
    bus = Bus()
    bus.add(0x100, 4, Recorder())
    with pytest.raises(ValueError):
        bus.add(base, size, Recorder())


def test_neighbours_and_removal() -> None:
    bus = Bus()
    bus.add(0x100, 4, Ignore(1))
    bus.add(0x104, 4, Ignore(2))
    bus.add(0xFC, 4, Ignore(3))
    assert [bus.read(at, 1) for at in (0xFF, 0x100, 0x104)] == [3, 1, 2]
    bus.remove(0x100)
    assert bus.read(0x100, 1) == 0xFF
    with pytest.raises(ValueError):
        bus.remove(0x100)


@pytest.mark.parametrize("value", [True, -1, 11, 1.0, "1", None])
def test_integers_are_checked(value: object) -> None:
    assert state.integer({"a": 10}, "a", 0, 10) == 10
    assert state.integer({}, "a", 0, 10, 3) == 3
    with pytest.raises(StateError, match="'a'"):
        state.integer({"a": value}, "a", 0, 10)


def test_other_getters_are_checked() -> None:
    wrong: list[tuple[Any, ...]] = [
        (state.blob, b"abc", 2), (state.blob, "abc", 3), (state.text, b"x"), (state.boolean, 1),
        (state.child, []), (state.child, {1: 2}), (state.children, [1]), (state.integers, [1, True], 0, 5),
        (state.integers, [6], 0, 5), (state.number, float("nan"), 0, 1), (state.choice, "z", ("x", "y")),
        (state.items, [1, 2], 1),
    ]  # fmt: skip
    for getter, value, *rest in wrong:
        with pytest.raises(StateError):
            getter({"k": value}, "k", *rest)
    with pytest.raises(StateError):
        state.blob({"k": b"abc"}, "k", limit=2)


CONFIG = MonitorConfig(
    uuid="11111111-2222-3333-4444-555555555555",
    name="web",
    cpus=2,
    memory=64 << 20,
    kvm=3,
    kernel=4,
    disks=(DiskConfig("root", 1 << 30, ((5, "raw"), (6, "qcow2"))),),
    nics=(NicConfig("52:54:00:00:00:01", NicKind.PASST, 7),),
    vsock=VsockConfig(3, ((4711, 8),), 9),
)


def test_configuration_survives_the_wire() -> None:
    from posada.proto import cbor

    assert MonitorConfig.from_dict(cbor.decode_map(cbor.encode(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": 0}, {"memory": 4097 << 10 | 1}, {"kvm": -2}, {"disks": [{"name": "x"}]}, {"append": b""},
        {"nics": [{"kind": "passt", "mac": "no", "fd": 3}]}, {"nics": [{"kind": "x", "mac": "52:54:00:00:00:01"}]},
        {"vsock": {"cid": 2, "listeners": []}}, {"vsock": {"cid": 3, "listeners": [[1]]}}, {"console": None},
    ],
)  # fmt: skip
def test_configuration_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(StateError):
        MonitorConfig.from_dict({**CONFIG.to_dict(), **change})
