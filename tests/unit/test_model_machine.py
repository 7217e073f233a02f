"""Specs: what people write, what is refused and how, and JSON in and out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from posada.errors import InvalidState, SpecError, Unsupported
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.machine import (
    SPEC_VERSION,
    MachineSpec,
    json_schema,
    make_spec,
    parse_port,
    spec_from_json,
    spec_to_json,
)
from posada.model.states import AT_REST, LIVE, TRANSITIONS, VERBS, State, check_transition, require
from posada.model.units import GIB, MIB, format_size, parse_duration, parse_size


def test_what_people_write() -> None:
    spec = make_spec(
        {"image": "debian:12", "memory": "1.5GiB", "limits": {"idle": "10m", "lifetime": 3600}},
        ports=[80, "8080:80/udp", "0.0.0.0:2222:22"],
        disks=[{"name": "root", "size": "20G"}],
    )
    assert spec.memory == 3 * GIB // 2
    assert (spec.limits.idle, spec.limits.lifetime) == (600.0, 3600.0)
    assert [(p.guest, p.host, p.address, p.protocol) for p in spec.ports] == [
        (80, None, "127.0.0.1", "tcp"), (80, 8080, "127.0.0.1", "udp"), (22, 2222, "0.0.0.0", "tcp"),
    ]  # fmt: skip
    assert spec.disks[0].size == 20 * GIB
    assert spec_from_json(spec_to_json(spec)) == spec
    assert make_spec(spec, cpus=4).cpus == 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "image"),
        ({"image": "x", "cpus": 0}, "cpus"),
        ({"image": "x", "cpus": 256}, "cpus"),
        ({"image": "x", "cpus": "two"}, "cpus"),
        ({"image": "x", "cpus": 1.5}, "cpus"),
        ({"image": "x", "cpus": True}, "cpus"),
        ({"image": "x", "memory": "12 parsecs"}, "memory"),
        ({"image": "x", "memory": -1}, "memory"),
        ({"image": "x", "memory": "1KiB"}, "memory"),
        ({"image": "x", "memory": 10**30}, "memory"),
        ({"image": "x", "memory": 64 * MIB + 1}, "memory"),
        ({"image": "x", "memroy": "1G"}, "memroy"),
        ({"image": "x", "name": "Not Valid"}, "name"),
        ({"image": "x", "name": "-x"}, "name"),
        ({"image": "x", "name": "x" * 64}, "name"),
        ({"image": "x", "disks": [{"name": "root", "size": 1000}]}, "disks[0].size"),
        ({"image": "x", "disks": [{"name": "root"}, {"name": "d"}]}, "disks[1].size"),
        ({"image": "x", "disks": [{"name": "root"}, {"name": "root", "size": "1G"}]}, "disks[1].name"),
        ({"image": "x", "disks": [{"name": "../x"}]}, "disks[0].name"),
        ({"image": "x", "disks": [{"nam": "x"}]}, "disks[0].nam"),
        ({"image": "x", "disks": 3}, "disks"),
        ({"image": "x", "ports": [0]}, "ports[0].guest"),
        ({"image": "x", "ports": ["70000:80"]}, "ports[0].host"),
        ({"image": "x", "ports": ["a:b"]}, "ports[0]"),
        ({"image": "x", "ports": ["80:80", "80:81"]}, "ports[1].host"),
        ({"image": "x", "ports": ["::1:80:80"]}, "ports[0].address"),
        ({"image": "x", "ports": [80], "nics": []}, "ports"),
        ({"image": "x", "nics": [{"mac": "52-54-00-00-00-01"}]}, "nics[0].mac"),
        ({"image": "x", "nics": [{"mac": "53:54:00:00:00:01"}]}, "nics[0].mac"),
        ({"image": "x", "labels": {"a b": "c"}}, "labels.a b"),
        ({"image": "x", "labels": {"a": "c" * 2000}}, "labels.a"),
        ({"image": "x", "limits": {"idle": 0}}, "limits.idle"),
        ({"image": "x", "limits": {"idle": "soon"}}, "limits.idle"),
        ({"image": "x", "limits": {"action": "explode"}}, "limits.action"),
        ({"image": "x", "boot": {"append": "a\nb"}}, "boot.append"),
        ({"image": "x", "engine": "bochs"}, "engine"),
        ({"image": "x", "version": SPEC_VERSION + 1}, "version"),
        ({"image": "x", "version": 0}, "version"),
        ({"image": 3}, "image"),
    ],
)
def test_what_is_refused_names_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as refused:
        make_spec(fields)
    assert refused.value.field == field
    assert refused.value.problem


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"image": "x"', "\0", '"' + "x" * 100])
def test_json_that_is_no_spec(text: str) -> None:
    with pytest.raises(SpecError):
        spec_from_json(text)


def test_the_schema_describes_what_is_written() -> None:
    schema = json_schema()
    assert set(schema["$defs"]["MachineSpec"]["properties"]) == set(MachineSpec.__struct_fields__)
    assert schema["$defs"]["MachineSpec"]["additionalProperties"] is False


def test_ports() -> None:
    assert parse_port(80) == {"guest": 80}
    assert parse_port("[127.0.0.1]:1:2") == {"guest": 2, "host": 1, "address": "127.0.0.1"}
    for bad in ("", ":", "80:", "a", "1:2:3:4:x"):
        with pytest.raises(SpecError):
            parse_port(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1k", 1024), ("1KB", 1000), ("2GiB", 2 * GIB), ("0.5G", GIB // 2), (" 3 MiB ", 3 * MIB), (5, 5)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "-1", "1e3", "0x10", "١", True, -1])
def test_sizes_refused(text: str | int) -> None:
    with pytest.raises(SpecError):
        parse_size(text)


def test_sizes_and_durations_as_text() -> None:
    assert [format_size(n) for n in (5, 1024, 3 * GIB // 2)] == ["5B", "1KiB", "1.5GiB"]
    assert [parse_duration(t) for t in ("90", "1.5s", "10m", "2h", "1d", "20ms", 7)] == [
        90,
        1.5,
        600,
        7200,
        86400,
        0.02,
        7,
    ]
    for bad in ("", "1y", -1, float("nan"), float("inf"), True):
        with pytest.raises(SpecError):
            parse_duration(bad)


def test_every_state_can_be_left_but_the_last() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(State.DELETING in TRANSITIONS[state] for state in State if state is not State.DELETING)
    assert TRANSITIONS[State.DELETING] == frozenset()
    assert LIVE | AT_REST | {State.DELETING} == set(State)
    assert not LIVE & AT_REST
    reachable, front = {State.CREATED}, [State.CREATED]
    while front:
        for state in TRANSITIONS[front.pop()] - reachable:
            reachable.add(state)
            front.append(state)
    assert reachable == set(State)


def test_transitions_and_verbs_are_refused_in_words() -> None:
    check_transition("vm", State.RUNNING, State.RUNNING)
    with pytest.raises(InvalidState, match="stopped"):
        check_transition("vm", State.STOPPED, State.RUNNING)
    for verb, allowed in VERBS.items():
        for state in State:
            if state in allowed:
                require("vm", verb, state)
            else:
                with pytest.raises(InvalidState, match=f"cannot {verb} vm 'vm': it is {state}"):
                    require("vm", verb, state)
    with pytest.raises(InvalidState):
        require("vm", "rename", State.DELETING)


def test_capabilities_deny_what_they_do_not_know() -> None:
    can = Capabilities(
        engine="x",
        features={Feature.FORK: Verdict(True), Feature.UEFI: Verdict(False, "no firmware", "apt install ovmf")},
    )
    can.require(Feature.FORK)
    assert can.has(Feature.FORK) and not can.has(Feature.PAUSE)
    with pytest.raises(Unsupported, match="apt install ovmf"):
        can.require(Feature.UEFI)
    with pytest.raises(Unsupported, match="pause"):
        can.require(Feature.PAUSE)
    assert msgspec.json.decode(msgspec.json.encode(can), type=Capabilities) == can
