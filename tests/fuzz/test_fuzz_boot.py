"""Kernels are untrusted: whatever a file holds, loading it ends, in guest memory or with one of our errors.

``POSADA_FUZZ_EXAMPLES`` sets how many are tried; the default takes a second or two.
"""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.vmm_kernels import bzimage, elf, file

from posada.errors import ImageError
from posada.vmm import layout
from posada.vmm.boot.load import load
from posada.vmm.memory import GuestMemory

MIB = 1 << 20
EXAMPLES = int(os.environ.get("POSADA_FUZZ_EXAMPLES", "400"))

fields = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, 0xFFFF_FFFF, (1 << 63) - 1, (1 << 64) - 1, MIB])
patches = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), fields, st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=8
)


def try_to_load(kernel: bytes) -> None:
    memory = GuestMemory.anonymous(4 * MIB)
    fd = file(kernel)
    try:
        entry = load(memory, fd, -1, "", 0)
    except ImageError:
        return
    finally:
        os.close(fd)
    assert entry.address >= layout.HIGH_RAM
    memory.view(entry.address, 0)


def patched(kernel: bytes, headers: int, changes: list[tuple[float, int, int]]) -> bytes:
    data = bytearray(kernel)
    for place, value, size in changes:
        at = int(place * (min(headers, len(data)) - size))
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.booleans(), patches)
def test_damaged_elf(pvh: bool, changes: list[tuple[float, int, int]]) -> None:
    kernel = elf(b"\xf4" * 64, pvh=pvh, segments=[(2 * MIB, b"x" * 64)])
    try_to_load(patched(kernel, len(kernel), changes))


@settings(max_examples=EXAMPLES, deadline=None)
@given(patches)
def test_damaged_bzimage(changes: list[tuple[float, int, int]]) -> None:
    kernel = bytearray(patched(bzimage(b"\xf4")[0x1F0:], 0x80, changes))
    try_to_load(bytes(0x1F0) + kernel)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([b"", b"\x7fELF\x02\x01\x01"]), st.binary(max_size=2048))
def test_anything(start: bytes, rest: bytes) -> None:
    try_to_load(start + rest)
