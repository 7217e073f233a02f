"""Files and trees of a guest through the client, against the fake agent."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guest_kit import fake_client

from posada.errors import GuestError, HostError
from posada.model.files import FileType, Transfer
from posada.proto.frames import WINDOW


def make_tree(top: Path) -> None:
    """Files of telling sizes, nested and empty directories, links, odd names and modes."""
    (top / "a" / "deep" / "er").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    for size in (0, 1, 511, 512, 513, 65536, 3 * WINDOW + 1):
        (top / "a" / f"{size}.bin").write_bytes(os.urandom(size))
    (top / "a" / "run.sh").write_text("#!/bin/sh\n")
    (top / "a" / "run.sh").chmod(0o755)
    (top / "a" / "deep" / "er" / ("long-" * 45)).write_text("a name that needs a GNU long name entry")
    (top / "ümlaut 水").write_text("unicode")
    os.mkdir(os.fsencode(top / "a") + b"/not utf-8 \xff")
    (top / "a" / "link").symlink_to("deep/er")
    (top / "a" / "deep" / "up").symlink_to("../run.sh")
    (top / "dangling").symlink_to("nowhere")
    os.utime(top / "a" / "run.sh", (1_600_000_000, 1_600_000_000))


def describe(top: Path) -> dict[str, object]:
    """What `make_tree` made, to be compared."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        info, name = path.lstat(), str(path.relative_to(top))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("dir", stat.S_IMODE(info.st_mode))
        else:
            found[name] = ("file", stat.S_IMODE(info.st_mode), int(info.st_mtime), path.read_bytes())
    return found


