"""The console: bytes both ways, and nobody piles up or spins when the other side is slow or gone."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from posada.errors import StateError
from posada.vmm.virtio.console import RECEIVE, TRANSMIT, Console
from posada.vmm.virtio.testing import FakeDriver


class Terminal:
    """A driver, and the other end of the console's socket."""

    def __init__(self) -> None:
        self.host, inner = socket.socketpair()
        self.host.settimeout(5)
        self.console = Console(inner.detach())
        self.driver = FakeDriver(self.console)

    @property
    def watched(self) -> int:
        """What the loop waits for on the console's descriptor."""
        watch = self.driver.loop._watches.get(self.console._fd)
        return watch[1] if watch else 0

    def received(self) -> bytes:
        """What the guest got."""
        self.driver.spin()
        return b"".join(done.data for done in self.driver.collect(RECEIVE))

    def close(self) -> None:
        self.host.close()
        self.console.close()
        self.driver.loop.close()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_guest_to_host(terminal: Terminal) -> None:
    terminal.driver.send([b"hello ", b"host"], queue=TRANSMIT)
    assert terminal.host.recv(100) == b"hello host"
    assert terminal.driver.transport.metrics()["bytes_out"] == 10
    assert not terminal.watched


def test_host_to_guest(terminal: Terminal) -> None:
    terminal.driver.put(writable=[4, 100], queue=RECEIVE)
    terminal.driver.kick(RECEIVE)
    assert terminal.watched == select.EPOLLIN
    terminal.host.send(b"hello guest")
    assert terminal.received() == b"hello guest"
    assert terminal.driver.interrupts == 1
    assert not terminal.watched  # no buffer left: the next byte must not make the loop spin


def test_a_guest_that_does_not_read_leaves_it_with_the_host(terminal: Terminal) -> None:
    terminal.host.send(b"early")
    assert terminal.received() == b""
    assert not terminal.watched
    terminal.driver.put(writable=[3], queue=RECEIVE)
    terminal.driver.put(writable=[3], queue=RECEIVE)
    terminal.driver.kick(RECEIVE)
    assert terminal.received() == b"early"


def test_a_host_that_does_not_read_holds_the_guest(terminal: Terminal) -> None:
    data = os.urandom(60_000)
    for _ in range(40):
        terminal.driver.put([data], queue=TRANSMIT)
    terminal.driver.kick(TRANSMIT)
    assert terminal.watched == select.EPOLLOUT
    done = len(terminal.driver.collect(TRANSMIT))
    assert 0 < done < 40
    read = bytearray()
    while len(read) < 40 * len(data):
        read += terminal.host.recv(1 << 16)
        terminal.driver.spin()
    assert read == data * 40
    assert done + len(terminal.driver.collect(TRANSMIT)) == 40
    assert not terminal.watched
    assert terminal.driver.kick_wanted(TRANSMIT)


def test_long_requests_take_turns(terminal: Terminal) -> None:
    with open("/dev/null", "wb") as null:
        driver = FakeDriver(console := Console(os.dup(null.fileno())))
    driver.put([bytes(200_000)], queue=TRANSMIT)
    driver.transport.notify(TRANSMIT)
    assert driver.transport.pending
    driver.spin()
    assert len(driver.collect(TRANSMIT)) == 1
    assert driver.transport.metrics()["bytes_out"] == 200_000
    console.close()


