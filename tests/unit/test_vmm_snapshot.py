"""Capture and restore on toy guests and the host's own /dev/kvm; memory files and page runs without one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import needs_kvm
from machine_kit import MIB, PORT, Machine, Probe, config, counter, spin, tidy, toy

from posada.errors import StateError
from posada.proto import cbor
from posada.vmm import memfile
from posada.vmm.capture import Captured, Files, capture
from posada.vmm.memfile import Layer
from posada.vmm.memory import PAGE, GuestMemory
from posada.vmm.pagemap import PageMap, coalesce, runs
from posada.vmm.snapshot import Document, restore

RANDOM = b"something that no other page holds"


@dataclass
class Saved:
    """The files of a snapshot, lowest memory file first."""

    devices: int
    memory: list[int]
    captured: Captured

    def document(self) -> Document:
        return Document.read(self.devices)

    def restore(self, **changes: Any) -> tuple[Machine, Probe]:
        document = self.document()
        machine = restore(config(document.size, **changes), document, [os.dup(fd) for fd in self.memory])
        probe = Probe()
        machine.pio.add(PORT, 4, probe)
        return machine, probe


def save(machine: Machine, tmp_path: Path, name: str = "a", below: Saved | None = None, **options: Any) -> Saved:
    """Capture it and wait until that is done."""
    devices, memory = (
        os.open(tmp_path / f"{name}.{kind}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        for kind in ("devices", "memory")
    )
    outcome: list[Captured | Exception] = []
    files = Files(os.dup(memory), os.dup(devices), PageMap.open().fd, **options)
    capture(machine, files, outcome.append)
    spin(machine, lambda: bool(outcome))
    assert isinstance(outcome[0], Captured), outcome
    return Saved(devices, [*(below.memory if below else []), memory], outcome[0])


def counted(machine: Machine, more: int = 20) -> None:
    start = counter(machine)
    spin(machine, lambda: counter(machine) > start + more)


@needs_kvm
def test_a_machine_goes_on_where_it_was_captured(tmp_path: Path) -> None:
    machine, _ = toy(size=64 * MIB)
    machine.start()
    machine.memory.write(0x2345678, RANDOM)
    counted(machine)
    saved = save(machine, tmp_path)
    machine.pause()
    assert saved.captured.pause < 5
    assert saved.captured.bytes < 2 * MIB, "only what was touched is written"
    assert os.fstat(saved.memory[0]).st_blocks * 512 < 4 * MIB
    assert os.fstat(saved.memory[0]).st_size == 64 * MIB

    again, probe = saved.restore(generation_id="00000000-0000-0000-0000-00000000000a")
    at = counter(again)
    assert 20 < at <= counter(machine)
    assert again.memory.read(0x2345678, len(RANDOM)) == RANDOM
    assert again.memory.read(0xF0000, 16) != machine.memory.read(0xF0000, 16)
    again.start()
    counted(again)
    again.pause()
    assert probe.values[:3] in ([at + 1, at + 2, at + 3], [at, at + 1, at + 2]), "no count is lost, none comes twice"
    machine.close()
    again.close()


@needs_kvm
def test_a_paused_machine_stays_paused(tmp_path: Path) -> None:
    machine, _ = toy()
    machine.start()
    counted(machine)
    machine.pause()
    at = counter(machine)
    saved = save(machine, tmp_path)
    assert counter(machine) == at and machine.state.value == "paused"
    again, _ = saved.restore()
    assert counter(again) == at
    machine.resume()
    counted(machine)
    machine.close()


@needs_kvm
def test_siblings_share_the_file_and_nothing_else(tmp_path: Path) -> None:
    machine, _ = toy()
    machine.start()
    machine.memory.write(8 * MIB, bytes(4 * MIB - 1) + b"x")
    counted(machine)
    saved = save(machine, tmp_path)
    machine.close()
    content = Path(tmp_path / "a.memory").read_bytes()
    one, _ = saved.restore()
    two, _ = saved.restore()
    for each in (one, two):
        each.start()
    counted(one)
    before = counter(two)
    one.memory.write(8 * MIB, b"one's own")
    counted(two)
    assert two.memory.read(8 * MIB, 9) == bytes(9) and counter(two) > before
    one.pause(), two.pause()
    assert Path(tmp_path / "a.memory").read_bytes() == content, "nobody writes to the file"
    one.close(), two.close()


@needs_kvm
@pytest.mark.parametrize("complete", [False, True])
def test_a_restored_machine_is_captured_again(tmp_path: Path, complete: bool) -> None:
    """By what differs from its files only, or all of it into a copy of them; and once more on top."""
    machine, _ = toy()
    machine.start()
    machine.memory.write(8 * MIB, b"first" * 2000)
    counted(machine)
    first = save(machine, tmp_path, "first")
    machine.close()

    machine, _ = first.restore()
    machine.start()
    machine.memory.write(9 * MIB, b"second" * 2000)
    machine.memory.write(8 * MIB + PAGE, bytes(PAGE))  # zero again: a hole must not bring the old page back
    counted(machine)
    (tmp_path / "second.memory").unlink(missing_ok=True)
    if complete:
        devices = os.open(tmp_path / "second.devices", os.O_RDWR | os.O_CREAT)
        memory = os.open(tmp_path / "second.memory", os.O_RDWR | os.O_CREAT)
        os.pwrite(memory, (tmp_path / "first.memory").read_bytes(), 0)
        outcome: list[Any] = []
        capture(machine, Files(os.dup(memory), os.dup(devices), PageMap.open().fd, complete=True), outcome.append)
        spin(machine, lambda: bool(outcome))
        second = Saved(devices, [memory], outcome[0])
        assert second.document().layers == ()
    else:
        second = save(machine, tmp_path, "second", first)
        assert len(second.document().layers) == 1
    assert second.captured.bytes < MIB // 4, "only what it has of its own"
    machine.pause()

    machine, _ = second.restore()
    machine.start()
    machine.memory.write(10 * MIB, b"third")
    counted(machine)
    third = save(machine, tmp_path, "third", second)
    machine.pause()
    at = counter(machine)
    machine.close()

    last, _ = third.restore()
    assert 60 < counter(last) <= at
    assert last.memory.read(8 * MIB, 10000)[:PAGE] == (b"first" * 2000)[:PAGE]
    assert last.memory.read(8 * MIB + PAGE, PAGE) == bytes(PAGE)
    assert last.memory.read(9 * MIB, 12000) == b"second" * 2000
    assert last.memory.read(10 * MIB, 5) == b"third"
    last.start()
    counted(last)
    last.close()


@needs_kvm
def test_the_machine_runs_on_when_its_files_cannot_be_written(tmp_path: Path) -> None:
    machine, _ = toy()
    machine.start()
    counted(machine)
    outcome: list[Any] = []
    memory = os.open(tmp_path / "m", os.O_RDWR | os.O_CREAT)
    readonly = os.open(tmp_path / "m", os.O_RDONLY)
    capture(machine, Files(readonly, os.dup(memory), PageMap.open().fd), outcome.append)
    spin(machine, lambda: bool(outcome))
    assert isinstance(outcome[0], OSError)
    with pytest.raises(OSError):
        capture(machine, Files(os.dup(memory), os.dup(memory), os.open("/dev/null", os.O_RDONLY)), outcome.append)
    counted(machine)
    machine.close()


@needs_kvm
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    machine, _ = toy()
    machine.start()
    counted(machine)
    saved = save(machine, tmp_path)
    machine.close()
    document = saved.document()

    def refused(document: Document, match: str, memory: list[int] | None = None, **changes: Any) -> None:
        settings = config(**{"memory": 16 * MIB, **changes})
        with pytest.raises(StateError, match=match):
            restore(settings, document, [os.dup(fd) for fd in (memory or saved.memory)])

    refused(document, "bytes of memory", memory=None) if False else None
    with pytest.raises(StateError, match="bytes of memory"):
        restore(config(32 * MIB), document, [os.dup(saved.memory[0])])
    refused(document, "memory files", [*saved.memory, *saved.memory])
    refused(replace(document, machine={**document.machine, "cpus": []}), "vcpus")
    refused(document, "the state is of a machine with", vsock=None)
    short = os.open(tmp_path / "short", os.O_RDWR | os.O_CREAT)
    os.ftruncate(short, 16 * MIB - PAGE)
    refused(document, "memory file of", [short])
    reader, _ = os.pipe()
    refused(document, "memory file of", [reader])


@needs_kvm
def test_a_lacking_processor_is_named() -> None:
    machine, _ = toy()
    machine.start()
    counted(machine)
    machine.pause()
    state = machine.save()
    cpuid = bytearray(state["cpus"][0]["cpuid"])
    for at in range(0, len(cpuid), 40):
        if cpuid[at : at + 4] == b"\1\0\0\0":
            cpuid[at + 20 : at + 24] = b"\xff" * 4  # ECX: everything
    state["cpus"][0]["cpuid"] = bytes(cpuid)
    memory = os.memfd_create("memory")
    os.ftruncate(memory, machine.memory.size)
    with pytest.raises(StateError, match=r"lacks what the guest uses: CPUID 0x1\.ecx"):
        restore(config(), Document(machine.memory.size, (), state), [memory])
    machine.close()


def test_documents_round_trip() -> None:
    document = Document(16 * MIB, (((0, PAGE), (3 * PAGE, 2 * PAGE)), ()), {"version": 1})
    assert Document.decode(document.encode()) == document


@pytest.mark.parametrize(
    "some",
    [
        [(1, PAGE)],
        [(0, 1)],
        [(0, 0)],
        [(0, PAGE), (0, PAGE)],
        [(PAGE, PAGE), (0, PAGE)],
        [(16 * MIB, PAGE)],
        [(0, 17 * MIB)],
        [(2 * n * PAGE, PAGE) for n in range(memfile.MAX_RUNS + 1)],
    ],
)
def test_impossible_runs_are_refused(some: list[tuple[int, int]]) -> None:
    packed = b"".join(at.to_bytes(8, "little") + length.to_bytes(8, "little") for at, length in some)
    with pytest.raises(StateError):
        memfile.unpack_runs(packed, 16 * MIB)


def test_own_pages_are_those_that_were_written() -> None:
    pages = PageMap.open()
    memory = GuestMemory.anonymous(8 * MIB)
    _, address = memfile.linear(memory)
    assert pages.own(address, memory.size) == []
    memory.write(MIB, bytes(1))
    memory.write(2 * MIB - 1, b"ab")
    assert pages.own(address, memory.size) == [(MIB, PAGE), (2 * MIB - PAGE, 2 * PAGE)]
    file = os.memfd_create("base")
    memfile.write(file, memory, [(MIB, 2 * MIB)])
    stacked = memfile.open_stack([Layer(file)], memory.size)
    _, address = memfile.linear(stacked)
    assert stacked.read(2 * MIB - 1, 2) == b"ab"
    assert pages.own(address, memory.size) == [], "what is only read stays the file's"
    stacked.write(3 * MIB, b"x")
    assert pages.own(address, memory.size) == [(3 * MIB, PAGE)]
    stacked.discard(3 * MIB, PAGE)
    assert pages.own(address, memory.size) == []


def test_memory_above_the_gap_lies_right_behind() -> None:
    size = 3 * 1024 * MIB + 16 * MIB
    memory = GuestMemory.anonymous(size)
    memory.write(4 * 1024 * MIB + MIB, RANDOM)
    memory.write(MIB, RANDOM)
    pages = PageMap.open()
    own = pages.own(memfile.linear(memory)[1], size)
    assert own == [(MIB, PAGE), (3 * 1024 * MIB + MIB, PAGE)]
    file = os.memfd_create("big")
    memfile.write(file, memory, own)
    again = memfile.open_stack([Layer(file)], size)
    assert again.read(4 * 1024 * MIB + MIB, len(RANDOM)) == RANDOM == again.read(MIB, len(RANDOM))


def test_runs_and_gaps() -> None:
    flags = bytes([0, 1, 1, 0, 0, 0, 1, 0, 1])
    some = runs(flags)
    assert some == [(PAGE, 2 * PAGE), (6 * PAGE, PAGE), (8 * PAGE, PAGE)]
    assert runs(b"") == runs(bytes(9)) == []
    assert coalesce(some, 3) == some
    assert coalesce(some, 2) == [(PAGE, 2 * PAGE), (6 * PAGE, 3 * PAGE)]
    assert coalesce(some, 1) == [(PAGE, 8 * PAGE)]


@pytest.mark.parametrize("wrong", [b"", b"\xa0", b"\xf6", Document(16, (), {}).encode()])
def test_other_documents_are_refused(wrong: bytes) -> None:
    with pytest.raises(StateError):
        Document.decode(wrong)


def test_a_newer_document_says_so() -> None:
    newer = cbor.encode({"format": "posada machine", "version": 2})
    with pytest.raises(StateError, match="version 2"):
        Document.decode(newer)


assert tidy  # a fixture for every test here
