"""The agent protocol without I/O: set-up, frames, windows, and every way a peer can break it."""

from __future__ import annotations

from typing import Any

import pytest

from posada.errors import ProtocolError
from posada.model.exec import AgentHello
from posada.proto import events, frames
from posada.proto.agent import Link, Phase, printable
from posada.proto.frames import FrameType, Role, cbor_frame, frame

NONCE = bytes(range(16))
HELLO = {"version": 1, "min": 1, "name": "agent", "window": 8192}
WINDOW = 8192


def linked(**hello: Any) -> Link:
    """A client's end, after the handshake."""
    client = Link(Role.CLIENT)
    client.start(NONCE, "test")
    greeting = frames.AGENT_PREAMBLE + NONCE + cbor_frame(0, FrameType.HELLO, {**HELLO, **hello})
    assert [type(e) for e in client.receive(greeting)] == [events.Hello]
    return client


def opened(stream: int = 1) -> Link:
    client = linked()
    client.open(stream, {"kind": "exec"})
    assert list(client.receive(cbor_frame(stream, FrameType.OPENED, {"pid": 1}))) == [events.Opened(stream, {"pid": 1})]
    return client


def pair() -> tuple[Link, Link]:
    """Both ends, linked to each other."""
    client, server = Link(Role.CLIENT), Link(Role.AGENT, window=WINDOW)
    found = list(server.receive(client.start(NONCE, "test")))
    assert found == [events.Linked(frames.AGENT_PREAMBLE + NONCE), events.ClientHello(1, 1, "test")]
    assert list(client.receive(frames.AGENT_PREAMBLE + NONCE + server.greet(HELLO)))
    return client, server


class TestSetUp:
    def test_hello_comes_out(self) -> None:
        client = linked(hostname="web1")
        assert client.phase is Phase.FRAMES
        assert client.hello == AgentHello(version=1, min=1, name="agent", window=8192, hostname="web1")
        assert client.window == 8192

    @pytest.mark.parametrize("piece", [1, 3, 7])
    def test_leftovers_before_the_answer_are_discarded_however_they_come(self, piece: int) -> None:
        client = Link(Role.CLIENT)
        client.start(NONCE, "test")
        junk = frame(9, FrameType.DATA, b"late " * 100) + frames.AGENT_PREAMBLE + b"another nonce 16" + b"POSADA\xff"
        stream = junk + frames.AGENT_PREAMBLE + NONCE + cbor_frame(0, FrameType.HELLO, HELLO)
        found = [e for i in range(0, len(stream), piece) for e in client.receive(stream[i : i + piece])]
        assert [type(e) for e in found] == [events.Hello]

    def test_endless_garbage_is_not_kept(self) -> None:
        client = Link(Role.CLIENT)
        client.start(NONCE, "test")
        for _ in range(100):
            assert list(client.receive(b"\xff" * 65536)) == []
        assert len(client._buffer) < 32

    def test_only_the_latest_nonce_counts(self) -> None:
        client = Link(Role.CLIENT)
        client.start(NONCE, "test")
        again = client.resync(bytes(16), "test")
        assert again.startswith(frames.RESYNC)
        assert list(client.receive(frames.AGENT_PREAMBLE + NONCE)) == []
        assert client.phase is Phase.HUNTING
        list(client.receive(frames.AGENT_PREAMBLE + bytes(16)))
        assert client.phase is Phase.FRAMES

    @pytest.mark.parametrize("cut", [0, 1, 9, 10, 11, 2000, 4009])
    def test_resync_ends_a_frame_torn_anywhere(self, cut: int) -> None:
        first, server = pair()
        torn = first.open(1, {"kind": "write"}) + first.data(1, b"x" * 4000)
        list(server.receive(torn[: len(torn) - 4010 + cut]))
        second = Link(Role.CLIENT)
        found = list(server.receive(second.resync(bytes(16), "second")))
        assert found[-2:] == [events.Linked(frames.AGENT_PREAMBLE + bytes(16)), events.ClientHello(1, 1, "second")]
        assert server.streams == 0

    def test_a_preamble_between_frames_resets_the_agent(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "exec"})))
        assert server.streams == 1
        found = list(server.receive(Link(Role.CLIENT).start(bytes(16), "second")))
        assert [type(e) for e in found] == [events.Reset, events.Linked, events.ClientHello]
        assert server.streams == 0

    @pytest.mark.parametrize(
        "hello",
        [
            {"version": -1}, {"version": "1"}, {"window": 0}, {"window": 1 << 40}, {"window": None}, {"init": 1},
            {"hostname": "a\x1b[2Jb"}, {"kernel": "x" * 300}, {"generation": -1},
        ],
    )  # fmt: skip
    def test_a_wrong_hello_is_refused(self, hello: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError, match="HELLO"):
            linked(**hello)

    def test_unknown_keys_are_ignored(self) -> None:
        assert linked(colour="blue").hello is not None


