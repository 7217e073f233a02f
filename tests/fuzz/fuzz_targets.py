"""What is fuzzed: each function takes any bytes, and fails only on a bug."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from posada.errors import HostError, ProtocolError
from posada.guest.unpack import Unpacker
from posada.proto import cbor, events, frames
from posada.proto.agent import Link, Phase
from posada.proto.frames import FrameType, Role

NONCE = bytes(range(16))


def linked_client(**hello: Any) -> Link:
    """A client after the handshake, with a call under way and streams 1 (not open yet) and 2 (closing)."""
    client = Link(Role.CLIENT)
    client.start(NONCE, "fuzz")
    greeting = frames.cbor_frame(0, FrameType.HELLO, {"version": 1, "min": 1, **hello})
    list(client.receive(frames.AGENT_PREAMBLE + NONCE + greeting))
    client.call(1, "ping", {})
    if not hello:
        client.open(1, {"kind": "exec"})
        client.open(2, {"kind": "exec"})
        client.close(2)
    return client


def cbor_bytes(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except cbor.CborError:
        return
    assert repr(cbor.decode(cbor.encode(value))) == repr(value)


def client_bytes(data: bytes, piece: int) -> None:
    client = linked_client()
    unread = 0
    try:
        for i in range(0, len(data), piece):
            for event in client.receive(data[i : i + piece]):
                if isinstance(event, events.Data):
                    unread += len(event.data)
                    assert event.stream == 1  # 2 is closing: what comes there is dropped
            assert len(client._buffer) < frames.MAX_PAYLOAD + frames.HEADER.size + piece
            assert unread <= 2 * client.window
            assert 0 <= client.room(1) <= client.window
    except ProtocolError as error:
        words = error.message
    else:
        return
    assert words.isprintable()
    assert len(words) < 600
    assert client.phase is Phase.CLOSED


def agent_bytes(data: bytes, piece: int) -> None:
    agent = Link(Role.AGENT)
    list(agent.receive(Link(Role.CLIENT).start(NONCE, "fuzz")))
    for i in range(0, len(data), piece):
        for event in agent.receive(data[i : i + piece]):
            if isinstance(event, events.Reset):
                assert agent.streams == 0
        assert agent.streams <= frames.MAX_STREAMS
        assert len(agent._buffer) < frames.MAX_PAYLOAD + frames.HEADER.size + piece


def unpack_bytes(data: bytes, piece: int) -> None:
    """An archive that begins well and goes on with ``data``, below a directory with nothing else beside it."""
    head = tarfile.TarInfo("top")
    head.type = tarfile.DIRTYPE
    archive = head.tobuf(tarfile.GNU_FORMAT) + mended(data)
    with tempfile.TemporaryDirectory() as directory:
        unpacker = Unpacker(Path(directory) / "out", strip=True)
        try:
            for i in range(0, len(archive), piece):
                unpacker.feed(archive[i : i + piece])
            unpacker.finish()
        except (ProtocolError, HostError):
            pass
        finally:
            unpacker.close()
        assert [path.name for path in Path(directory).iterdir()] == ["out"]


def mended(data: bytes) -> bytes:
    """Give each record the checksum that it needs to be looked at."""
    source, records = io.BytesIO(data), []
    while record := bytearray(source.read(512)):
        if len(record) == 512 and record[0]:
            record[148:156] = b" " * 8
            record[148:156] = b"%06o\0 " % (sum(record) & 0o777777)
        records.append(bytes(record))
    return b"".join(records)