class TestHangUp:
    def test_what_was_sent_before_arrives(self, terminal: Terminal) -> None:
        terminal.host.send(b"bye")
        terminal.host.close()
        terminal.driver.put(writable=[10], queue=RECEIVE)
        terminal.driver.put(writable=[10], queue=RECEIVE)
        terminal.driver.kick(RECEIVE)
        assert terminal.received() == b"bye"
        assert not terminal.watched

    def test_while_the_guest_waits(self, terminal: Terminal) -> None:
        terminal.driver.put(writable=[10], queue=RECEIVE)
        terminal.driver.kick(RECEIVE)
        assert terminal.watched
        terminal.host.close()
        assert terminal.received() == b""
        assert not terminal.watched

    def test_output_is_dropped_not_stuck(self, terminal: Terminal) -> None:
        for _ in range(20):
            terminal.driver.put([bytes(60_000)], queue=TRANSMIT)
        terminal.driver.kick(TRANSMIT)
        assert terminal.watched
        terminal.host.close()
        terminal.driver.spin()
        assert len(terminal.driver.collect(TRANSMIT)) == 20
        assert not terminal.watched
        terminal.driver.send([b"into the void"], queue=TRANSMIT)

    def test_while_nobody_waits_costs_nothing(self, terminal: Terminal) -> None:
        terminal.host.close()
        assert not terminal.watched


class TestOddRequests:
    def test_no_room(self, terminal: Terminal) -> None:
        terminal.host.send(b"x")
        assert terminal.driver.send([b"readable"], queue=RECEIVE) == b""
        terminal.driver.put(writable=[1], queue=RECEIVE)
        terminal.driver.kick(RECEIVE)
        assert terminal.received() == b"x"

    def test_nothing_to_send(self, terminal: Terminal) -> None:
        terminal.driver.send(writable=[8], queue=TRANSMIT)
        terminal.driver.send([b"x"], queue=TRANSMIT)
        assert terminal.host.recv(10) == b"x"


def test_resize(terminal: Terminal) -> None:
    terminal.console.resize(132, 43)
    assert terminal.driver.config() == b"\x84\0\x2b\0\1\0\0\0\0\0\0\0"
    assert terminal.driver.interrupts == 1
    with pytest.raises(ValueError, match="65536x1"):
        terminal.console.resize(65536, 1)


def test_reset_while_blocked(terminal: Terminal) -> None:
    for _ in range(40):
        terminal.driver.put([bytes(60_000)], queue=TRANSMIT)
    terminal.driver.kick(TRANSMIT)
    assert terminal.watched
    terminal.driver.start()
    assert not terminal.watched
    while select.select([terminal.host], [], [], 0)[0]:
        terminal.host.recv(1 << 20)
    terminal.driver.send([b"new"], queue=TRANSMIT)
    assert terminal.host.recv(100) == b"new"


class TestSavedState:
    def test_in_the_middle_of_a_request(self, terminal: Terminal) -> None:
        data = os.urandom(60_000)
        for _ in range(20):
            terminal.driver.put([data], queue=TRANSMIT)
        terminal.driver.kick(TRANSMIT)
        terminal.host.setblocking(False)
        read = bytearray()
        while len(read) % len(data) == 0:  # until the host has got a piece of one
            try:
                read += terminal.host.recv(1 << 20)
            except BlockingIOError:
                break
        host, inner = socket.socketpair()
        moved = terminal.driver.moved(console := Console(inner.detach()))
        while len(read) < 20 * len(data):
            moved.spin()
            read += host.recv(1 << 20)
        assert read == data * 20
        console.close()
        host.close()

    def test_a_forked_child_has_its_own_descriptor(self, terminal: Terminal) -> None:
        host, inner = socket.socketpair()
        terminal.console.reopen({"console": inner.detach()})
        terminal.driver.send([b"child"], queue=TRANSMIT)
        assert host.recv(100) == b"child"
        host.close()

    def test_a_child_without_a_console(self, terminal: Terminal) -> None:
        terminal.console.reopen({})
        terminal.driver.send([b"child"], queue=TRANSMIT)
        terminal.driver.put(writable=[1], queue=RECEIVE)
        terminal.driver.kick(RECEIVE)
        assert not terminal.driver.needs_reset

    @pytest.mark.parametrize("forged", [{"cols": 65536}, {"rows": -1}, {"sent": 1 << 32}, {"sent": None}])
    def test_forged(self, terminal: Terminal, forged: dict[str, object]) -> None:
        with pytest.raises(StateError):
            terminal.console.load(terminal.console.save() | forged)