class TestFrames:
    def test_byte_by_byte(self) -> None:
        client = opened()
        stream = frame(1, FrameType.DATA, b"hello") + frame(1, FrameType.EOF, flags=1) + frame(1, FrameType.DATA, b"!")
        found = [e for byte in stream for e in client.receive(bytes([byte]))]
        assert found == [events.Data(1, 0, b"hello"), events.Eof(1, 1), events.Data(1, 0, b"!")]

    def test_everything_at_once(self) -> None:
        client = opened()
        client.call(5, "ping", {})
        stream = (
            cbor_frame(0, FrameType.REPLY, {"id": 5, "ok": {}})
            + frame(1, FrameType.EOF)
            + frame(1, FrameType.EOF, flags=1)
            + cbor_frame(1, FrameType.EXIT, {"code": 3, "ms": 7})
            + cbor_frame(1, FrameType.CLOSE, {})
            + frame(0, FrameType.PING, b"are you there")
        )
        assert list(client.receive(stream)) == [
            events.Reply(5, {}),
            events.Eof(1, 0),
            events.Eof(1, 1),
            events.Exit(1, 3, None, 7),
            events.Closed(1),
            events.Ping(b"are you there"),
        ]
        assert client.streams == 0

    def test_an_error_is_made_printable(self) -> None:
        client = opened()
        bell = cbor_frame(1, FrameType.CLOSE, {"error": "no\x07\x1b]0;evil" + "x" * 1000, "errno": "ENOENT"})
        (closed,) = client.receive(bell)
        assert isinstance(closed, events.Closed)
        assert closed.error is not None
        assert closed.error.isprintable()
        assert len(closed.error) == 500
        assert closed.errno == "ENOENT"

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (frames.HEADER.pack(frames.MAX_PAYLOAD + 1, 1, FrameType.DATA, 0), "65537 bytes"),
            (bytes(10), "type 0"),
            (b"\xff" * 10, "bytes"),
            (frames.HEADER.pack(0, 1, 99, 0), "type 99"),
            (cbor_frame(0, FrameType.CALL, {"id": 1, "op": "ping", "args": {}}), "type 2"),
            (cbor_frame(1, FrameType.OPEN, {"kind": "exec"}), "type 4"),
            (frame(0, FrameType.DATA, b"x"), "DATA on stream 0"),
            (cbor_frame(1, FrameType.REPLY, {"id": 1, "ok": {}}), "REPLY on stream 1"),
            (frame(1, FrameType.DATA, b"x", 2), "flags 2"),
            (cbor_frame(0, FrameType.HELLO, HELLO), "second HELLO"),
            (cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {}}), "not made"),
            (cbor_frame(0, FrameType.REPLY, {"ok": {}}), "'id' is missing"),
            (cbor_frame(0, FrameType.REPLY, {"id": True, "ok": {}}), "wrong type"),
            (cbor_frame(0, FrameType.REPLY, {"id": -1, "ok": {}}), "range"),
            (frame(0, FrameType.REPLY, b"\xc1\x00"), "tags"),
            (frame(0, FrameType.REPLY, b"\x80"), "not a map"),
            (frame(0, FrameType.PING, bytes(65)), "PING of 65"),
            (frame(7, FrameType.DATA, b"x"), "not open"),
            (cbor_frame(7, FrameType.CLOSE, {}), "not open"),
            (cbor_frame(1, FrameType.OPENED, {}), "OPENED twice"),
            (frame(1, FrameType.EOF, b"x"), "not empty"),
            (frame(1, FrameType.EOF) * 2, "the second"),
            (frame(1, FrameType.EOF) + frame(1, FrameType.DATA, b"x"), "after EOF"),
            (frame(1, FrameType.DATA, bytes(WINDOW + 1)), "window"),
            (frame(1, FrameType.DATA, bytes(WINDOW)) + frame(1, FrameType.DATA, b"x"), "window"),
            (frame(1, FrameType.CREDIT, b"\x01\x00\x00\x00"), "CREDIT for 1 bytes of 0"),
            (frame(1, FrameType.CREDIT, b"\x01"), "CREDIT of 1"),
            (cbor_frame(1, FrameType.EXIT, {}), "EXIT that is wrong"),
            (cbor_frame(1, FrameType.EXIT, {"code": 1, "signal": 1}), "EXIT that is wrong"),
            (cbor_frame(1, FrameType.EXIT, {"code": 256}), "range"),
            (cbor_frame(1, FrameType.EXIT, {"signal": 0}), "signal 0"),
            (cbor_frame(1, FrameType.EXIT, {"code": 1}) * 2, "the second"),
            (cbor_frame(1, FrameType.CLOSE, {"error": 5}), "wrong type"),
            (cbor_frame(0, FrameType.EVENT, {}), "'event' is missing"),
        ],
    )
    def test_violations(self, data: bytes, why: str) -> None:
        client = opened()
        with pytest.raises(ProtocolError, match=why):
            list(client.receive(data))
        assert client.phase is Phase.CLOSED
        assert list(client.receive(frame(0, FrameType.PING))) == []

    def test_what_came_before_a_violation_counts(self) -> None:
        client = opened()
        found = client.receive(frame(1, FrameType.DATA, b"good") + bytes(10))
        assert next(found) == events.Data(1, 0, b"good")
        with pytest.raises(ProtocolError):
            next(found)

    def test_nothing_may_come_before_opened_but_close(self) -> None:
        client = linked()
        client.open(1, {"kind": "exec"})
        with pytest.raises(ProtocolError, match="before OPENED"):
            list(client.receive(frame(1, FrameType.DATA, b"x")))
        client = linked()
        client.open(1, {"kind": "exec"})
        refused = cbor_frame(1, FrameType.CLOSE, {"error": "no", "errno": "ENOENT"})
        assert list(client.receive(refused)) == [events.Closed(1, "no", "ENOENT")]

    def test_a_long_body_is_refused_here(self) -> None:
        client = linked()
        with pytest.raises(ValueError, match="at most 65536"):
            client.open(1, {"kind": "exec", "argv": ["x" * 70000]})
        assert client.streams == 0

    def test_printable_keeps_text(self) -> None:
        assert printable("größer als 水") == "größer als 水"
        assert printable("a\nb\x9b") == "a�b�"