class TestContent:
    @pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3 * WINDOW + 1])
    async def test_write_and_read(self, tmp_path: Path, size: int) -> None:
        data = os.urandom(size)
        async with fake_client(tmp_path) as (guest, client):
            assert await client.write_file("/file", data, mode=0o640) == size
            assert await client.read_file("/file") == data
            assert stat.S_IMODE((guest.root / "file").stat().st_mode) == 0o640
            assert [p.name for p in guest.root.iterdir()] == ["file"]

    async def test_text(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.write_file("/file", "größer")
            assert (await client.read_file("/file")).decode() == "größer"

    async def test_ranges(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.write_file("/file", b"0123456789")
            assert await client.read_file("/file", offset=3, length=4) == b"3456"
            assert await client.read_file("/file", offset=8, length=100) == b"89"
            await client.write_file("/file", b"xy", offset=4)
            await client.write_file("/file", b"!", append=True)
            assert await client.read_file("/file") == b"0123xy6789!"

    async def test_missing_directories(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(GuestError) as caught:
                await client.write_file("/a/b/c", b"x")
            assert caught.value.errno_name == "ENOENT"
            await client.write_file("/a/b/c", b"x", mkdir=True)
            assert await client.read_file("/a/b/c") == b"x"

    async def test_unknown_options_are_not_ignored(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(TypeError, match="no option 'modus'"):
                await client.write_file("/a", b"x", modus=1)  # type: ignore[call-arg]

    async def test_reading_what_is_not_there(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(GuestError, match="read /nothing: No such file") as caught:
                await client.read_file("/nothing")
            assert caught.value.errno_name == "ENOENT"

    async def test_too_much_for_memory(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.write_file("/file", bytes(1000))
            with pytest.raises(GuestError, match="download it"):
                await client.read_file("/file", max_size=999)
            assert len(await client.read_file("/file", max_size=1000)) == 1000

    async def test_streams(self, tmp_path: Path) -> None:
        async def source() -> AsyncIterator[bytes]:
            for i in range(100):
                yield bytes([i]) * 10_000

        async with fake_client(tmp_path) as (_, client):
            assert await client.write_stream("/file", source()) == 1_000_000
            content = b"".join([piece async for piece in client.read_stream("/file")])
            assert content == b"".join([bytes([i]) * 10_000 for i in range(100)])

    async def test_a_source_that_fails_leaves_the_old_file(self, tmp_path: Path) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"new" * 100_000
            raise RuntimeError("out of ink")

        async with fake_client(tmp_path) as (guest, client):
            await client.write_file("/file", b"old")
            with pytest.raises(RuntimeError, match="ink"):
                await client.write_stream("/file", source())
            await client.call("ping")
            assert await client.read_file("/file") == b"old"
            assert [p.name for p in guest.root.iterdir()] == ["file"]

    async def test_a_stream_that_is_left_early_is_closed(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            await client.write_file("/file", bytes(10 * WINDOW))
            pieces = client.read_stream("/file")
            assert await anext(pieces)
            await pieces.aclose()  # type: ignore[attr-defined]
            await client.call("ping")
            async with asyncio.timeout(5):
                while guest.tasks:
                    await asyncio.wait(guest.tasks)


class TestNames:
    async def test_stat(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.mkdir("/d", mode=0o700)
            await client.write_file("/d/file", b"12345", mode=0o600)
            await client.symlink("file", "/d/link")
            info = await client.stat("/d/file")
            assert (info.type, info.size, info.mode) == (FileType.FILE, 5, 0o600)
            assert (await client.stat("/d")).type is FileType.DIRECTORY
            assert (await client.stat("/d/link")).type is FileType.FILE
            link = await client.stat("/d/link", follow=False)
            assert (link.type, link.target) == (FileType.LINK, "file")

    async def test_listing_in_pages(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            names = [f"{i:04}" for i in range(1234)]
            for name in names:
                (guest.root / name).touch()
            assert [entry.name for entry in await client.list_dir("/")] == names

    async def test_changes(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.mkdir("/a/b", parents=True)
            await client.write_file("/a/b/c", b"x")
            await client.chmod("/a/b/c", 0o400)
            assert (await client.stat("/a/b/c")).mode == 0o400
            await client.rename("/a/b", "/z")
            with pytest.raises(GuestError) as caught:
                await client.remove("/z")
            assert caught.value.errno_name == "ENOTEMPTY"
            await client.remove("/z", recursive=True)
            assert [entry.name for entry in await client.list_dir("/")] == ["a"]

    async def test_unknown_calls(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            with pytest.raises(GuestError) as caught:
                await client.call("dance")
            assert caught.value.errno_name == "ENOSYS"


class TestTrees:
    async def test_there_and_back(self, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        make_tree(tmp_path / "tree")
        async with fake_client(tmp_path) as (guest, client):
            sent = await client.upload(tmp_path / "tree", "/srv/tree")
            assert sent.files == 10
            assert describe(guest.root / "srv" / "tree") == describe(tmp_path / "tree")
            got = await client.download("/srv/tree", tmp_path / "back")
        assert describe(tmp_path / "back") == describe(tmp_path / "tree")
        assert (got.files, got.bytes, got.skipped) == (13, sent.bytes, ())

    async def test_where_copies_go(self, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "file").write_text("x")
        async with fake_client(tmp_path) as (guest, client):
            await client.upload(tmp_path / "tree", "/new")  # not there: becomes it
            await client.upload(tmp_path / "tree", "/new")  # a directory: goes into it
            await client.upload(tmp_path / "tree" / "file", "/new/")
            await client.upload(tmp_path / "tree" / "file", "/made/on/the/way")
            await client.upload(tmp_path / "tree" / "file", "/made/slash/")
            assert sorted(str(p.relative_to(guest.root)) for p in guest.root.rglob("*") if p.is_file()) == [
                "made/on/the/way", "made/slash/file", "new/file", "new/tree/file",
            ]  # fmt: skip
            await client.download("/new", tmp_path / "out")
            await client.download("/new", tmp_path / "out")
            await client.download("/new/file", tmp_path / "out" / "renamed")
            await client.download("/new/file", f"{tmp_path}/out/new/tree/")
        out = tmp_path / "out"
        assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
            "file", "new/file", "new/tree/file", "renamed", "tree/file",
        ]  # fmt: skip

    async def test_merging_replaces_files(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            (guest.root / "d").mkdir()
            (guest.root / "d" / "file").write_text("theirs")
            (tmp_path / "out" / "d").mkdir(parents=True)
            (tmp_path / "out" / "d" / "file").write_text("ours")
            (tmp_path / "out" / "d" / "other").write_text("ours")
            await client.download("/d", tmp_path / "out")
        assert (tmp_path / "out" / "d" / "file").read_text() == "theirs"
        assert (tmp_path / "out" / "d" / "other").read_text() == "ours"

    async def test_what_is_left_out_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        os.mkfifo(tmp_path / "tree" / "fifo")
        async with fake_client(tmp_path) as (_, client):
            assert await client.upload(tmp_path / "tree", "/t") == Transfer(files=0, bytes=0, skipped=("t/fifo",))

    async def test_a_single_file_keeps_its_mode_but_no_set_user_id(self, tmp_path: Path) -> None:
        (tmp_path / "tool").write_text("x")
        (tmp_path / "tool").chmod(0o4755)
        async with fake_client(tmp_path) as (guest, client):
            assert await client.upload(tmp_path / "tool", "/tool") == Transfer(files=1, bytes=1)
            assert stat.S_IMODE((guest.root / "tool").stat().st_mode) == 0o755
            (guest.root / "tool").chmod(0o6777)
            assert await client.download("/tool", tmp_path / "back") == Transfer(files=1, bytes=1)
        assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o755

    async def test_failures_of_this_host(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            with pytest.raises(HostError, match="cannot read"):
                await client.upload(tmp_path / "nothing", "/x")
            (guest.root / "file").write_text("x")
            with pytest.raises(HostError, match="cannot write"):
                await client.download("/file", tmp_path / "no" / "such" / "directory")
            (guest.root / "d").mkdir()
            (tmp_path / "occupied").write_text("x")
            with pytest.raises(HostError, match="cannot unpack"):
                await client.download("/d", tmp_path / "occupied")
            assert await client.read_file("/file") == b"x"

    async def test_failures_of_the_guest(self, tmp_path: Path) -> None:
        (tmp_path / "tree").mkdir()
        async with fake_client(tmp_path) as (guest, client):
            with pytest.raises(GuestError) as caught:
                await client.download("/nothing", tmp_path / "out")
            assert caught.value.errno_name == "ENOENT"
            assert not (tmp_path / "out").exists()
            (guest.root / "file").write_text("x")
            with pytest.raises(GuestError, match="/file/tree: Not a directory"):
                await client.upload(tmp_path / "tree", "/file/tree")

    async def test_a_guest_that_dies_leaves_no_half_file(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (guest, client):
            await client.write_file("/big", bytes(20 * WINDOW))
            (tmp_path / "out").mkdir()
            task = asyncio.create_task(client.download("/big", tmp_path / "out" / "big"))
            async with asyncio.timeout(10):
                while not list((tmp_path / "out").iterdir()):
                    await client.call("ping")
            await guest.close()
            with pytest.raises(GuestError):
                await task
        assert list((tmp_path / "out").iterdir()) == []

    async def test_a_cancelled_download_leaves_no_half_file(self, tmp_path: Path) -> None:
        async with fake_client(tmp_path) as (_, client):
            await client.write_file("/big", bytes(20 * WINDOW))
            (tmp_path / "out").mkdir()
            task = asyncio.create_task(client.download("/big", tmp_path / "out" / "big"))
            async with asyncio.timeout(10):
                while not list((tmp_path / "out").iterdir()):
                    await client.call("ping")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list((tmp_path / "out").iterdir()) == []
            assert await client.call("ping") == {}
