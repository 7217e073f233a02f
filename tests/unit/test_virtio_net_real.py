"""The network card on the host's own networks: a tap device where we are root, passt where it is installed."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from posada.errors import StateError
from posada.vmm.net import open_backend
from posada.vmm.net.backend import HEADER, Feature
from posada.vmm.virtio.net import RX, TX, Net
from posada.vmm.virtio.testing import FakeDriver

MAC = "52:54:00:12:34:56"
NOTHING = HEADER.pack(0, 0, 0, 0, 0, 0, 0)
FRAME = bytes.fromhex("ffffffffffff5254001234560800") + bytes(range(200))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 2, 0x1000, 0x4000


def open_tap(flags: int) -> tuple[int, str]:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        answer = fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"pnt%d", IFF_TAP | IFF_NO_PI | flags))
    except OSError as error:
        pytest.skip(f"no tap device can be made here: {error}")
    return fd, answer[:16].rstrip(b"\0").decode()


@pytest.mark.parametrize("flags", [0, IFF_VNET_HDR])
def test_a_tap_device(stack: ExitStack, flags: int) -> None:
    fd, name = open_tap(flags)
    backend = open_backend("tap", fd)
    assert backend is not None
    device = Net(MAC, backend)
    driver = FakeDriver(device, memory_size=64 << 20)
    stack.callback(driver.loop.close)
    stack.callback(device.close)
    assert bool(driver.transport.acked & Feature.HOST_TSO4) == bool(flags)
    with socket.socket() as control:  # up
        request = struct.pack("16sH22x", name.encode(), 0x1043)
        fcntl.ioctl(control, 0x8914, request)
    raw = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)))
    raw.bind((name, 0x88B5))
    for _ in range(64):
        driver.put(writable=[2000], queue=RX)
    driver.kick(RX)
    driver.collect(RX)
    frame = bytes.fromhex("525400123456fefefefefefe88b5") + os.urandom(300)

    def came() -> bool:
        return any(done.data[12:] == frame and done.data[10:12] == b"\1\0" for done in driver.collect(RX))

    raw.send(frame)
    driver.until(came)
    out = bytes.fromhex("fefefefefefe52540012345688b5") + os.urandom(300)
    driver.put([NOTHING, out], queue=TX)
    driver.kick(TX)
    assert len(driver.collect(TX)) == 1
    assert raw.recv(4096) == out
    driver.put([HEADER.pack(1, 9, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0), out], queue=TX)  # nonsense in the header
    driver.kick(TX)
    assert len(driver.collect(TX)) == 1
    assert driver.config()[6] == 1


def test_another_kind_of_network_is_refused_while_the_guest_relies_on_this_one(stack: ExitStack) -> None:
    fd, _ = open_tap(IFF_VNET_HDR)
    device = Net(MAC, open_backend("tap", fd))
    driver = FakeDriver(device)
    stack.callback(driver.loop.close)
    ours, peer = socket.socketpair()
    stack.enter_context(peer)
    with pytest.raises(StateError):
        device.reopen({"kind": "passt", "fd": ours.detach()})
    device.close()


def test_what_is_no_tap_is_refused() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError):
            open_backend("tap", read)
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_passt_answers(stack: ExitStack, tmp_path: Path) -> None:
    """DHCP over a real passt: a discover goes out, an offer comes back."""
    tmp_path.chmod(0o777)  # passt started as root becomes somebody else
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.getuid() and folder.name.startswith(("pytest", "test")):
            folder.chmod(0o755)
    path = tmp_path / "passt"
    command = ["passt", "--foreground", "--one-off", "--quiet", "--socket", str(path)]
    passt = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    stack.callback(passt.kill)
    deadline = time.monotonic() + 5
    sock = socket.socket(socket.AF_UNIX)
    while True:
        try:
            sock.connect(str(path))
            break
        except OSError:
            if passt.poll() is not None or time.monotonic() > deadline:
                passt.kill()
                sock.close()
                pytest.skip(f"passt does not run here: {passt.stdout.read() if passt.stdout else ''}")
            select.select([], [], [], 0.01)
    device = Net(MAC, open_backend("passt", sock.detach()))
    driver = FakeDriver(device)
    stack.callback(driver.loop.close)
    stack.callback(device.close)
    for _ in range(32):
        driver.put(writable=[2048], queue=RX)
    driver.put([NOTHING, discover()], queue=TX)
    driver.kick(TX)
    found: list[bytes] = []

    def offered() -> bool:
        found.extend(
            d.data[12:] for d in driver.collect(RX) if d.data[12 + 12 : 12 + 14] == b"\x08\0" and len(d.data) > 290
        )
        return bool(found)

    driver.until(offered)
    assert found[0][42:44] == b"\2\1"  # BOOTREPLY over Ethernet
    assert found[0][42 + 4 : 42 + 8] == b"pnt!"


def discover() -> bytes:
    """A DHCPDISCOVER in UDP, IP and Ethernet."""
    mac = bytes.fromhex(MAC.replace(":", ""))
    bootp = struct.pack("!BBBB4sHH16s16s192x4s", 1, 1, 6, 0, b"pnt!", 0, 0x8000, b"", mac, b"\x63\x82\x53\x63")
    bootp += b"\x35\x01\x01\xff" + bytes(56)
    udp = struct.pack("!HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    return b"\xff" * 6 + mac + b"\x08\0" + head + udp
