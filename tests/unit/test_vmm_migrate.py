"""Live migration between two toy machines in two processes; what a hostile source can send."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from kvm_kit import needs_kvm
from machine_kit import MIB, Machine, config, counter, monitor, spin, tidy, toy
from test_vmm_reset import DIRTY_50

from posada.errors import EngineError, EngineGone, StateError
from posada.proto import cbor, migration
from posada.proto.migration import Kind, MigrationError
from posada.vmm import migrate
from posada.vmm.incoming import Incoming
from posada.vmm.link import Link
from posada.vmm.migrate import Moved, Outgoing
from posada.vmm.pagemap import PageMap

Report = Callable[..., None]
PAUSE = 0.05


def words(machine: Machine) -> list[int]:
    """What `DIRTY_50` counts in its fifty pages."""
    return [machine.memory.u16(0x10000 + 0x1000 * n) for n in range(50)]


def consistent(machine: Machine) -> bool:
    """No page is older or newer than the guest made it: those it has passed in this round are one ahead."""
    found = words(machine)
    return found == sorted(found, reverse=True) and found[0] - found[-1] <= 1


def go(machine: Machine, fd: int, pause: float = PAUSE, **options: Any) -> Moved | Exception:
    outcome: list[Moved | Exception] = []
    machine.loop.soon(lambda: Outgoing(machine, fd, pause, outcome.append, **options))
    spin(machine, lambda: bool(outcome))
    return outcome[0]


@needs_kvm
@pytest.mark.parametrize("touched", [False, True])
def test_a_machine_that_writes_all_the_time_moves(touched: bool) -> None:
    random_part = random.Random(3).randbytes(2 * MIB)

    def source(report: Report, sock: socket.socket) -> None:
        machine, _ = toy(DIRTY_50)
        machine.memory.write(8 * MIB, random_part)
        machine.start()
        spin(machine, lambda: counter(machine) > 20)
        moved = go(machine, sock.detach(), pages=PageMap.open() if touched else None)
        assert isinstance(moved, Moved), moved
        at = counter(machine)
        time.sleep(0.05)
        report(
            who="source", count=at, stands=counter(machine) == at and machine.state.value == "paused",
            rounds=moved.rounds, bytes=moved.bytes, pause=moved.pause, consistent=consistent(machine),
        )  # fmt: skip

    def destination(report: Report, sock: socket.socket) -> None:
        incoming = Incoming(sock.detach())
        machine = incoming.receive(config())
        at, whole = counter(machine), machine.memory.read(8 * MIB, len(random_part)) == random_part
        good = consistent(machine)
        incoming.take_over()
        machine.start()
        incoming.running()
        spin(machine, lambda: counter(machine) > at + 20)
        machine.pause()
        report(who="destination", count=at, whole=whole, consistent=good and consistent(machine))

    reports = {r["who"]: r for r in two(source, destination)}
    assert reports["source"]["stands"] and reports["source"]["consistent"]
    assert reports["destination"]["whole"] and reports["destination"]["consistent"]
    assert reports["source"]["count"] == reports["destination"]["count"]
    assert 2 * MIB < reports["source"]["bytes"] < 8 * MIB
    assert reports["source"]["pause"] < 5


def two(source: Callable[..., None], destination: Callable[..., None]) -> list[dict[str, Any]]:
    def body(report: Report) -> None:
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            source(report, ours)
        else:
            ours.close()
            destination(report, theirs)

    return monitor(body)


@needs_kvm
@pytest.mark.parametrize("when", ["at once", "in the middle", "at the end"])
def test_a_lost_destination_leaves_the_machine_running(when: str) -> None:
    machine, _ = toy(DIRTY_50)
    machine.memory.write(4 * MIB, random.Random(4).randbytes(8 * MIB))
    machine.start()
    spin(machine, lambda: counter(machine) > 5)
    ours, theirs = socket.socketpair()

    def destination() -> None:
        if when == "in the middle":
            theirs.recv(3 * MIB, socket.MSG_WAITALL)
        elif when == "at the end":
            link = Link(theirs)
            while (found := link.expect(Kind.HELLO, Kind.PAGES, Kind.STATE))[0] is not Kind.STATE:
                link.read(found[1])
        theirs.close()

    thread = threading.Thread(target=destination)
    thread.start()
    outcome = go(machine, ours.detach())
    thread.join()
    assert isinstance(outcome, EngineGone), outcome
    start = counter(machine)
    spin(machine, lambda: counter(machine) > start + 10)
    assert machine.state.value == "running"
    machine.close()


@needs_kvm
def test_a_destination_that_refuses_says_why() -> None:
    machine, _ = toy(DIRTY_50)
    machine.start()
    ours, theirs = socket.socketpair()

    def destination() -> None:
        with pytest.raises(StateError):
            Incoming(theirs.detach()).receive(config(32 * MIB))

    thread = threading.Thread(target=destination)
    thread.start()
    machine.memory.write(4 * MIB, random.Random(4).randbytes(8 * MIB))
    outcome = go(machine, ours.detach())
    thread.join()
    assert isinstance(outcome, EngineError) and "was announced with" in str(outcome)
    machine.close()


@needs_kvm
def test_after_go_nobody_runs_it_twice() -> None:
    """The destination vanishes with the machine: the source stays paused, and says what to do."""
    machine, _ = toy(DIRTY_50)
    machine.start()
    spin(machine, lambda: counter(machine) > 5)
    ours, theirs = socket.socketpair()

    def destination() -> None:
        link = Link(theirs)
        while (found := link.expect(Kind.HELLO, Kind.PAGES, Kind.STATE))[0] is not Kind.STATE:
            link.read(found[1])
        link.read(found[1])
        link.send(link.frame(Kind.READY))
        link.expect(Kind.GO)
        theirs.close()

    thread = threading.Thread(target=destination)
    thread.start()
    outcome = go(machine, ours.detach())
    thread.join()
    assert isinstance(outcome, EngineError) and "stays paused" in str(outcome)
    assert machine.state.value == "paused"
    machine.close()


@needs_kvm
def test_cancelled_and_never_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "MAX_ROUNDS", 3)
    machine, _ = toy(DIRTY_50)
    machine.start()
    spin(machine, lambda: counter(machine) > 5)
    ours, theirs = socket.socketpair()
    outcome: list[Any] = []
    moving = Outgoing(machine, ours.detach(), PAUSE, outcome.append)
    moving.cancel()
    moving.cancel()
    assert type(outcome[0]).__name__ == "Cancelled" and len(outcome) == 1
    theirs.close()

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: theirs.recv(1 << 20), b"")])
    thread.start()
    monkeypatch.setattr(migrate.DirtyPages, "collect", lambda _: [5])
    assert "faster than it can be sent" in str(go(machine, ours.detach(), 0.0))
    thread.join()
    theirs.close()
    start = counter(machine)
    spin(machine, lambda: counter(machine) > start + 10)
    machine.close()


def frame(kind: Kind, body: bytes) -> bytes:
    return migration.header(kind, len(body)) + body


HELLO = frame(Kind.HELLO, cbor.encode({"size": 16 * MIB, "cpus": 1, "devices": []}))


@needs_kvm
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        HELLO[:20],
        frame(Kind.HELLO, b"\xff"),
        frame(Kind.HELLO, cbor.encode({"size": 1 << 50, "cpus": 1})),
        HELLO + HELLO,
        HELLO + frame(Kind.PAGES, b""),
        HELLO + frame(Kind.PAGES, b"\xff\xff\xff\xff"),
        HELLO + migration.pages_head([(16 * MIB, 4096)]) + bytes(4096),
        HELLO + migration.pages_head([(1, 4096)]) + bytes(4096),
        HELLO + migration.pages_head([(4096, 4096), (0, 4096)]) + bytes(8192),
        HELLO + frame(Kind.PAGES, b"\1\0\0\0" + migration.RUN.pack(0, 8192) + bytes(4096)),
        HELLO + frame(Kind.STATE, cbor.encode({"version": 1})),
        HELLO + migration.HEADER.pack(b"PMIG", 1, Kind.STATE, 1 << 40),
        HELLO + migration.HEADER.pack(b"PMIG", 2, Kind.STATE, 1),
        HELLO + migration.HEADER.pack(b"PMIG", 1, 77, 1),
        HELLO + frame(Kind.FAILED, b"the source gave up"),
    ],
)
def test_hostile_sources_are_refused(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises((EngineError, StateError)):
            Incoming(theirs.detach()).receive(config())
        assert ours.recv(1 << 16)[:4] == b"PMIG", "it says so"


def test_frames_are_split_and_checked() -> None:
    runs = [(0, 3 * migration.MAX_CONTENT), (migration.MAX_CONTENT * 5, 4096)]
    frames = migration.split(runs)
    assert [sum(length for _, length in some) for some in frames] == [migration.MAX_CONTENT] * 3 + [4096]
    assert [run for some in frames for run in some][-1] == runs[-1]
    many = [(2 * n * 4096, 4096) for n in range(migration.MAX_RUNS + 1)]
    assert [len(some) for some in migration.split(many)] == [migration.MAX_CONTENT // 4096] * 4 + [1]
    with pytest.raises(MigrationError):
        migration.read_header(bytes(16))


assert tidy  # a fixture for every test here
