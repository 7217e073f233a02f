"""Streams of the fake agent that carry files and connections."""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posada.errors import GuestError
from posada.guest.pack import Packer
from posada.guest.stream import Stream
from posada.guest.unpack import Unpacker, write_all

if TYPE_CHECKING:
    from posada.guest.fake_agent import FakeGuest
    from posada.guest.fake_link import FakeLink

_CHUNK = 65536


async def read(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    fd = os.open(guest.path(body["path"]), os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise GuestError("Is a directory", errno_name="EISDIR")
        link.opened(stream, {"size": info.st_size, "mode": stat.S_IMODE(info.st_mode)})
        position, rest = body.get("offset", 0), body.get("length", 1 << 62)
        while data := os.pread(fd, min(rest, _CHUNK), position):
            await stream.send(data)
            position, rest = position + len(data), rest - len(data)
        stream.send_eof()
    finally:
        os.close(fd)


async def write(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    target = guest.path(body["path"])
    if body.get("mkdir"):
        target.parent.mkdir(parents=True, exist_ok=True)
    in_place = "offset" in body or body.get("append") or not body.get("atomic", True)
    path = target if in_place else target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CLOEXEC | (0 if "offset" in body else os.O_CREAT)
    if "offset" not in body:
        flags |= os.O_APPEND if body.get("append") else os.O_TRUNC
    fd = os.open(path, flags, 0o644)
    try:
        os.lseek(fd, body.get("offset", 0), os.SEEK_SET)
        link.opened(stream, {})
        while (piece := await stream.receive()) is not None:
            write_all(fd, piece[1])
        if not stream.complete:
            raise GuestError("the client closed the stream")
        if "mode" in body:
            os.fchmod(fd, body["mode"])
        if "uid" in body or "gid" in body:
            os.fchown(fd, body.get("uid", -1), body.get("gid", -1))
        if path is not target:
            path.rename(target)
    except BaseException:
        if path is not target:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


async def tar_out(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    source = guest.path(body["path"])
    if not source.is_dir():
        raise GuestError("Not a directory", errno_name="ENOTDIR")
    link.opened(stream, {})
    for data in Packer(source, Path(body["path"]).name or "root"):
        await stream.send(data)
    stream.send_eof()


async def tar_in(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    target = guest.path(body["path"])
    target.parent.mkdir(parents=True, exist_ok=True)
    unpacker = Unpacker(target, strip=False)
    try:
        link.opened(stream, {})
        while (piece := await stream.receive()) is not None:
            unpacker.feed(piece[1])
        if stream.complete:
            unpacker.finish()
    finally:
        unpacker.close()


async def connect(guest: FakeGuest, link: FakeLink, stream: Stream, body: dict[str, Any]) -> None:
    if "unix" in body:
        reader, writer = await asyncio.open_unix_connection(guest.path(body["unix"]))
    else:
        reader, writer = await asyncio.open_connection(body.get("host", "127.0.0.1"), body["port"])
    link.opened(stream, {})
    upward = asyncio.ensure_future(_send_all(stream, writer))
    try:
        while data := await reader.read(_CHUNK):
            await stream.send(data)
        stream.send_eof()
        await upward
    finally:
        upward.cancel()
        writer.transport.abort()


async def _send_all(stream: Stream, writer: asyncio.StreamWriter) -> None:
    while (piece := await stream.receive()) is not None:
        writer.write(piece[1])
        await writer.drain()
    if stream.complete:
        writer.write_eof()
        await writer.drain()
