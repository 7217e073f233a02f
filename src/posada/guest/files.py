"""Files of a guest: the half of `posada.guest.client.GuestClient` that is about them."""

from __future__ import annotations

import asyncio
import os
import secrets
import stat as stats
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import msgspec

from posada.errors import GuestError, HostError, ProtocolError
from posada.guest.link import GuestLink
from posada.guest.pack import Packer
from posada.guest.stream import Stream
from posada.guest.unpack import Unpacker, write_all
from posada.model.files import DirEntry, FileInfo, FileType, Transfer
from posada.proto.events import Notice
from posada.proto.frames import MAX_PAYLOAD

_T = TypeVar("_T")
_CHUNK = 256 << 10
MAX_READ = 64 << 20
"""Bytes `GuestFiles.read_file` takes into memory unless told otherwise."""
_MAX_ENTRIES = 1_000_000


class WriteOptions(TypedDict, total=False):
    """How a file is written."""

    mode: int | None
    uid: int | None
    gid: int | None
    append: bool
    atomic: bool
    """Default: written beside, synced, and renamed into its place."""
    offset: int | None
    """Write into an existing file, in place, from there."""
    mkdir: bool
    """Make missing directories."""


class GuestFiles:
    """Paths are the guest's, absolute text. Everything raises GuestError (``errno_name`` such as ``ENOENT``), GuestGone
    and ProtocolError."""

    def __init__(self, link: GuestLink) -> None:
        self._link = link

    # -- content ----------------------------------------------------------------------------------------------------

    async def read_stream(self, path: str, *, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """The content of a file, or ``length`` bytes of it from ``offset``, in pieces as they come."""
        body: dict[str, Any] = {"kind": "read", "path": path, "offset": offset}
        stream = await self._link.open_stream(
            body if length is None else {**body, "length": length}, what=f"read {path}"
        )
        try:
            async for data in _content(stream):
                yield data
        finally:
            stream.close()

    async def read_file(
        self, path: str, *, offset: int = 0, length: int | None = None, max_size: int = MAX_READ
    ) -> bytes:
        """The same at once. Raises GuestError (``EFBIG``) when it is more than ``max_size`` bytes."""
        content = bytearray()
        pieces = self.read_stream(path, offset=offset, length=length)
        try:
            async for data in pieces:
                content += data
                if len(content) > max_size:
                    raise GuestError(
                        f"read {path}: it has more than {max_size} bytes",
                        errno_name="EFBIG",
                        hint="download it, read a range, or raise max_size",
                    )
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # An async generator; its close must not wait for gc.
        return bytes(content)

    async def write_stream(self, path: str, source: AsyncIterable[bytes], **options: Unpack[WriteOptions]) -> int:
        """Write a file from pieces; returns the bytes written.

        By default all of it appears at once or, when anything fails (``source`` too), nothing does.
        """
        body = _write_body(path, **options)
        return await _fill(await self._link.open_stream(body, what=f"write {path}", outputs=frozenset()), source)

    async def write_file(self, path: str, data: bytes | str, **options: Unpack[WriteOptions]) -> int:
        """The same from bytes or text."""
        content = data.encode() if isinstance(data, str) else data
        head, rest = content[:MAX_PAYLOAD], content[MAX_PAYLOAD:]
        stream = await self._link.open_stream(
            _write_body(path, **options), what=f"write {path}", outputs=frozenset(), data=head, eof=not rest
        )
        return len(head) + await _fill(stream, _once(rest))

    # -- names ------------------------------------------------------------------------------------------------------

    async def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        return _checked(await self._link.call("stat", {"path": path, "follow": follow}), FileInfo, "stat")

    async def list_dir(self, path: str) -> list[DirEntry]:
        """What is in a directory, by name."""
        entries: list[DirEntry] = []
        args: dict[str, Any] = {"path": path}
        while True:
            page = _checked(await self._link.call("list", args), _Page, "list")
            entries += page.entries
            if not page.more:
                return sorted(entries, key=lambda entry: entry.name)
            if not page.entries or len(entries) > _MAX_ENTRIES:
                raise ProtocolError(f"list {path}: the guest's agent does not come to an end")
            args["after"] = page.entries[-1].name

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Make a directory; with ``parents`` also what is missing above it, and it may exist already."""
        await self._link.call("mkdir", {"path": path, "mode": mode, "parents": parents})

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        await self._link.call("remove", {"path": path, "recursive": recursive})

    async def rename(self, old: str, new: str) -> None:
        await self._link.call("rename", {"old": old, "new": new})

    async def chmod(self, path: str, mode: int) -> None:
        await self._link.call("chmod", {"path": path, "mode": mode})

    async def chown(self, path: str, uid: int, gid: int) -> None:
        await self._link.call("chown", {"path": path, "uid": uid, "gid": gid})

    async def symlink(self, target: str, path: str) -> None:
        await self._link.call("symlink", {"target": target, "path": path})

    async def watch(self, path: str) -> AsyncIterator[Notice]:
        """Changes below a directory or to a file (inotify), until the iterator is closed."""
        stream = await self._link.open_stream({"kind": "watch", "path": path}, what=f"watch {path}")
        try:
            while (notice := await stream.notice()) is not None:
                yield notice
        finally:
            stream.close()

    # -- trees ------------------------------------------------------------------------------------------------------

    async def upload(self, local: Path | str, remote: str) -> Transfer:
        """Copy a file or a directory of this host into the guest, owned by root there.

        ``remote`` is the path of the copy; if it is a directory there, or ends in ``/``, the copy goes into it.
        Directories are merged with what is there. Raises HostError too.
        """
        source = Path(local)
        try:
            info = source.stat()
        except OSError as error:
            raise HostError(f"cannot read {source}: {error.strerror}") from error
        target = await self._copy_target(source.absolute().name, remote)
        if stats.S_ISREG(info.st_mode):
            size = await self.write_stream(
                target, _read_local(source), mode=stats.S_IMODE(info.st_mode) & 0o777, mkdir=True
            )
            return Transfer(files=1, bytes=size)
        if not stats.S_ISDIR(info.st_mode):
            raise HostError(f"{source} is neither a file nor a directory")
        parent, _, name = target.rstrip("/").rpartition("/")
        packer = Packer(source, name)
        body = {"kind": "tar-in", "path": parent or "/"}
        stream = await self._link.open_stream(body, what=f"upload to {target}", outputs=frozenset())
        await _fill(stream, _threaded(packer))
        return Transfer(files=packer.files, bytes=packer.bytes, skipped=tuple(packer.skipped))

    async def download(self, remote: str, local: Path | str, *, all_links: bool = False) -> Transfer:
        """Copy a file or a directory of the guest to this host.

        ``local`` is the path of the copy; if it is a directory, or ends in ``/``, the copy goes into it. Nothing is
        written anywhere else, whatever the guest sends; what could do harm later is left out and named in the result:
        devices, and links that lead out of the tree unless ``all_links``. A download that fails leaves no file half
        written in the place of another. Raises HostError too.
        """
        name = remote.rstrip("/").rpartition("/")[2]
        target = Path(local)
        if target.is_dir() or os.fspath(local).endswith("/"):
            if name in ("", ".", ".."):
                raise GuestError(f"download {remote}: it has no name to copy it by", hint="name the copy")
            target = target / name
        info = await self.stat(remote)
        if info.type is FileType.DIRECTORY:
            return await self._download_tree(remote, target, all_links)
        if info.type is not FileType.FILE:
            raise GuestError(f"download {remote}: it is a {info.type}, neither a file nor a directory")
        return await self._download_file(remote, target, info.mode & 0o755 | 0o600)

    async def tar_out(self, path: str) -> AsyncIterator[bytes]:
        """A file or a tree as a tar archive, in pieces as they come. It is the guest's: hostile."""
        stream = await self._link.open_stream({"kind": "tar-out", "path": path}, what=f"read {path}")
        try:
            async for data in _content(stream):
                yield data
        finally:
            stream.close()

    async def tar_in(self, path: str, source: AsyncIterable[bytes]) -> int:
        """Unpack a tar archive, given in pieces, below a directory; returns the bytes sent."""
        body = {"kind": "tar-in", "path": path}
        return await _fill(await self._link.open_stream(body, what=f"unpack into {path}", outputs=frozenset()), source)

    async def _copy_target(self, name: str, remote: str) -> str:
        if not remote.endswith("/"):
            try:
                if (await self.stat(remote)).type is not FileType.DIRECTORY:
                    return remote
            except GuestError as error:
                if error.errno_name != "ENOENT":
                    raise
                return remote
        return f"{remote.rstrip('/')}/{name}"

    async def _download_file(self, remote: str, target: Path, mode: int) -> Transfer:
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}")
        size, fd = 0, None
        pieces = self.read_stream(remote)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.fchmod(fd, mode)
            async for data in pieces:
                await _step(asyncio.to_thread(write_all, fd, data))
                size += len(data)
            temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, GuestError):
                raise HostError(f"cannot write {target}: {error.strerror}") from error
            raise
        finally:
            if fd is not None:
                os.close(fd)
            await pieces.aclose()  # type: ignore[attr-defined]
        return Transfer(files=1, bytes=size)

    async def _download_tree(self, remote: str, target: Path, all_links: bool) -> Transfer:
        unpacker = Unpacker(target, strip=True, all_links=all_links)
        try:
            stream = await self._link.open_stream({"kind": "tar-out", "path": remote}, what=f"download {remote}")
            try:
                async for data in _content(stream):
                    await _step(asyncio.to_thread(unpacker.feed, data))
            finally:
                stream.close()
            unpacker.finish()
        finally:
            unpacker.close()
        return Transfer(files=unpacker.files, bytes=unpacker.bytes, skipped=tuple(unpacker.skipped))


