"""A writer is cut off at any instant: what it had flushed is there, and the image is whole; clusters may leak.

Systematically, by replaying what it wrote to the file up to every point (a kill), or any part of it since the last sync
(a power cut: the kernel writes back in any order); and for real, with SIGKILL.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.unit.block_kit import KIB, MIB, check, needs_qemu_img, open_disk, pattern, qemu_img, read, write

from posada.vmm.block.disk import Buffers, Disk
from posada.vmm.block.file import File
from posada.vmm.block.qcow2 import disk as disk_module

pytestmark = needs_qemu_img
ROUNDS = int(os.environ.get("POSADA_CRASH_ROUNDS", "1"))
SECTOR = 512


@dataclass
class Tape:
    """What reached the file, in order, and what the disk may hold from there on."""

    events: list[tuple[str, int, bytes]] = field(default_factory=list)
    """(kind, offset, data): write, punch (data: zeros), truncate; sync."""
    claims: dict[int, list[Callable[[Allowed], None]]] = field(default_factory=dict)
    """By number of events: how what may be found changes there."""

    def claim(self, change: Callable[[Allowed], None]) -> None:
        self.claims.setdefault(len(self.events), []).append(change)


class Allowed:
    """For each sector, the contents that may be found after a crash."""

    def __init__(self, content: bytes) -> None:
        self.sectors = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]

    def may(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), SECTOR):
            self.sectors[(offset + at) // SECTOR].add(data[at : at + SECTOR])

    def must(self, content: bytes) -> None:
        self.sectors = Allowed(content).sectors

    def verify(self, content: bytes, where: str) -> None:
        for number, allowed in enumerate(self.sectors):
            found = content[number * SECTOR : (number + 1) * SECTOR]
            assert found in allowed, f"{where}: sector {number} holds {found[:8].hex()}…, which it never should"


def recording(tape: Tape) -> type[File]:
    class Recorder(File):
        __slots__ = ()

        def writev(self, offset: int, buffers: Buffers) -> None:
            tape.events.append(("write", offset, b"".join(buffers)))
            super().writev(offset, buffers)

        def sync(self) -> None:
            tape.events.append(("sync", 0, b""))
            super().sync()

        def punch(self, offset: int, length: int) -> bool:
            tape.events.append(("punch", offset, bytes(length)))
            return super().punch(offset, length)

        def truncate(self, length: int) -> None:
            tape.events.append(("truncate", length, b""))
            super().truncate(length)

    return Recorder


def apply(image: bytearray, event: tuple[str, int, bytes]) -> None:
    kind, offset, data = event
    if kind == "write":
        image.extend(bytes(max(0, offset + len(data) - len(image))))
        image[offset : offset + len(data)] = data
    elif kind == "punch":
        end = min(len(image), offset + len(data))
        image[offset:end] = bytes(max(0, end - offset))
    elif kind == "truncate":
        image.extend(bytes(max(0, offset - len(image))))
        del image[offset:]


def exercise(disk: Disk, tape: Tape, model: bytearray, seed: int, steps: int) -> None:
    """Random requests, of whole sectors, and what each of them allows to be found."""
    chance = random.Random(seed)
    sectors = len(model) // SECTOR
    for step in range(steps):
        start = chance.randrange(sectors)
        count = min(sectors - start, chance.choice([1, 1, 3, 8, 40, 200]))
        offset, length = start * SECTOR, count * SECTOR
        action = chance.choice(["write"] * 5 + ["flush"] * 2 + ["zero", "unmap", "discard"])
        before = bytes(model)
        if action == "flush":
            disk.flush()
            tape.claim(lambda allowed, now=before: allowed.must(now))  # type: ignore[misc]
            continue
        data = pattern(length, seed << 16 | step) if action == "write" else bytes(length)
        tape.claim(lambda allowed, at=offset, data=data: allowed.may(at, data))  # type: ignore[misc]
        if action == "write":
            write(disk, offset, data)
        elif action == "discard":
            disk.discard(offset, length)
            data = read(disk, offset, length)
            assert all(
                data[at : at + 8] in (bytes(8), before[offset + at : offset + at + 8]) for at in range(0, length, 8)
            )
        else:
            disk.write_zeroes(offset, length, action == "unmap")
        model[offset : offset + length] = data


def torn(chance: random.Random, events: list[tuple[str, int, bytes]]) -> Iterator[tuple[str, int, bytes]]:
    """Some of these writes, in any order a disk may have done them; single sectors of them, too."""
    for kind, offset, data in events:
        if kind != "write" or chance.random() < 0.5:
            if chance.random() < 0.5:
                yield kind, offset, data
            continue
        first = -offset % SECTOR  # metadata is written from within a sector on
        edges = sorted({0, len(data), *range(first, len(data), SECTOR)})
        for low, high in itertools.pairwise(edges):
            if chance.random() < 0.5:
                yield kind, offset + low, data[low:high]


@pytest.mark.parametrize(
    ("options", "backed"),
    [
        ("cluster_size=64k", True), ("cluster_size=4k", True), ("cluster_size=512", False),
        ("cluster_size=1k,refcount_bits=1", True), ("cluster_size=4k,compat=0.10", False), ("snapshot", True),
        ("cluster_size=512,refcount_bits=64", False),
    ],
)  # fmt: skip
def test_every_point_of_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, backed: bool
) -> None:
    size = MIB
    base, path, cut = tmp_path / "base.raw", tmp_path / "disk.qcow2", tmp_path / "cut.qcow2"
    base.write_bytes(pattern(size // 2, 7))
    below = ["-b", str(base), "-F", "raw"] if backed else []
    image_options = "cluster_size=4k" if options == "snapshot" else options
    qemu_img("create", "-q", "-f", "qcow2", "-o", image_options, *below, path, str(size))
    chain = [base] if backed else []
    model = bytearray(base.read_bytes() if backed else b"").ljust(size, b"\0")
    if options == "snapshot":
        disk = open_disk(*chain, path)
        exercise(disk, Tape(), model, 1, 30)
        disk.close()
        qemu_img("snapshot", "-c", "before", path)
    if "refcount_bits=64" in options:  # the refcount table is full at 2 MiB: let it grow in front of the camera
        size = 3 * MIB
        model.extend(bytes(size - len(model)))
        qemu_img("resize", "-q", path, str(size))
        disk = open_disk(path)
        model[: 1950 * KIB] = pattern(1950 * KIB, 5)
        write(disk, 0, bytes(model[: 1950 * KIB]))
        disk.close()
    start, first = path.read_bytes(), bytes(model)

    tape = Tape()
    monkeypatch.setattr(disk_module, "File", recording(tape))
    disk = open_disk(*chain, path)
    exercise(disk, tape, model, 2, 25 * ROUNDS)
    disk.resize(size + 64 * KIB) if options != "snapshot" and options != "cluster_size=4k,compat=0.10" else None
    disk.close()
    monkeypatch.undo()
    check(path)

    def survives(image: bytes, allowed: Allowed, where: str, examine: bool) -> None:
        cut.write_bytes(image)
        found = open_disk(*chain, cut, readonly=True)
        allowed.verify(read(found, 0, size), where)
        found.close()
        if examine:
            check(cut, leaks=True)

    chance = random.Random(3)
    image, allowed = bytearray(start), Allowed(first)
    synced, since = bytearray(start), []
    for number in range(len(tape.events) + 1):
        for change in tape.claims.get(number, []):
            change(allowed)
        # QEMU looks at a sample: it takes 15 ms.
        examine = ROUNDS > 1 or chance.random() < 30 / len(tape.events)
        survives(bytes(image), allowed, f"killed after event {number}", examine)
        header = any(kind == "write" and offset < SECTOR for kind, offset, _ in since)
        for _ in range(8 if header else bool(since)):
            after = bytearray(synced)
            for piece in torn(chance, since):
                apply(after, piece)
            survives(bytes(after), allowed, f"power cut after event {number}", examine or header)
        if number == len(tape.events):
            break
        apply(image, tape.events[number])
        if tape.events[number][0] == "sync":
            synced, since = bytearray(image), []
        else:
            since.append(tape.events[number])


@pytest.mark.parametrize("cluster_size", ["64k", "4k"])
def test_sigkill(tmp_path: Path, cluster_size: str) -> None:
    """The writer tells which flush has returned; of what it wrote before that, everything is there."""
    size, blocks = 8 * MIB, 2048
    base = tmp_path / "base.raw"
    base.write_bytes(pattern(size, 7))
    for number in range(4 * ROUNDS):
        path = tmp_path / f"disk{number}.qcow2"
        qemu_img(
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"cluster_size={cluster_size}",
            "-b",
            base,
            "-F",
            "raw",
            path,
            str(size),
        )
        report, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                disk = open_disk(base, path)
                chance = random.Random(number)
                for count in range(1, 1 << 30):
                    at = chance.randrange(blocks)
                    write(disk, at * 4096, count.to_bytes(8, "big") * 512)
                    if chance.random() < 0.1:
                        disk.flush()
                        os.write(told, count.to_bytes(8, "big"))
            finally:
                os._exit(1)
        os.close(told)
        wanted = random.Random(number).randrange(1, 30)
        heard = b""
        while len(heard) < 8 * wanted:
            heard += os.read(report, 4096)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(report, 4096):
            heard += more
        os.close(report)
        flushed = int.from_bytes(heard[-8:], "big")

        check(path, leaks=True)
        expected: dict[int, int] = {}
        chance = random.Random(number)
        for count in range(1, flushed + 1):
            expected[chance.randrange(blocks)] = count
            chance.random()
        disk = open_disk(base, path)
        for at in range(blocks):
            found = read(disk, at * 4096, 4096)
            if at not in expected and found == base.read_bytes()[at * 4096 : (at + 1) * 4096]:
                continue
            assert found == found[:8] * 512
            assert int.from_bytes(found[:8], "big") >= expected.get(at, flushed + 1), at
        disk.close()
        check(path, leaks=True)
