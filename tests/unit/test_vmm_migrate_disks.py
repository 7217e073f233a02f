"""Live migration of machines that write to disks: two monitors, two processes, the same files, and never two writers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import needs_kvm
from machine_kit import MIB, Machine, config, counter, monitor, spin, tidy, toy
from test_vmm_migrate import go
from test_vmm_reset_disks import Driver
from tests.unit.block_kit import SIZE, check, needs_qemu_img, pattern, read

from posada.errors import EngineError, PosadaError, StateError, Unsupported
from posada.storage import qcow2
from posada.vmm import handover
from posada.vmm.block import locks
from posada.vmm.block.chain import open_chain
from posada.vmm.config import DiskConfig
from posada.vmm.incoming import Incoming
from posada.vmm.migrate import Moved
from posada.vmm.virtio.blk import Blk

pytestmark = needs_kvm
Side = Callable[..., None]


def chain(folder: Path, *formats: str) -> DiskConfig:
    """The disk of these layers, opened by this process; made if they are not there. The lowest is raw."""
    fds: list[tuple[int, str]] = []
    below = None
    for number, format in enumerate(formats):
        path = folder / f"{number}.{format}"
        if not path.exists() and format == "raw":
            path.write_bytes(pattern(SIZE, 1))
        elif not path.exists():
            assert below is not None
            qcow2.create_overlay(path, size=SIZE, backing=below, backing_format=formats[number - 1])
        below = path
        fds.append((os.open(path, os.O_RDWR if number == len(formats) - 1 else os.O_RDONLY), format))
    return DiskConfig("root", SIZE, tuple(fds))


def disk_of(machine: Machine) -> Blk:
    device = machine.slots["disk:root"].transport.device
    assert isinstance(device, Blk)
    return device


def start(folder: Path, formats: tuple[str, ...]) -> tuple[Machine, Driver]:
    """A machine that runs, and has written what it did not flush."""
    machine, _ = toy(disks=(chain(folder, *formats),))
    driver = Driver(machine, "disk:root")
    machine.start()
    driver.write(MIB, pattern(MIB, 2))
    spin(machine, lambda: counter(machine) > 20)
    return machine, driver


def two(source: Side, destination: Side) -> dict[str, Any]:
    """Both in processes of their own. ``say`` and ``hear`` are between them: for what must come before what."""

    def body(report: Callable[..., None]) -> None:
        ours, theirs = socket.socketpair()
        here, there = socket.socketpair()
        if os.fork():
            theirs.close()
            there.close()
            source(report, ours.detach(), here)
        else:
            ours.close()
            here.close()
            destination(report, theirs.detach(), there)

    found: dict[str, Any] = {}
    for each in monitor(body):
        assert "error" not in each, each["error"]
        found |= each
    return found


def say(other: socket.socket) -> None:
    other.send(b"x")


def hear(other: socket.socket) -> None:
    assert other.recv(1) in (b"x", b"")


def refused(call: Callable[..., object], *args: Any) -> str:
    try:
        call(*args)
    except (PosadaError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


LAYERS = [("raw",), ("raw", "qcow2"), ("raw", "qcow2", "qcow2")]


@needs_qemu_img
@pytest.mark.parametrize("formats", LAYERS)
def test_a_machine_moves_with_its_disk(tmp_path: Path, formats: tuple[str, ...]) -> None:
    chain(tmp_path, *formats)

    def source(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        machine, driver = start(tmp_path, formats)
        moved = go(machine, fd)
        assert isinstance(moved, Moved), moved
        hear(other)
        report(
            count=counter(machine),
            resume=refused(machine.resume), state=machine.state.value,
            write=driver.send([b"\1" + bytes(15), bytes(512)], [1]).hex(),
        )  # fmt: skip
        say(other)

    def destination(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        incoming = Incoming(fd)
        machine = incoming.receive(config(disks=(chain(tmp_path, *formats),)))
        at = counter(machine)
        incoming.take_over()
        machine.start()
        incoming.running()
        disk = disk_of(machine).disk
        whole = read(disk, 0, SIZE) == pattern(SIZE, 1)[:MIB] + pattern(MIB, 2) + pattern(SIZE, 1)[2 * MIB :]
        spin(machine, lambda: counter(machine) > at + 20)
        disk.write(0, [memoryview(b"from there".ljust(512))])
        say(other)
        hear(other)
        report(arrived=at, whole=whole)
        machine.close()

    found = two(source, destination)
    assert found["count"] == found["arrived"] and found["whole"]
    assert found["resume"].startswith("Busy: process") and found["state"] == "paused"
    assert found["write"] == "01"  # whoever still runs code in the source: an I/O error
    top = tmp_path / f"{len(formats) - 1}.{formats[-1]}"
    if formats[-1] == "qcow2":
        check(top)
    disk = open_chain(chain(tmp_path, *formats).chain, SIZE)
    assert read(disk, 0, 10) == b"from there" and read(disk, MIB, MIB) == pattern(MIB, 2)
    disk.close()


def fails(stage: str, folder: Path, formats: tuple[str, ...]) -> Side:
    """A destination that fails when it has the disks, and lets go of them by its end."""

    def destination(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        incoming = Incoming(fd)
        machine = incoming.receive(config(disks=(chain(folder, *formats),)))
        if stage == "says so":
            incoming.fail(EngineError("no room in the inn"))
            hear(other)  # until then it holds the locks
        elif stage == "holds on":
            incoming._socket.close()
            hear(other)
        elif stage == "after go":
            incoming.take_over()
        elif stage == "after a write":
            incoming.take_over()
            disk_of(machine).disk.write(0, [memoryview(b"from there".ljust(512))])

    return destination


@needs_qemu_img
@pytest.mark.parametrize("formats", LAYERS[:2])
@pytest.mark.parametrize("stage", ["dies", "says so", "holds on", "after go", "after a write"])
def test_a_destination_that_fails(
    tmp_path: Path, formats: tuple[str, ...], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it was told to go, the source goes on, as soon as nobody else can write; after that only if nobody has."""
    monkeypatch.setattr(handover, "PATIENCE", 0.2 if stage == "holds on" else 20)
    chain(tmp_path, *formats)

    def source(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        machine, driver = start(tmp_path, formats)
        if stage == "says so":
            machine.loop.timer(0.0, partial(say, other))
        outcome = go(machine, fd)
        assert isinstance(outcome, EngineError), outcome
        state = machine.state.value
        if stage == "holds on":
            say(other)
            hear(other)  # its end
        resume = ""
        if state == "paused":
            while (resume := refused(machine.resume)).startswith("Busy"):
                pass
        if not resume:
            at = counter(machine)
            spin(machine, lambda: counter(machine) > at + 20)
            driver.write(2 * MIB, b"still here".ljust(512))
        report(outcome=str(outcome), state=state, resume=resume)
        machine.close()

    found = two(source, fails(stage, tmp_path, formats))
    if stage in ("dies", "says so"):
        assert found["state"] == "running"
    else:
        assert found["state"] == "paused" and "stays paused here" in found["outcome"]
    assert ("no room" in found["outcome"]) is (stage == "says so")
    assert ("written to by the machine's other half" in found["resume"]) is (stage == "after a write")
    if formats[-1] == "qcow2":
        check(tmp_path / "1.qcow2")
    disk = open_chain(chain(tmp_path, *formats).chain, SIZE)
    assert read(disk, MIB, MIB) == pattern(MIB, 2)
    if stage != "after a write":
        assert read(disk, 2 * MIB, 10) == b"still here"
    disk.close()


def test_another_disk_is_refused(tmp_path: Path) -> None:
    chain(tmp_path, "raw", "qcow2")

    def source(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        machine, driver = start(tmp_path, ("raw", "qcow2"))
        outcome = go(machine, fd)
        driver.write(0, b"still here".ljust(512))
        report(outcome=str(outcome), state=machine.state.value)
        machine.close()

    def destination(report: Callable[..., None], fd: int, other: socket.socket) -> None:
        (tmp_path / "copy").mkdir()
        with pytest.raises(StateError, match="another file, or an older state"):
            Incoming(fd).receive(config(disks=(chain(tmp_path / "copy", "raw", "qcow2"),)))

    found = two(source, destination)
    assert "another file, or an older state" in found["outcome"] and found["state"] == "running"


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    """Also beside migration: whoever opens a disk to write to it."""
    disk = open_chain(chain(tmp_path, "raw", "qcow2").chain, SIZE)
    reader, writer = os.pipe()
    if not os.fork():
        said = refused(open_chain, chain(tmp_path, "raw", "qcow2").chain, SIZE)
        readers = refused(partial(open_chain, readonly=True), chain(tmp_path, "raw", "qcow2").chain, SIZE)
        os.write(writer, f"{said}|{readers}".encode())
        os._exit(0)
    os.wait()
    said, readers = os.read(reader, 4096).decode().split("|")
    assert said == f"Busy: process {os.getpid()} writes to the disk (stop it first)" and not readers
    disk.close()
    if not os.fork():
        os._exit(bool(refused(open_chain, chain(tmp_path, "raw", "qcow2").chain, SIZE)))
    assert os.wait()[1] == 0


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise OSError(37, "ENOLCK")

    machine, _ = toy(disks=(chain(tmp_path, "raw"),))
    monkeypatch.setattr(locks.fcntl, "lockf", none)
    assert locks.lock(0) is False
    ours, theirs = socket.socketpair()
    machine.start()
    with pytest.raises(Unsupported, match="without file locks"), theirs:
        go(machine, ours.detach())
    assert machine.state.value == "running"
    machine.close()


assert tidy  # a fixture for every test here