class _Page(msgspec.Struct, frozen=True):
    entries: list[DirEntry]
    more: bool = False


async def _content(stream: Stream) -> AsyncIterator[bytes]:
    """All that the agent sends on a stream; complete, or an error."""
    while (piece := await stream.receive()) is not None:
        yield piece[1]
    await stream.finished()
    if not stream.complete:
        raise ProtocolError("the guest's agent ended a stream in the middle")


async def _fill(stream: Stream, source: AsyncIterable[bytes]) -> int:
    """Send it all, and wait until the agent has made it good."""
    size = 0
    try:
        async for data in source:
            await stream.send(data)
            size += len(data)
        stream.send_eof()
        await stream.finished()
    finally:
        stream.close()
    return size


def _write_body(path: str, **options: Unpack[WriteOptions]) -> dict[str, Any]:
    unknown = options.keys() - WriteOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"writing a file takes no option {unknown.pop()!r}")
    return {"kind": "write", "path": path, **{key: value for key, value in options.items() if value is not None}}


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read_local(path: Path) -> AsyncIterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while data := await asyncio.to_thread(file.read, _CHUNK):
                yield data
    except OSError as error:
        if isinstance(error, GuestError):
            raise
        raise HostError(f"cannot read {path}: {error.strerror}") from error


async def _threaded(packer: Packer) -> AsyncIterator[bytes]:
    """An archive in pieces of a fair size, each made in a thread: disks block."""
    pieces = iter(packer)
    while data := await _step(asyncio.to_thread(_gather, pieces)):
        yield data


def _gather(pieces: Iterator[bytes]) -> bytes:
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= _CHUNK:
            break
    return bytes(gathered)


async def _step(work: Any) -> Any:
    """Wait for one short piece of work in a thread to its end, even when cancelled: its files are closed after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _checked(reply: dict[str, Any], kind: type[_T], op: str) -> _T:
    try:
        return msgspec.convert(reply, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{op}: the guest's agent answered wrongly: {error}") from error
