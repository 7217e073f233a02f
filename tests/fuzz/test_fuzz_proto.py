"""Whatever a guest sends: the codec gives events or a ProtocolError, keeps its accounts, and holds little memory.

The same targets run under a coverage-guided fuzzer: ``python tests/fuzz/atheris_proto.py``.
"""

from __future__ import annotations

import itertools
from typing import Any

import cbor2
import pytest
from fuzz_targets import NONCE, agent_bytes, cbor_bytes, client_bytes, linked_client, unpack_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posada.errors import ProtocolError
from posada.proto import cbor, events, frames
from posada.proto.agent import Link
from posada.proto.frames import FrameType, Role, frame

texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.floats() | st.binary(max_size=20) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
keys = st.sampled_from(
    ["id", "ok", "error", "errno", "pid", "exec", "code", "signal", "ms", "event", "version", "min", "window", "name"]
)
bodies = st.dictionaries(keys, st.integers(-5, 300) | texts | st.dictionaries(texts, values, max_size=2), max_size=5)
payloads = (
    st.binary(max_size=70) | bodies.map(cbor.encode) | st.integers(0, 1 << 18).map(lambda n: n.to_bytes(4, "little"))
)
pieces = st.builds(
    lambda stream, kind, payload, flags: frames.HEADER.pack(len(payload), stream, kind, flags) + payload,
    st.integers(0, 3),
    st.sampled_from([*FrameType]) | st.integers(0, 255),
    payloads,
    st.sampled_from([0, 0, 0, 1, 2]),
)
streams = st.lists(pieces | st.binary(max_size=40), max_size=30).map(b"".join)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(values)
def test_cbor_round_trip_and_agreement_with_another_implementation(value: Any) -> None:
    try:
        data = cbor.encode(value)
    except cbor.CborError:  # deeper than the protocol allows
        assert depth(value) > cbor.MAX_DEPTH
        return
    assert repr(cbor.decode(data)) == repr(value)
    assert repr(cbor2.loads(data)) == repr(value)
    assert repr(cbor.decode(cbor2.dumps(value))) == repr(value)


@given(st.binary(max_size=200))
def test_cbor_of_anything(data: bytes) -> None:
    cbor_bytes(data)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(streams, st.integers(1, 50))
def test_a_client_takes_anything(data: bytes, piece: int) -> None:
    client_bytes(data, piece)


@given(streams, st.integers(1, 50))
def test_an_agent_takes_anything(data: bytes, piece: int) -> None:
    agent_bytes(data, piece)


@given(streams, st.lists(st.integers(0, 2000), max_size=10))
def test_where_it_is_cut_makes_no_difference(data: bytes, cuts: list[int]) -> None:
    def outcome(parts: list[bytes]) -> tuple[list[events.Event], str | None]:
        client, found = linked_client(), []
        try:
            for part in parts:
                for event in client.receive(part):
                    found.append(event)
        except ProtocolError as error:
            return found, error.message
        return found, None

    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    assert outcome(parts) == outcome([data])


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_the_handshake_is_found_behind_any_garbage(junk: bytes, nonce: bytes) -> None:
    client = Link(Role.CLIENT)
    client.start(NONCE, "fuzz")
    greeting = frames.AGENT_PREAMBLE + NONCE + frames.cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1})
    found = list(client.receive(junk + frames.AGENT_PREAMBLE + nonce + greeting))
    assert [type(event) for event in found] == [events.Hello]


@given(st.binary(max_size=300))
def test_a_preamble_after_resync_zeros_is_found_behind_any_garbage(junk: bytes) -> None:
    """Whatever torn frame an agent is in, zeros and a preamble bring it back."""
    agent = Link(Role.AGENT)
    list(agent.receive(Link(Role.CLIENT).start(bytes(16), "first")))
    list(agent.receive(junk))
    found = list(agent.receive(Link(Role.CLIENT).resync(NONCE, "second")))
    assert found[-2:] == [events.Linked(frames.AGENT_PREAMBLE + NONCE), events.ClientHello(1, 1, "second")]


@given(st.data())
def test_windows_balance_over_any_exchange(data: st.DataObject) -> None:
    """Two honest ends: no exchange makes either call the other a liar, and all that was sent arrives."""
    client, agent = linked_client(window=4096), Link(Role.AGENT, window=4096)
    list(agent.receive(Link(Role.CLIENT).start(NONCE, "fuzz")))
    list(agent.receive(client.open(1, {"kind": "exec"})))
    list(client.receive(agent.opened(1, {})))
    ends = {Role.CLIENT: client, Role.AGENT: agent}
    sent = {(role, flags): 0 for role in Role for flags in (0, 1)}
    held = dict.fromkeys(sent, 0)
    arrived = dict.fromkeys(sent, 0)
    for _ in range(data.draw(st.integers(0, 40))):
        role = data.draw(st.sampled_from([*Role]))
        flags = data.draw(st.sampled_from([0, 1])) if role is Role.AGENT else 0
        other = Role.AGENT if role is Role.CLIENT else Role.CLIENT
        if data.draw(st.booleans()):
            size = data.draw(st.integers(0, ends[role].room(1, flags)))
            for event in ends[other].receive(ends[role].data(1, bytes(size), flags)):
                assert isinstance(event, events.Data)
                held[role, flags] += len(event.data)
                arrived[role, flags] += len(event.data)
            sent[role, flags] += size
        else:
            size = data.draw(st.integers(0, held[role, flags]))
            held[role, flags] -= size
            for event in ends[role].receive(ends[other].consumed(1, flags, size)):
                assert event == events.Credit(1, flags)
        assert held[role, flags] <= 4096
    assert arrived == sent


@pytest.mark.parametrize("piece", [1, 100, 512, 5000])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(archive=st.binary(max_size=3000))
def test_archives_of_anything(piece: int, archive: bytes) -> None:
    unpack_bytes(archive, piece)


@given(st.binary(max_size=70000))
def test_frames_are_what_they_say(payload: bytes) -> None:
    if len(payload) > frames.MAX_PAYLOAD:
        with pytest.raises(ValueError, match="at most"):
            frame(1, FrameType.DATA, payload)
    else:
        data = frame(1, FrameType.DATA, payload, 1)
        assert frames.HEADER.unpack_from(data) == (len(payload), 1, FrameType.DATA, 1)
