"""User-mode networking by passt: one process beside each monitor, which ends when the monitor closes their socket.

passt(1) takes its end of a connected socket (``--fd``), confines itself (own user, empty root, seccomp), and forwards the
host ports it was started with. It cannot change them while it runs: then a new one takes its place, and connections
through the old one end. The guest sees the network that QEMU's user mode has (`posada.host.bootline`).

It is nobody's child, as the monitor is, and says that it is ready by writing its pid, once its ports are bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from posada.engine.base import Launch
from posada.engine.common import process
from posada.engine.common.identity import jail_uid
from posada.engine.common.uncut import in_thread
from posada.engine.kvm.probe import find_passt
from posada.errors import EngineError, HostError, Unsupported
from posada.model.records import PortRecord, Process

#: Seconds for passt to be ready, and for one that is not wanted any more to give up its ports.
_START_TIMEOUT, _END_TIMEOUT = 10.0, 2.0
_TRIES = 5
#: The file in a machine's runtime directory that says who its passt is: pid and start time.
_PID = "passt.pid"
_GUEST, _GATEWAY = "10.0.2.15", "10.0.2.2"
#: Bytes of a guest's largest packet. No wire has it to carry: passt ends TCP on this side and makes segments anew, and UDP
#: is the kernel's to cut. What a packet costs both ends is paid for 32 KiB at once (ADR 9).
#: More would not go to passt in one piece (`posada.vmm.net.stream.ATOMIC`).
MTU = 32768
_NETWORK = (
    "--ipv4-only", "--address", _GUEST, "--netmask", "24", "--gateway", _GATEWAY, "--dns-forward", "10.0.2.3",
    "--no-dhcp-search", "--quiet", "--foreground",
)  # fmt: skip
#: Bytes that may wait in the socket on their way to the guest, and back. passt drops what finds no room, and its answer to
#: a loss is to send everything since again: with the kernel's default of 208 KiB a guest that is slow for a moment, or
#: a monitor, has a stream at a tenth of its rate, and a window of TCP must fit. Not everybody may have so much.
_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32  # socket(7); Python does not name it


class Network:
    """The network of one machine: descriptors for its NICs, and the ports that are forwarded."""

    def __init__(self, fds: Sequence[int] = (), ports: Sequence[PortRecord] = ()) -> None:
        self.fds = list(fds)
        self.ports = tuple(ports)

    def take(self) -> list[int]:
        """The descriptors, one for each NIC; the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    async def abandon(self) -> None:
        """Close them. passt ends, unless the monitor has its socket."""
        for fd in self.take():
            os.close(fd)


async def connect(launch: Launch) -> Network:
    """The network that a launch asks for. On failure nothing is left. Raises Unsupported, HostError, EngineError."""
    if not launch.macs:
        return Network()
    if len(launch.macs) > 1:
        raise Unsupported("kvm", "more than one user-mode network", hint="drop some from nics")
    wanted = [PortRecord(p.guest, p.host or 0, p.address, p.protocol) for p in launch.spec.ports]
    await in_thread(leave, launch.runtime)
    return await serve(launch.runtime, launch.macs[0], wanted)


async def change(
    runtime: Path,
    mac: str,
    before: Sequence[PortRecord],
    after: Sequence[PortRecord],
    give: Callable[[int | None], Awaitable[object]],
) -> tuple[PortRecord, ...]:
    """Forward other ports. ``give`` hands the NIC's new descriptor to the monitor; None takes the cable out.

    Returns them as they are bound. On failure those of ``before`` are forwarded again. Raises HostError, EngineError.
    """
    require_passt()
    for port in after:
        if port not in before:
            choose(port)  # before anything is given up
    await give(None)
    await in_thread(leave, runtime)
    try:
        network = await serve(runtime, mac, after)
    except BaseException:
        await _give(await serve(runtime, mac, before), give)
        raise
    await _give(network, give)
    return network.ports


async def _give(network: Network, give: Callable[[int | None], Awaitable[object]]) -> None:
    try:
        for fd in network.fds:
            await give(fd)
    finally:
        await network.abandon()


def leave(runtime: Path) -> None:
    """Wait for the passt of a machine that has let go of it, or is dead: it sees the end of its socket, and ends.

    Then its ports are free. Idempotent; takes milliseconds.
    """
    found = process.read_pid(runtime / _PID)
    if found is not None and not process.wait(found, _END_TIMEOUT):
        process.send(found, signal.SIGKILL)
        process.wait(found, _END_TIMEOUT)
    (runtime / _PID).unlink(missing_ok=True)


