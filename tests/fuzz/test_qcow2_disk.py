"""Random requests to a qcow2 disk: it always holds what a plain array of bytes holds, and QEMU agrees at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.block_kit import KIB, check, content, needs_qemu_img, open_disk, pattern, qemu_img, qemu_io, read, write

from posada.vmm.block.chain import overlay
from posada.vmm.block.disk import Disk

SIZE = 512 * KIB
EXAMPLES = int(os.environ.get("POSADA_FUZZ_EXAMPLES", "400")) // 16
OPTIONS = [
    "cluster_size=512", "cluster_size=4k", "cluster_size=64k", "compat=0.10,cluster_size=1k", "lazy_refcounts=on",
    "cluster_size=512,refcount_bits=1", "cluster_size=2k,refcount_bits=64",
]  # fmt: skip
OFFSETS = st.integers(0, SIZE - 1) | st.integers(0, SIZE // 4096 - 1).map(lambda n: n * 4096)
LENGTHS = st.integers(1, 300) | st.sampled_from([512, 4096, 65536, 200_000]) | st.integers(1, SIZE)


class Qcow2Machine(RuleBasedStateMachine):
    """The disk, its model, and QEMU, which takes over now and then."""

    disk: Disk | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.paths: list[Path] = []
        self.model = bytearray()
        self.step = 0

    @initialize(options=st.sampled_from(OPTIONS), backed=st.booleans(), length=st.integers(1, 2 * SIZE // 512))
    def create(self, options: str, backed: bool, length: int) -> None:
        self.options = options
        path = self.folder / "0.qcow2"
        below: list[str | Path] = []
        self.model = bytearray(SIZE)
        if backed:
            base = self.folder / "base.raw"
            base.write_bytes(pattern(length * 512, 1))
            self.model = bytearray(base.read_bytes()[:SIZE].ljust(SIZE, b"\0"))
            below = ["-b", base, "-F", "raw"]
            self.paths.append(base)
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, path, str(SIZE))
        self.paths.append(path)
        self.disk = open_disk(*self.paths)

    def clip(self, offset: int, length: int) -> int:
        return min(length, len(self.model) - offset)

    @rule(offset=OFFSETS, length=LENGTHS, piece=st.integers(1, 5000))
    def write(self, offset: int, length: int, piece: int) -> None:
        assert self.disk is not None
        length = self.clip(offset, length)
        self.step += 1
        write(self.disk, offset, pattern(length, self.step), [piece, piece])
        self.model[offset : offset + length] = pattern(length, self.step)

    @rule(offset=OFFSETS, length=LENGTHS, piece=st.integers(1, 5000))
    def read(self, offset: int, length: int, piece: int) -> None:
        assert self.disk is not None
        length = self.clip(offset, length)
        assert read(self.disk, offset, length, [piece, 1, piece]) == self.model[offset : offset + length]

    @rule(offset=OFFSETS, length=LENGTHS, unmap=st.booleans())
    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        assert self.disk is not None
        length = self.clip(offset, length)
        self.disk.write_zeroes(offset, length, unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=OFFSETS, length=LENGTHS)
    def discard(self, offset: int, length: int) -> None:
        assert self.disk is not None
        length = self.clip(offset, length)
        self.disk.discard(offset, length)
        found = read(self.disk, offset, length)
        assert all(new in (0, old) for new, old in zip(found, self.model[offset : offset + length], strict=True))
        self.model[offset : offset + length] = found

    @rule()
    def flush(self) -> None:
        assert self.disk is not None
        self.disk.flush()
        check(self.paths[-1])

    @rule()
    def reopen(self) -> None:
        assert self.disk is not None
        self.disk.close()
        check(self.paths[-1])
        self.disk = open_disk(*self.paths)

    @rule(
        block=st.integers(0, SIZE // 512 - 1),
        count=st.integers(1, 300),
        action=st.sampled_from(["write", "zero", "discard"]),
    )
    def let_qemu(self, block: int, count: int, action: str) -> None:
        assert self.disk is not None
        self.disk.close()
        offset, length = block * 512, self.clip(block * 512, count * 512)
        if action == "write":
            qemu_io(self.paths[-1], f"write -P 165 {offset} {length}")
            self.model[offset : offset + length] = b"\xa5" * length
        elif action == "zero":
            qemu_io(self.paths[-1], f"write -z -u {offset} {length}")
            self.model[offset : offset + length] = bytes(length)
        else:
            qemu_io(self.paths[-1], f"discard {offset} {length}")
        self.disk = open_disk(*self.paths)
        if action == "discard":
            self.model[offset : offset + length] = read(self.disk, offset, length)

    @precondition(lambda self: len(self.paths) < 5)
    @rule()
    def overlay(self) -> None:
        assert self.disk is not None
        path = self.folder / f"{len(self.paths)}.qcow2"
        self.disk.freeze()
        below = self.paths[-1]
        check(below)
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", self.options, "-b", below, "-F", "qcow2", path, str(len(self.model))
        )
        self.disk = overlay(self.disk, os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self.paths.append(path)

    @precondition(lambda self: len(self.model) < 2 * SIZE)
    @rule(sectors=st.integers(1, 500))
    def grow(self, sectors: int) -> None:
        assert self.disk is not None
        self.disk.resize(len(self.model) + sectors * 512)
        self.model += bytes(sectors * 512)

    @invariant()
    def knows_its_size(self) -> None:
        assert self.disk is None or self.disk.size == len(self.model)

    def teardown(self) -> None:
        try:
            if self.disk is not None:
                assert read(self.disk, 0, len(self.model)) == self.model
                self.disk.close()
                for path in self.paths:
                    if path.suffix == ".qcow2":
                        check(path)
                assert content(self.paths[-1]) == self.model
                plain = self.folder / "model.raw"
                plain.write_bytes(self.model)
                assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", self.paths[-1], plain)
        finally:
            shutil.rmtree(self.folder)


TestQcow2Disk = needs_qemu_img(Qcow2Machine.TestCase)
TestQcow2Disk.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None)