class TestWindows:
    def test_sending_stops_at_the_window(self) -> None:
        client = opened()
        assert client.room(1) == WINDOW
        client.data(1, bytes(WINDOW))
        assert client.room(1) == 0
        with pytest.raises(ValueError, match="window"):
            client.data(1, b"x")
        credit = frame(1, FrameType.CREDIT, frames.CREDIT_BODY.pack(100))
        assert list(client.receive(credit)) == [events.Credit(1, 0)]
        assert client.room(1) == 100

    def test_the_windows_of_a_stream_are_apart(self) -> None:
        client = opened()
        full = frame(1, FrameType.DATA, bytes(WINDOW))
        assert len(list(client.receive(full + frame(1, FrameType.DATA, bytes(WINDOW), 1)))) == 2

    def test_credit_is_given_for_what_was_consumed_and_opens_the_window_again(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "read"})))
        list(client.receive(server.opened(1, {})))
        moved = 0
        for _ in range(20):  # far more than a window, in odd pieces
            size = min(server.room(1), 3333)
            assert size > 0
            for event in client.receive(server.data(1, bytes(size))):
                assert isinstance(event, events.Data)
                moved += len(event.data)
                list(server.receive(client.consumed(1, 0, len(event.data))))
        assert moved > 6 * WINDOW

    def test_a_reader_that_stops_closes_the_window(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "read"})))
        list(client.receive(server.opened(1, {})))
        list(client.receive(server.data(1, bytes(WINDOW))))
        assert server.room(1) == 0
        assert client.consumed(1, 0, WINDOW // 4 - 1) == b""
        list(server.receive(client.consumed(1, 0, 1)))
        assert server.room(1) == WINDOW // 4

    def test_large_data_takes_several_frames(self) -> None:
        client, server = Link(Role.CLIENT), Link(Role.AGENT)
        list(server.receive(client.start(NONCE, "test")))
        list(client.receive(frames.AGENT_PREAMBLE + NONCE + server.greet({"name": "x"})))
        list(server.receive(client.open(1, {"kind": "write"})))
        found = list(server.receive(client.data(1, bytes(frames.WINDOW))))
        assert [len(e.data) for e in found if isinstance(e, events.Data)] == [65536] * 4

    def test_the_agent_refuses_too_much_as_well(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "write"})))
        assert [type(e) for e in server.receive(frame(1, FrameType.DATA, bytes(WINDOW + 1)))] == [events.Reset]
        assert server.phase is Phase.HUNTING


class TestClosing:
    def test_a_number_stays_taken_until_the_agent_answers(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "exec"})))
        late = server.opened(1, {}) + server.data(1, b"late", 1)
        closing = client.close(1)
        assert client.close(1) == b""
        assert client.room(1) == 0
        with pytest.raises(ValueError, match="cannot be opened"):
            client.open(1, {"kind": "exec"})
        assert list(client.receive(late)) == []
        assert list(server.receive(closing)) == [events.Closed(1)]
        assert list(client.receive(server.close(1))) == [events.Closed(1)]
        assert client.open(1, {"kind": "exec"})

    def test_closes_that_cross(self) -> None:
        client, server = pair()
        list(server.receive(client.open(1, {"kind": "exec"})))
        theirs, ours = server.close(1, "gone", "EIO"), client.close(1)
        assert list(client.receive(theirs)) == [events.Closed(1, "gone", "EIO")]
        assert list(server.receive(ours)) == []
        assert [type(e) for e in server.receive(client.open(1, {"kind": "exec"}))] == [events.Open]

    def test_at_most_64_streams(self) -> None:
        client, server = pair()
        for number in range(1, 65):
            list(server.receive(client.open(number, {"kind": "exec"})))
        with pytest.raises(ValueError, match="cannot be opened"):
            client.open(65, {"kind": "exec"})
        found = list(server.receive(cbor_frame(65, FrameType.OPEN, {"kind": "exec"})))
        assert [type(e) for e in found] == [events.Reset]
