"""Requests for copies and points in time, as the control socket hands them over."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from kvm_kit import needs_kvm
from machine_kit import MIB, Machine, config, counter, spin, tidy, toy

from posada.errors import Busy, EngineError
from posada.proto.monitor import Op
from posada.storage import qcow2
from posada.vmm.branching import Branching
from posada.vmm.config import DiskConfig
from posada.vmm.control import Given
from posada.vmm.incoming import Incoming
from posada.vmm.pagemap import PageMap
from posada.vmm.snapshot import Document
from posada.vmm.virtio.blk import Blk

pytestmark = needs_kvm


class Request:
    """What a handler sees of a `posada.vmm.control.Call`."""

    def __init__(self, given: list[int], **args: Any) -> None:
        self.given = Given(given)
        self.args = args
        self.answer: Any = None

    def done(self, result: Any) -> None:
        self.answer = result

    def fail(self, error: Exception) -> None:
        self.answer = error


def ask(machine: Machine, branching: Branching, op: Op, given: list[int] | None = None, **args: Any) -> Any:
    request = Request(given or [], **args)
    assert branching.handlers()[op](request) is None  # type: ignore[arg-type]
    spin(machine, lambda: request.answer is not None)
    return request.answer


def running() -> tuple[Machine, Branching]:
    machine, _ = toy()
    machine.start()
    spin(machine, lambda: counter(machine) > 20)
    return machine, Branching(machine)


def test_a_point_is_made_come_back_to_and_dropped() -> None:
    machine, branching = running()
    assert isinstance(ask(machine, branching, Op.RESET), EngineError), "there is none yet"
    assert ask(machine, branching, Op.RESET, [PageMap.open().fd], pagemap=0) == {}
    at = counter(machine)
    spin(machine, lambda: counter(machine) > at + 2000)
    later = counter(machine)
    assert ask(machine, branching, Op.RESET)["pages"] >= 1
    machine.pause()
    assert counter(machine) < later
    machine.resume()
    stream, other = socket.socketpair()
    assert "reset point" in str(ask(machine, branching, Op.MIGRATE, [stream.detach()], fd=0, pause=0.1))
    other.close()
    assert ask(machine, branching, Op.RESET, drop=True) == {}
    assert isinstance(ask(machine, branching, Op.RESET), EngineError)
    machine.close()


def test_a_point_with_a_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"at the point".ljust(MIB))
    disk = DiskConfig("root", MIB, ((os.open(tmp_path / "disk", os.O_RDWR), "raw"),))
    machine, _ = toy(disks=(disk,))
    machine.start()
    branching = Branching(machine)
    qcow2.create_overlay(tmp_path / "top", size=MIB, backing=tmp_path / "disk", backing_format="raw")
    given = [PageMap.open().fd, os.open(tmp_path / "top", os.O_RDWR)]
    assert ask(machine, branching, Op.RESET, given, pagemap=0, layers=[{"disk": "root", "top": 1}]) == {}
    with pytest.raises(OSError):
        os.fstat(given[1])  # the machine has its own
    blk = machine.slots["disk:root"].transport.device
    assert isinstance(blk, Blk)
    blk.disk.write(0, [memoryview(b"later".ljust(512))])
    blk._counters["writes"] += 1
    assert "pages" in ask(machine, branching, Op.RESET)
    found = bytearray(12)
    blk.disk.read(0, [memoryview(found)])
    assert found == b"at the point"
    machine.close()


def test_one_at_a_time(tmp_path: Path) -> None:
    machine, branching = running()
    files = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("memory", "devices")]
    names = {"memory": 0, "devices": 1, "pagemap": 2, "layers": [], "complete": False}
    first = Request([*files, PageMap.open().fd], **names)
    branching.handlers()[Op.CAPTURE](first)  # type: ignore[arg-type]
    with pytest.raises(Busy):
        branching.handlers()[Op.SWITCH](Request([], layers=[]))  # type: ignore[arg-type]
    spin(machine, lambda: first.answer is not None)
    assert first.answer["bytes"] > 0
    assert "pause" in ask(machine, branching, Op.SWITCH, layers=[])
    devices = os.open(tmp_path / "devices", os.O_RDONLY)
    assert Document.read(devices).size == 16 * MIB
    machine.close()


def test_a_machine_is_migrated_on_request() -> None:
    machine, branching = running()
    ours, theirs = socket.socketpair()
    arrived: list[int] = []

    def destination() -> None:
        incoming = Incoming(theirs.detach())
        other = incoming.receive(config())
        incoming.take_over()
        arrived.append(counter(other))
        incoming.running()

    thread = threading.Thread(target=destination)
    thread.start()
    answer = ask(machine, branching, Op.MIGRATE, [ours.detach(), PageMap.open().fd], fd=0, pause=0.1, pagemap=1)
    thread.join()
    assert isinstance(answer, dict), answer
    assert answer["bytes"] > 0 and answer["pause"] < 5 and answer["rounds"] >= 1
    assert machine.state.value == "paused" and counter(machine) == arrived[0]
    machine.close()


assert tidy  # a fixture for every test here
