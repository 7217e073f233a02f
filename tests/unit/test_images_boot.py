"""What a guest boots with: the initramfs posada writes, the kernel it takes out of a bzImage, the modules it chooses."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest

from posada.errors import HostError, ImageError
from posada.images.cpio import CpioWriter
from posada.images.initramfs import build_initramfs
from posada.images.initrd import InitrdCache, pack_modules, unpack_modules
from posada.images.kernel import extract_vmlinux, has_pvh_note
from posada.images.modules import boot_modules, conditions, load_order, modinfo_depends, parse_modules_dep


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """{name: (mode, data)}, as the kernel reads it (buffer-format.rst). Also checks that it is whole and aligned."""
    out: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        assert archive[at + 110 + fields[11] - 1] == 0
        at += (110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            assert archive[at:].strip(b"\0") == b""
            return out
        assert fields[2:4] == [0, 0] and fields[5] == 0, "root's, and of no date"
        out[name] = (fields[1], archive[at : at + fields[6]])
        at += (fields[6] + 3) & ~3


def test_the_initramfs_is_what_the_agent_expects() -> None:
    modules = [("virtio_ring.ko", b"\x7fELF ring"), ("virtio.ko", b"\x7fELF v")]
    files = read_cpio(build_initramfs(b"\x7fELF agent", modules))
    assert files["init"] == (0o100755, b"\x7fELF agent")
    assert files["modules/order"][1] == b"/modules/virtio_ring.ko\n/modules/virtio.ko\n"
    assert files["modules/virtio.ko"] == (0o100644, b"\x7fELF v")
    assert files["dev/console"][0] == 0o020600
    assert {name for name, (mode, _) in files.items() if mode & 0o170000 == 0o040000} == {
        "dev", "proc", "sys", "run", "root", "modules",
    }  # fmt: skip
    names = list(files)
    for name in names:
        assert "/" not in name or names.index(name.partition("/")[0]) < names.index(name), "parents come first"


def test_the_initramfs_is_the_same_every_time() -> None:
    archive = build_initramfs(b"agent", [("a.ko", b"data")])
    assert archive == build_initramfs(b"agent", [("a.ko", b"data")])
    assert hashlib.sha256(archive).hexdigest() == "469229654a6698e9f8a358992fa55f4b8407eb6a5c13b3629e963fc90579561c"


def test_a_module_cannot_name_a_path() -> None:
    for name in ("../init", "a\nb"):
        with pytest.raises(ValueError):
            build_initramfs(b"", [(name, b"")])


def test_cpio_refuses_names_the_kernel_would_misread() -> None:
    for name in ("", "/etc/passwd", "a\0b"):
        with pytest.raises(ValueError):
            CpioWriter().file(name, b"")


def make_vmlinux(*, pvh: bool = True, size: int = 50_000) -> bytes:
    """An ELF64 file with one PT_NOTE segment, and some padding that compresses and some that does not."""
    note = struct.pack("<III", 4, 4, 18 if pvh else 17) + b"Xen\0" + struct.pack("<I", 0x1000000)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    body = header + program + note
    noise = b"".join(hashlib.sha256(bytes([i % 256])).digest() for i in range(200))
    return (body + noise).ljust(size, b"\0")


def make_bzimage(payload: bytes, *, version: int = 0x20F) -> bytes:
    image = bytearray(512 * 5 + 64) + payload + bytes(100)
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image)


def pack_gzip(data: bytes) -> bytes:
    return gzip.compress(data)


def pack_xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters) + struct.pack("<I", len(data))


def pack_lz4(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out + struct.pack("<I", len(data))


def pack_zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor().compress(data)
    return packed + struct.pack("<I", len(data))


PACKERS = [pack_gzip, pack_xz, pack_lz4, pack_zstd]


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("size", [50_000, 9 << 20])
def test_the_vmlinux_inside_a_bzimage(pack: Callable[[bytes], bytes], size: int) -> None:
    vmlinux = make_vmlinux(size=size)
    assert extract_vmlinux(make_bzimage(pack(vmlinux))) == vmlinux


def test_a_vmlinux_is_its_own() -> None:
    assert extract_vmlinux(make_vmlinux()) == make_vmlinux()


@pytest.mark.parametrize("pack", PACKERS)
def test_a_kernel_without_pvh_entry_is_refused(pack: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ImageError, match="PVH"):
        extract_vmlinux(make_bzimage(pack(make_vmlinux(pvh=False))))


@pytest.mark.parametrize("pack", PACKERS)
def test_a_corrupt_payload_is_an_image_error(pack: Callable[[bytes], bytes]) -> None:
    payload = bytearray(pack(make_vmlinux()))
    for at in range(6, len(payload) - 8, 97):
        payload[at] ^= 0x55
    with pytest.raises(ImageError):
        extract_vmlinux(make_bzimage(bytes(payload)))


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("claim", [0, 4095, 49_999, 1 << 31])
def test_a_payload_that_lies_about_its_size_is_refused(pack: Callable[[bytes], bytes], claim: int) -> None:
    payload = pack(make_vmlinux())[:-4] + struct.pack("<I", claim)
    with pytest.raises(ImageError):
        extract_vmlinux(make_bzimage(payload))


@pytest.mark.parametrize("pack", PACKERS)
def test_output_is_bounded_by_the_claim(pack: Callable[[bytes], bytes]) -> None:
    """A payload that claims 8 KiB and unpacks to 64 MiB is cut off, not unpacked."""
    payload = pack(make_vmlinux(size=64 << 20))[:-4] + struct.pack("<I", 8192)
    with pytest.raises(ImageError):
        extract_vmlinux(make_bzimage(payload))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "neither a bzImage"),
        (b"MZ" + bytes(1000), "neither a bzImage"),
        (make_bzimage(b"x" * 100, version=0x207), "boot protocol 2.07"),
        (make_bzimage(b"????" + bytes(100) + struct.pack("<I", 5000)), "unknown way"),
        (make_bzimage(pack_gzip(make_vmlinux()))[:3000], "outside the file"),
        (b"\x7fELF" + bytes(100), "PVH"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        extract_vmlinux(image)


def test_notes_are_searched_within_bounds() -> None:
    assert has_pvh_note(make_vmlinux())
    lying = bytearray(make_vmlinux())
    struct.pack_into("<I", lying, 120, 0xFFFFFFFF)
    assert not has_pvh_note(bytes(lying))


def make_module(depends: str, *aliases: str) -> bytes:
    """An ELF64 relocatable file with a .modinfo section."""
    names = b"\0.modinfo\0.shstrtab\0"
    info = b"license=GPL\0depends=" + depends.encode() + b"\0vermagic=6.1\0"
    info += b"".join(b"alias=" + alias.encode() + b"\0" for alias in aliases)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    at = 64 + len(info) + len(names)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 2)
    null = bytes(64)
    modinfo = struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
    strings = struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + null + modinfo + strings


TREE = {
    "kernel/drivers/virtio/virtio.ko": make_module("virtio_ring"),
    "kernel/drivers/virtio/virtio_ring.ko": make_module(""),
    "kernel/drivers/virtio/virtio_pci.ko": make_module("virtio,virtio_ring"),
    "kernel/drivers/char/virtio_console.ko.xz": lzma.compress(make_module("virtio,virtio_ring")),
    "kernel/drivers/block/virtio_blk.ko.gz": gzip.compress(make_module("virtio")),
    "kernel/net/core/failover.ko": make_module(""),
    "kernel/drivers/net/net_failover.ko": make_module("failover"),
    "kernel/drivers/net/virtio-net.ko": make_module("virtio,net-failover"),
    "kernel/fs/other.ko": make_module(""),
    "modules.builtin": b"kernel/drivers/char/hw_random/virtio-rng.ko\n",
}


def readers(tree: dict[str, bytes]) -> dict[str, Callable[[], bytes]]:
    return {path: lambda data=data: data for path, data in tree.items()}  # type: ignore[misc]


def test_boot_modules_come_with_what_they_need_in_order() -> None:
    modules = boot_modules(readers(TREE))
    assert [name for name, _ in modules] == [
        "virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio_console.ko", "virtio_blk.ko",
        "failover.ko", "net_failover.ko", "virtio_net.ko",
    ]  # fmt: skip
    assert all(data[:4] == b"\x7fELF" for _, data in modules), "compressed ones are unpacked"


def test_modules_dep_wins_where_there_is_one() -> None:
    dep = "kernel/fs/other.ko: kernel/drivers/virtio/virtio.ko\nkernel/drivers/virtio/virtio.ko:\n"
    assert parse_modules_dep(dep) == {"other": ["virtio"], "virtio": []}
    assert [n for n, _ in boot_modules(readers(TREE), wanted=["other"], dep=dep)] == ["virtio.ko", "other.ko"]


def test_a_circle_of_dependencies_ends() -> None:
    circle = {"a": ["b"], "b": ["c"], "c": ["a"]}
    assert sorted(load_order(["a"], circle.get)) == ["a", "b", "c"]


@pytest.mark.parametrize("data", [b"", b"not elf", b"\x7fELF", make_module("x")[:100]])
def test_a_corrupt_module_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        boot_modules(readers({"kernel/virtio_pci.ko": data}))
    with pytest.raises(ImageError):
        boot_modules(readers({"kernel/virtio_pci.ko.xz": data}))


def test_dependencies_are_read_from_the_module() -> None:
    assert modinfo_depends(make_module("a,b-c")) == ["a", "b_c"]
    assert modinfo_depends(make_module("")) == []


def test_modules_are_loaded_for_the_devices_that_are_there() -> None:
    modules = [
        ("virtio.ko", make_module("")),
        ("modern.ko", make_module("")),
        ("virtio_pci.ko", make_module("virtio,modern", "pci:v00001AF4d*sv*sd*bc*sc*i*")),
        ("virtio_mmio.ko", make_module("virtio", "of:N*T*Cvirtio,mmio", "acpi*:LNRO0005:*")),
        ("common.ko", make_module("")),
        ("vsock.ko", make_module("common,virtio", "virtio:d00000013v*", "net-pf-40")),
        ("rng.ko", make_module("virtio,common", "virtio:d00000004v*")),
        ("virtio-blk.ko", make_module("virtio", "virtio:d00000002v*")),
        ("tcp_diag.ko", make_module("", "net-pf-16-proto-4-type-2-6")),
        ("broken.ko", b"\x7fELF"),
    ]
    mmio = ["of:N*T*Cvirtio,mmio", "acpi*:LNRO0005:*"]
    pci, vsock, rng = ["pci:v00001AF4d*sv*sd*bc*sc*i*"], ["virtio:d00000013v*"], ["virtio:d00000004v*"]
    assert conditions(modules) == [[], pci, pci, mmio, rng + vsock, vsock, rng, [], [], []]
    order = read_cpio(build_initramfs(b"agent", modules))["modules/order"][1].decode().splitlines()
    assert order[0] == "/modules/virtio.ko"
    assert order[3] == "/modules/virtio_mmio.ko of:N*T*Cvirtio,mmio acpi*:LNRO0005:*"


def test_packed_modules_keep_their_order_and_bytes(tmp_path: Path) -> None:
    modules = [("z.ko", b"last letter, first loaded"), ("a.ko", b"x" * 5000)]
    assert pack_modules(modules) == pack_modules(modules)
    (tmp_path / "modules.tar").write_bytes(pack_modules(modules))
    assert unpack_modules(tmp_path / "modules.tar") == modules
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ImageError, match="damaged"):
        unpack_modules(tmp_path / "bad.tar")


class TestInitrdCache:
    DIGEST = "ab" * 32

    @pytest.fixture
    def agent(self, tmp_path: Path) -> Path:
        path = tmp_path / "agent"
        path.write_bytes(b"\x7fELF one")
        return path

    @pytest.fixture
    def modules(self, tmp_path: Path) -> Path:
        path = tmp_path / "modules.tar"
        path.write_bytes(pack_modules([("a.ko", b"\x7fELF")]))
        return path

    def test_it_is_made_once(self, tmp_path: Path, agent: Path, modules: Path) -> None:
        cache = InitrdCache(tmp_path / "images", lambda arch: agent)
        path = cache.get(self.DIGEST, modules, "x86_64")
        made = path.stat()
        assert read_cpio(path.read_bytes())["init"][1] == b"\x7fELF one"
        assert cache.get(self.DIGEST, modules, "x86_64") == path
        assert InitrdCache(tmp_path / "images", lambda arch: agent).get(self.DIGEST, modules, "x86_64") == path
        assert (path.stat().st_ino, path.stat().st_size) == (made.st_ino, made.st_size)
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_a_new_agent_makes_a_new_one(self, tmp_path: Path, agent: Path, modules: Path) -> None:
        cache = InitrdCache(tmp_path / "images", lambda arch: agent)
        old = cache.get(self.DIGEST, modules, "x86_64")
        agent.write_bytes(b"\x7fELF another")
        new = cache.get(self.DIGEST, modules, "x86_64")
        assert new != old
        assert read_cpio(new.read_bytes())["init"][1] == b"\x7fELF another"

    def test_collect_keeps_what_is_in_use(self, tmp_path: Path, agent: Path, modules: Path) -> None:
        cache = InitrdCache(tmp_path / "images", lambda arch: agent)
        kept = cache.get(self.DIGEST, modules, "x86_64")
        gone = cache.get("cd" * 32, modules, "x86_64")
        agent.write_bytes(b"\x7fELF two")
        current = cache.get(self.DIGEST, modules, "x86_64")
        os.utime(kept, (0, 0))
        assert sorted(cache.collect([self.DIGEST])) == sorted([kept.name, gone.name])
        assert list(current.parent.iterdir()) == [current]

    def test_an_agent_that_is_none_is_refused(self, tmp_path: Path, agent: Path, modules: Path) -> None:
        agent.write_text("#!/bin/sh")
        with pytest.raises(HostError, match="not the agent"):
            InitrdCache(tmp_path / "images", lambda arch: agent).get(self.DIGEST, modules, "x86_64")
