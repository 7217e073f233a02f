"""Kernels, modules and apt's files made of anything: an answer or an ImageError, and bounded output."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
from hypothesis import given, settings
from hypothesis import strategies as st

from posada.errors import ImageError
from posada.images.contents import kernel_arch
from posada.images.kernel import extract_vmlinux, has_pvh_note
from posada.images.modules import boot_modules, modinfo_depends, parse_modules_dep
from posada.images.sources import apt_options, for_guest, parse_deb822, parse_one_line, sources_for, to_one_line


def vmlinux() -> bytes:
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + bytes(4)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return (header + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, 20, 20, 4) + note).ljust(8192, b"\0")


def bzimage(payload: bytes) -> bytes:
    image = bytearray(1024) + payload
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    return bytes(image)


def lz4_legacy(data: bytes) -> bytes:
    block = lz4.block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + struct.pack("<I", len(data))


SAMPLES = [
    vmlinux(),
    bzimage(gzip.compress(vmlinux(), mtime=0)),
    bzimage(lzma.compress(vmlinux()) + struct.pack("<I", 8192)),
    bzimage(lz4_legacy(vmlinux())),
]
CHANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 1200), st.sampled_from([0x1F1, 0x206, 0x248, 0x24C, 32, 54])), st.binary(max_size=8)
    ),
    max_size=5,
)


def test_the_samples_are_kernels() -> None:
    for image in SAMPLES:
        assert extract_vmlinux(image) == vmlinux()


@settings(max_examples=400)
@given(st.sampled_from(SAMPLES), CHANGES, st.integers(0, 9000))
def test_changed_kernels(image: bytes, changes: list[tuple[int, bytes]], cut: int) -> None:
    data = bytearray(image)
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    for kernel in (bytes(data), bytes(data[:cut])):
        try:
            out = extract_vmlinux(kernel)
        except ImageError:
            continue
        assert has_pvh_note(out)
        assert len(out) < 16 << 20


@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    from pathlib import Path

    for parse in (extract_vmlinux, lambda d: kernel_arch(d, Path("x")), lambda d: modinfo_depends(b"\x7fELF" + d)):
        try:
            parse(data)
        except ImageError:
            pass
    has_pvh_note(b"\x7fELF\x02\x01" + data)


@given(
    st.dictionaries(
        st.sampled_from(["a/virtio_pci.ko", "b/virtio_blk.ko.xz", "c/virtio_net.ko.gz"]), st.binary(max_size=200)
    )
)
def test_any_modules(tree: dict[str, bytes]) -> None:
    def reader(data: bytes) -> Callable[[], bytes]:
        return lambda: data

    try:
        boot_modules({name: reader(data) for name, data in tree.items()})
    except ImageError:
        pass


@given(st.text(max_size=400))
def test_any_text(text: str) -> None:
    parse_modules_dep(text)
    for_guest(apt_options(text))
    for parsed in (parse_one_line(text), parse_deb822(text), parse_deb822("Types: deb\n" + text)):
        for line in to_one_line(sources_for("bookworm", parsed)).splitlines():
            assert line.startswith("deb ")
