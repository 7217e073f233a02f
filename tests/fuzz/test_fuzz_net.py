"""A network's stream cut anywhere, into buffers of any shape: frames come out as they went in, in order.

`test_virtio_devices` lets hostile drivers at the device. ``POSADA_FUZZ=n`` runs n programs instead of a few.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posada.vmm.net import open_backend
from posada.vmm.net.backend import HEADER, MAX_FRAME, MIN_FRAME
from posada.vmm.virtio.net import RX, TX, Net
from posada.vmm.virtio.testing import FakeDriver

PROGRAMS = int(os.environ.get("POSADA_FUZZ", "60"))
SETTINGS = settings(max_examples=PROGRAMS, deadline=None, suppress_health_check=list(HealthCheck))
SHAPES = st.lists(st.integers(1, 3000), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 400)


def card(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> tuple[FakeDriver, socket.socket]:
    ours, peer = socket.socketpair(socket.AF_UNIX, kind)
    stack.enter_context(peer)
    peer.setblocking(False)
    device = Net("52:54:00:12:34:56", open_backend("passt", ours.detach()))
    driver = FakeDriver(device, memory_size=64 << 20)
    stack.callback(driver.loop.close)
    stack.callback(device.close)
    return driver, peer


def frame(number: int, size: int) -> bytes:
    return (struct.pack("<I", number) * (size // 4 + 1))[:size]


@SETTINGS
@given(
    sizes=st.lists(st.integers(MIN_FRAME, 4000) | st.just(MAX_FRAME), max_size=12),
    cuts=st.lists(st.integers(1, 20_000), max_size=8).map(lambda cuts: [*cuts, 5000]),
    shapes=st.lists(SHAPES, min_size=1, max_size=10),
)
def test_frames_to_the_guest(sizes: list[int], cuts: list[int], shapes: list[list[int]]) -> None:
    with ExitStack() as stack:
        driver, peer = card(stack)
        frames = [frame(number, size) for number, size in enumerate(sizes)]
        data = b"".join(struct.pack(">I", len(f)) + f for f in frames)
        pieces: list[bytes] = []
        turn = 0
        while data or len(got := merged(pieces)) < len(frames):
            assert turn < 5000
            if data:
                try:
                    data = data[peer.send(data[: cuts[turn % len(cuts)]]) :]
                except BlockingIOError:
                    pass
            if driver.rings[RX].free:
                driver.put(writable=shapes[turn % len(shapes)], queue=RX, indirect=True)
            driver.kick(RX)
            pieces += [done.data for done in driver.collect(RX)]
            turn += 1
        assert got == frames
        driver.spin()
        assert driver.loop._epoll.poll(0) == []


def merged(pieces: list[bytes]) -> list[bytes]:
    """Packets put together from their buffers; the last may be incomplete, which the device must never show."""
    out = []
    at = 0
    while at < len(pieces):
        (count,) = struct.unpack_from("<H", pieces[at], 10)
        assert 1 <= count <= len(pieces) - at
        out.append(b"".join(pieces[at : at + count])[12:])
        at += count
    return out


@SETTINGS
@given(
    sizes=st.lists(st.integers(0, 4000) | st.integers(MAX_FRAME - 1, MAX_FRAME + 1), max_size=12),
    shapes=st.lists(SHAPES, min_size=1, max_size=10),
    reads=st.lists(st.integers(1, 100_000), min_size=1, max_size=30),
)
def test_frames_from_the_guest(sizes: list[int], shapes: list[list[int]], reads: list[int]) -> None:
    with ExitStack() as stack:
        driver, peer = card(stack)
        good = [frame(n, size) for n, size in enumerate(sizes) if MIN_FRAME <= size <= MAX_FRAME]
        expected = b"".join(struct.pack(">I", len(f)) + f for f in good)
        for number, size in enumerate(sizes):
            packet = HEADER.pack(0, 0, 0, 0, 0, 0, 0) + frame(number, size)
            cut = []
            for part in shapes[number % len(shapes)]:
                cut.append(packet[:part])
                packet = packet[part:]
            driver.put([part for part in [*cut, packet] if part], queue=TX)
        driver.kick(TX)
        got = b""
        done = 0
        for turn in range(20_000):
            try:
                got += peer.recv(reads[turn % len(reads)] if turn < 5000 else 1 << 16)  # the rest at a stroke
            except BlockingIOError:
                pass
            driver.spin()
            done += len(driver.collect(TX))
            if len(got) >= len(expected) and done == len(sizes):
                break
        assert got == expected
        assert done == len(sizes)
        assert driver.loop._epoll.poll(0) == []
        assert not driver.needs_reset


@SETTINGS
@given(junk=st.lists(st.binary(min_size=1, max_size=300), max_size=20))
def test_a_network_that_sends_rubbish(junk: list[bytes]) -> None:
    with ExitStack() as stack:
        driver, peer = card(stack)
        for data in junk:
            try:
                peer.send(data)
            except BrokenPipeError:
                break
            driver.put(writable=[2000], queue=RX)
            driver.kick(RX)
            merged([done.data for done in driver.collect(RX)])
        assert driver.loop._epoll.poll(0) == []
        assert not driver.needs_reset
