"""Archives of a hostile guest: nothing is written outside the target, nothing dangerous inside it."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from guest_kit import Wire, scripted, until_closed

from posada.errors import HostError, PosadaError, ProtocolError
from posada.guest.client import GuestClient
from posada.guest.unpack import Unpacker
from posada.proto.frames import FrameType, cbor_frame, frame


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **attributes: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def link(name: str, target: str) -> bytes:
    return entry(name, tarfile.SYMTYPE, linkname=target)


END = bytes(1024)
TOP = entry("top", tarfile.DIRTYPE, mode=0o755)


def unpack(directory: Path, archive: bytes, *, piece: int = 1 << 20) -> Unpacker:
    """Unpack into ``directory/out``, which has a secret beside it."""
    (directory / "secret").write_text("untouched")
    unpacker = Unpacker(directory / "out", strip=True)
    try:
        for i in range(0, len(archive), piece):
            unpacker.feed(archive[i : i + piece])
        unpacker.finish()
    finally:
        unpacker.close()
    return unpacker


def outside(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in directory.iterdir() if p.name != "out"}


@pytest.mark.parametrize("piece", [1, 7, 511, 512, 513, 100_000])
def test_any_pieces(tmp_path: Path, piece: int) -> None:
    archive = (
        TOP + entry("top/file", data=b"x" * 1000) + entry("top/" + "n" * 200, data=b"y") + link("top/l", "file") + END
    )
    unpacker = unpack(tmp_path, archive, piece=piece)
    assert (unpacker.files, unpacker.bytes, unpacker.skipped) == (3, 1001, [])
    assert (tmp_path / "out" / "file").read_bytes() == b"x" * 1000
    assert (tmp_path / "out" / ("n" * 200)).read_bytes() == b"y"
    assert os.readlink(tmp_path / "out" / "l") == "file"


@pytest.mark.parametrize(
    "evil",
    [
        entry("/etc/evil"),
        entry("top/../../evil"),
        entry("../evil"),
        entry("top/.."),
        entry("top/a/../../../evil", tarfile.DIRTYPE),
        entry("other/file"),
        entry("top"),
        entry("."),
        link("top", "/etc"),
        entry("top/sparse", tarfile.GNUTYPE_SPARSE),
        entry("top/x", tarfile.XHDTYPE, b"20 path=/etc/passwd\n"),
        entry("top/g", tarfile.XGLTYPE, b"20 path=/etc/passwd\n"),
        entry("top/?", b"Z"),
        entry("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"x" * 5000),
        entry("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"/etc/evil\0") + entry("top/x"),
        entry("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"top/../../evil\0") + entry("top/x"),
        b"\xff" * 512,
        b"garbage " * 64,
        entry("top/x", data=b"")[:-512] + b"\1" * 512,
    ],
)
def test_refused(tmp_path: Path, evil: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(tmp_path, TOP + evil + END)
    assert outside(tmp_path) == {"secret": "untouched"}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("top/l", "/etc/passwd"),
        ("top/l", "../secret"),
        ("top/a/l", "../../secret"),
        ("top/l", "a/../../secret"),
        ("top/l", "a/.."),  # ".." after a name may climb from where another link led
        ("top/l", ""),
        ("top/l", ".."),
    ],
)
def test_links_that_could_lead_out_are_left_out(tmp_path: Path, name: str, target: str) -> None:
    unpacker = unpack(tmp_path, TOP + link(name, target) + END)
    assert unpacker.skipped == [name.removeprefix("top/")]
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    links = {"l": "a/b", "a/l": "../x", "a/b/l": "../../a/./y", "here": ".", "a/up": ".."}
    unpacker = unpack(tmp_path, TOP + b"".join(link(f"top/{n}", t) for n, t in links.items()) + END)
    assert unpacker.skipped == []
    assert {n: os.readlink(tmp_path / "out" / n) for n in links} == links


def test_all_links_if_asked_for_and_nothing_is_written_through_them(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    unpacker = Unpacker(tmp_path / "out", strip=True, all_links=True)
    try:
        unpacker.feed(TOP + link("top/l", "../elsewhere") + link("top/etc", "/etc"))
        with pytest.raises(HostError, match="cannot unpack"):
            unpacker.feed(entry("top/l/file", data=b"evil") + END)
    finally:
        unpacker.close()
    assert os.readlink(tmp_path / "out" / "etc") == "/etc"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_chain_of_links_cannot_climb(tmp_path: Path) -> None:
    """s leads up to the top by honest means; x would use it to climb one higher (CVE-2025-4330 is of this kind)."""
    archive = (
        TOP + link("top/d/e/s", "../..") + link("top/x", "d/e/s/../secret") + entry("top/x/file", data=b"evil") + END
    )
    unpack(tmp_path, archive)
    assert outside(tmp_path) == {"secret": "untouched"}
    assert (tmp_path / "out" / "x" / "file").read_bytes() == b"evil"  # x is a directory of its own


@pytest.mark.parametrize("then", [entry("top/l/file", data=b"evil"), entry("top/l/d", tarfile.DIRTYPE)])
def test_nothing_is_written_through_a_link(tmp_path: Path, then: bytes) -> None:
    with pytest.raises(HostError, match="cannot unpack"):
        unpack(tmp_path, TOP + link("top/l", "a") + then + END)
    assert not (tmp_path / "out" / "a").exists()


def test_nothing_is_written_through_a_link_of_ours(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "l").symlink_to("../elsewhere")
    with pytest.raises(HostError, match="cannot unpack"):
        unpack_at(tmp_path, TOP + entry("top/l/file", data=b"evil") + END)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def unpack_at(directory: Path, archive: bytes) -> None:
    unpacker = Unpacker(directory / "out", strip=True)
    try:
        unpacker.feed(archive)
    finally:
        unpacker.close()


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").symlink_to("../secret")
    unpack(tmp_path, TOP + entry("top/file", data=b"new") + END)
    assert outside(tmp_path) == {"secret": "untouched"}
    assert (tmp_path / "out" / "file").read_bytes() == b"new"
    assert not (tmp_path / "out" / "file").is_symlink()


def test_a_directory_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        unpack(tmp_path, TOP + entry("top/d/file") + link("top/d", "elsewhere") + END)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
def test_devices_fifos_and_hard_links_are_left_out(tmp_path: Path, kind: bytes) -> None:
    archive = (
        TOP + entry("top/node", kind, devmajor=1, devminor=3, linkname="secret") + entry("top/file", data=b"x") + END
    )
    unpacker = unpack(tmp_path, archive)
    assert unpacker.skipped == ["node"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_modes_are_tamed(tmp_path: Path) -> None:
    archive = (
        TOP + entry("top/f", mode=0o6777) + entry("top/none", mode=0) + entry("top/d", tarfile.DIRTYPE, mode=0o1777)
    )
    unpack(tmp_path, archive + entry("top/d0", tarfile.DIRTYPE, mode=0) + entry("top/d0/x") + END)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*")}
    assert modes == {"f": 0o755, "none": 0o600, "d": 0o755, "d0": 0o700, "x": 0o644}


def test_a_name_that_would_blow_up_a_terminal_is_shown_safely(tmp_path: Path) -> None:
    assert unpack(tmp_path, TOP + entry("top/\x1b[2J", tarfile.FIFOTYPE) + END).skipped == ["�[2J"]


@pytest.mark.parametrize("archive", [b"", TOP, TOP + entry("top/f", data=b"x" * 600)[:-512], TOP + END[:100]])
def test_cut_off(tmp_path: Path, archive: bytes) -> None:
    with pytest.raises(ProtocolError, match="cut off"):
        unpack(tmp_path, archive)


def test_going_on_after_the_end(tmp_path: Path) -> None:
    assert unpack(tmp_path, TOP + END + bytes(10240)).files == 0
    with pytest.raises(ProtocolError, match="after the end"):
        unpack(tmp_path, TOP + END + bytes(2 << 20))


def test_absurd_numbers(tmp_path: Path) -> None:
    huge = bytearray(entry("top/f", mtime=1))
    for position, length, value in ((136, 12, b"\x80" + b"\x7f" * 11), (124, 12, b"\xff" * 12)):
        record = bytearray(huge)
        record[position : position + length] = value
        record[148:156] = b" " * 8
        record[148:156] = b"%06o\0 " % sum(record)
        try:
            unpack(tmp_path, TOP + bytes(record) + END)
        except PosadaError:
            pass
    assert outside(tmp_path) == {"secret": "untouched"}


def test_the_standard_library_writes_what_we_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (("top/" + "d/" * 60 + "file", b"deep"), ("top/b", b"x" * 70_000)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    unpacker = unpack(tmp_path, buffer.getvalue())
    assert unpacker.files == 2
    assert (tmp_path / "out" / ("d/" * 60) / "file").read_bytes() == b"deep"


async def test_download_from_a_hostile_agent(tmp_path: Path) -> None:
    """The whole way: an agent that answers a download with an archive that tries to leave."""
    evil = (
        TOP + entry("top/fine", data=b"fine") + link("top/etc", "/etc") + entry("top/../../../evil", data=b"evil") + END
    )

    async def script(wire: Wire) -> None:
        await wire.greet()
        await wire.expect(FrameType.CALL)
        wire.send(cbor_frame(0, FrameType.REPLY, {"id": 1, "ok": {"type": "dir", "mode": 0o755, "size": 0}}))
        await wire.expect(FrameType.OPEN)
        wire.send(cbor_frame(1, FrameType.OPENED, {}) + frame(1, FrameType.DATA, evil))
        wire.send(frame(1, FrameType.EOF) + cbor_frame(1, FrameType.CLOSE, {}))
        await until_closed(wire)

    async with scripted(tmp_path / "agent", script):
        async with await GuestClient.connect([tmp_path / "agent"], timeout=10) as client:
            with pytest.raises(ProtocolError, match="evil"):
                await client.download("/top", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fine"]
    assert not list(tmp_path.rglob("evil"))
