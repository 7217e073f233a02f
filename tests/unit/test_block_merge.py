"""Merging layers: the disk reads the same, in every order of writes, zeros and discards, and QEMU agrees."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from block_kit import KIB, MIB, check, content, needs_qemu_img, open_disk, pattern, qemu_img, read, write

from posada.errors import ImageError
from posada.proto.qcow2 import rename_backing
from posada.vmm.block.chain import layers_of
from posada.vmm.block.merge import merge
from posada.vmm.block.qcow2.disk import Qcow2Disk

SIZE = 24 * MIB
pytestmark = needs_qemu_img


def scribble(path: list[Path], dice: random.Random, seed: int) -> None:
    """Random requests to the top of this chain."""
    disk = open_disk(*path)
    for _ in range(12):
        length = dice.choice((512, 4 * KIB, 64 * KIB, 200 * KIB, 1 * MIB))
        offset = dice.randrange(0, SIZE - length, 512)
        action = dice.randrange(4)
        if action == 0:
            disk.write_zeroes(offset, length, bool(dice.randrange(2)))
        elif action == 1:
            disk.discard(offset, length)
        else:
            write(disk, offset, pattern(length, seed))
    disk.close()


def make_chain(folder: Path, dice: random.Random, depth: int) -> list[Path]:
    base = folder / "base.img"
    base.write_bytes(pattern(SIZE - 3 * MIB, 1))  # smaller than the disk: it was grown later
    chain = [base]
    for number in range(depth):
        path = folder / f"layer{number}.qcow2"
        below = "raw" if number == 0 else "qcow2"
        qemu_img("create", "-f", "qcow2", "-F", below, "-b", chain[-1], path, str(SIZE))
        chain.append(path)
        scribble(chain, dice, number + 2)
    return chain


@pytest.mark.parametrize("seed", range(6))
def test_it_reads_the_same_and_is_sound(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    chain = make_chain(tmp_path, dice, 6)
    before = content(chain[-1])
    frozen = {path: path.read_bytes() for path in chain[:-1]}
    keep = dice.randrange(1, 6)
    disk = open_disk(*chain)
    assert len(layers_of(disk)) == 7
    assert merge(disk, keep) == keep
    assert len(layers_of(disk)) == len(disk.descriptors()) == keep + 1
    assert read(disk, 0, SIZE) == before
    assert merge(disk, keep) == keep, "done twice it is the same"
    write(disk, 5 * MIB + 512, b"later" * 100)
    disk.close()
    assert {path: path.read_bytes() for path in chain[:-1]} == frozen
    kept = chain[keep - 1]
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw" if keep == 1 else "qcow2", "-b", kept, chain[-1])
    for path in chain[keep:-1]:
        path.unlink()
    check(chain[-1], leaks=True)
    expected = bytearray(before)
    expected[5 * MIB + 512 : 5 * MIB + 1012] = b"later" * 100
    assert content(chain[-1]) == bytes(expected)


@pytest.mark.parametrize("name", ["b.img", "a-much-longer-name-than-the-one-before-it.img"])
def test_the_top_says_what_it_stands_on_now(tmp_path: Path, name: str) -> None:
    """For people's tools: they follow the header, and the layers in between are gone."""
    chain = make_chain(tmp_path, random.Random(1), 3)
    before = content(chain[-1])
    disk = open_disk(*chain)
    assert merge(disk, 1) == 1
    base = chain[0].rename(tmp_path / name)
    assert isinstance(disk, Qcow2Disk)
    disk.image.rename_backing(str(base).encode(), b"raw")
    disk.close()
    for path in chain[1:-1]:
        path.unlink()
    check(chain[-1], leaks=True)
    assert content(chain[-1]) == before
    with pytest.raises(ImageError, match="1024 bytes"):
        rename_backing(chain[-1].read_bytes()[:65536], b"x" * 1024, b"raw")


def test_nothing_to_merge(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, random.Random(0), 1)
    disk = open_disk(*chain)
    assert merge(disk, 1) == 1
    disk.close()
    raw = open_disk(chain[0])
    assert merge(raw, 1) == 0
    raw.close()


def test_a_layer_that_hides_the_end_of_its_base_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(pattern(2 * MIB, 1))
    small, top = tmp_path / "small.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base, small, "1M")
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", small, top, "2M")
    disk = open_disk(base, small, top)
    with pytest.raises(ImageError, match="smaller"):
        merge(disk, 1)
    assert len(layers_of(disk)) == 3
    assert read(disk, 0, 2 * MIB) == pattern(2 * MIB, 1)[:MIB] + bytes(MIB)
    disk.close()