def require_passt() -> str:
    """Its path. Raises Unsupported."""
    found = find_passt()
    if found is None:
        hint = "install it: apt install passt; or give the machine no network: nics: []"
        raise Unsupported("kvm", "user-mode networking without passt", hint=hint)
    return found


def choose(port: PortRecord) -> PortRecord:
    """With a host port that is free now. Raises HostError."""
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        if port.protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as passt does: TIME_WAIT is no obstacle
        try:
            sock.bind((port.address, port.host))
            if port.protocol == "tcp":
                sock.listen(1)  # two may be bound to a port with SO_REUSEADDR, of which only one can listen
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = "choose another host port, or leave it out" if taken else None
            where = f"{port.address}:{port.host}/{port.protocol}"
            raise HostError(f"cannot listen on {where}: {error.strerror}", hint=hint) from None
        return PortRecord(port.guest, int(sock.getsockname()[1]), port.address, port.protocol)


async def serve(runtime: Path, mac: str, wanted: Sequence[PortRecord]) -> Network:
    """A passt for a guest of that MAC; host port 0: any free one. It is noted in ``runtime``, which has the vm's uuid.

    Raises Unsupported, HostError, EngineError.
    """
    binary = require_passt()
    for left in range(_TRIES, 0, -1):
        ports = [choose(port) for port in wanted]
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            _widen(end)
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                words = [binary, *arguments(ports, theirs.fileno(), jail_uid(runtime.name))]
                said, found = _run(words, theirs.fileno())
            undo.callback(os.close, said)
            if found is not None:
                (runtime / _PID).write_text(f"{found.pid} {found.start}")
            try:
                await _ready(ours, mac, said)
            except EngineError:
                # A free port that somebody took in between is no reason to give up; a port that was asked for is.
                if left == 1 or all(port.host for port in wanted):
                    raise
                continue
            return Network([os.dup(ours.fileno())], ports)
    raise EngineError("no free port could be had")


def _widen(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)  # as much as net.core.wmem_max allows


def arguments(ports: Sequence[PortRecord], fd: int, uid: int | None) -> list[str]:
    """passt's command line, after its name."""
    words = [*_NETWORK, "--mtu", str(MTU), "--fd", str(fd)]
    if uid is not None:
        words += ["--runas", f"{uid}:{uid}"]
    for port in ports:
        option = "--tcp-ports" if port.protocol == "tcp" else "--udp-ports"
        words += [option, f"{port.address}/{port.host}:{port.guest}"]
    return words


def _run(words: list[str], fd: int) -> tuple[int, Process | None]:
    """Start passt in the background. Returns where it says what is wrong, and who it is, unless it has ended already."""
    said, errors = os.pipe()
    try:
        # The shell is our child, and gone at once; passt is init's.
        command = ["/bin/sh", "-c", '"$@" > /dev/null & echo $!', "sh", *words]
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        done = subprocess.run(command, stdin=null, stdout=pipe, stderr=errors, pass_fds=(fd,), cwd="/", check=False)
    finally:
        os.close(errors)
    with contextlib.suppress(OSError, ValueError):
        return said, process.find(int(done.stdout))
    return said, None


async def _ready(ours: socket.socket, mac: str, said: int) -> None:
    """Ask passt who has the gateway's address: it answers once its ports are bound. Raises EngineError."""
    loop = asyncio.get_running_loop()
    ours.setblocking(False)
    source, nobody = bytes.fromhex(mac.replace(":", "")), bytes(6)
    request = b"\xff" * 6 + source + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 1)
    request += source + socket.inet_aton(_GUEST) + nobody + socket.inet_aton(_GATEWAY)
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            await loop.sock_sendall(ours, struct.pack(">I", len(request)) + request)
            # All of the answer: what is left of it would be taken for the beginning of the next frame.
            (size,) = struct.unpack(">I", await _exactly(ours, 4))
            await _exactly(ours, size)
            return
    except TimeoutError:
        raise EngineError(f"passt is not ready after {_START_TIMEOUT:g} s") from None
    except OSError:
        pass  # it is gone
    lines = [line for line in os.read(said, 65536).decode(errors="replace").splitlines() if "syslog" not in line]
    raise EngineError("passt did not start", detail="\n".join(lines)[-500:])


async def _exactly(sock: socket.socket, size: int) -> bytes:
    """Raises OSError at the end of the stream."""
    data = b""
    while len(data) < size:
        chunk = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not chunk:
            raise ConnectionResetError
        data += chunk
    return data
