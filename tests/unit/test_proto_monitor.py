"""The control protocol's codec: what goes through, what is refused on both sides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posada.proto import cbor
from posada.proto.monitor import (
    ARGUMENTS,
    MAX_MESSAGE,
    Failure,
    MonitorProtocolError,
    Op,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

LAYERS = [{"disk": "root", "top": 0, "frozen": [1]}]


@pytest.mark.parametrize(
    ("op", "args", "descriptors"),
    [
        (Op.INFO, {}, 0),
        (Op.QUIT, {}, 0),
        (Op.QUIT, {"reason": "because"}, 0),
        (Op.SWITCH, {"layers": LAYERS}, 2),
        (Op.SWITCH, {"layers": []}, 0),
        (Op.CAPTURE, {"memory": 2, "devices": 3, "pagemap": 4, "layers": LAYERS}, 5),
        (Op.CHILD, {"config": {"uuid": "x", "disks": []}}, 9),
        (Op.DETACH, {"name": "data", "timeout": 20}, 0),
        (Op.RESIZE_DISK, {"name": "data", "size": 1 << 40}, 0),
    ],
)
def test_requests_go_through(op: Op, args: dict[str, Any], descriptors: int) -> None:
    request = Request(7, op, args)
    assert decode_request(encode_request(request, descriptors), descriptors) == request


@pytest.mark.parametrize(
    ("op", "args", "descriptors"),
    [
        (Op.INFO, {"more": 1}, 0),
        (Op.SWITCH, {}, 0),
        (Op.SWITCH, {"layers": LAYERS}, 1),
        (Op.SWITCH, {"layers": [{"disk": "root", "top": -1, "frozen": [0]}]}, 2),
        (Op.SWITCH, {"layers": [{"disk": "root", "top": True, "frozen": [0]}]}, 2),
        (Op.SWITCH, {"layers": LAYERS * 100}, 2),
        (Op.SWITCH, {"layers": "root"}, 2),
        (Op.QUIT, {"reason": "x" * 1000}, 0),
        (Op.DETACH, {"name": "data", "timeout": float("nan")}, 0),
        (Op.RESIZE_DISK, {"name": "data", "size": -512}, 0),
        (Op.CHILD, {"config": []}, 0),
        (Op.INFO, {}, 1000),
    ],
)
def test_requests_that_both_sides_refuse(op: Op, args: dict[str, Any], descriptors: int) -> None:
    with pytest.raises(MonitorProtocolError):
        encode_request(Request(7, op, args), descriptors)
    with pytest.raises(MonitorProtocolError):
        decode_request(cbor.encode({"id": 7, "op": op.value, **args}), descriptors)


def test_every_operation_says_what_it_takes() -> None:
    assert set(ARGUMENTS) == set(Op)


@pytest.mark.parametrize(
    "message",
    [
        {"op": "info"},
        {"id": -1, "op": "info"},
        {"id": True, "op": "info"},
        {"id": 1 << 63, "op": "info"},
        {"id": 1},
        {"id": 1, "op": 5},
        {"id": 1, "op": ["info"]},
        {"id": 1, "op": "destroy"},
    ],
)
def test_requests_that_are_none(message: dict[str, Any]) -> None:
    with pytest.raises(MonitorProtocolError):
        decode_request(cbor.encode(message))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(3, ok={}),
        Reply(3, ok={"pause": 0.5, "children": [{"pid": 4}]}),
        Reply(3, error=Failure("HostError", "no space")),
        Reply(3, error=Failure("EngineError", "half", ("root", "data"))),
    ],
)
def test_replies_go_through(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


@pytest.mark.parametrize(
    "message",
    [
        {"id": 3},
        {"id": 3, "ok": []},
        {"id": 3, "ok": {}, "error": {}},
        {"id": 3, "error": {}},
        {"id": 3, "error": {"kind": "X", "message": "y", "z": 1}},
        {"id": 3, "error": {"kind": "X", "message": "y", "switched": [1]}},
        {"id": 3, "error": {"kind": "X", "message": "y" * 10000}},
    ],
)
def test_replies_that_are_none(message: dict[str, Any]) -> None:
    with pytest.raises(MonitorProtocolError):
        decode_reply(cbor.encode(message))


def test_what_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(MonitorProtocolError, match="bytes"):
        encode_request(Request(1, Op.CHILD, {"config": {"x": b"y" * MAX_MESSAGE}}))
    with pytest.raises(MonitorProtocolError, match="bytes"):
        decode_request(bytes(MAX_MESSAGE + 1))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.sampled_from([op.value for op in Op]), st.dictionaries(st.text(max_size=9), VALUES, max_size=4), st.integers(0, 5))
def test_whatever_comes_is_a_request_or_refused(op: str, fields: dict[str, Any], descriptors: int) -> None:
    try:
        request = decode_request(cbor.encode({"id": 1, "op": op, **fields}), descriptors)
    except MonitorProtocolError:
        return
    assert decode_request(encode_request(request, descriptors), descriptors).op is request.op


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            decode(data)
        except MonitorProtocolError:
            continue
