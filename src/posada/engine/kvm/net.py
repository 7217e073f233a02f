"""User-mode networking by passt: one process beside each monitor, which ends when the monitor closes their socket.

passt(1) takes its end of a connected socket (``--fd``), confines itself (own user, empty root, seccomp), and forwards the
host ports it was started with. It cannot change them while it runs: then a new one takes its place, and connections
through the old one end. The guest sees the network that QEMU's user mode has (`posada.host.bootline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Sequence

from posada.engine.base import Launch
from posada.engine.kvm.probe import find_passt
from posada.errors import EngineError, HostError, Unsupported
from posada.model.machine import PortSpec
from posada.model.records import PortRecord

#: Seconds for passt to be ready, which it says by leaving the foreground.
_START_TIMEOUT = 10.0
_TRIES = 5
_NETWORK = (
    "--ipv4-only", "--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2", "--dns-forward", "10.0.2.3",
    "--mtu", "1500", "--no-dhcp-search", "--quiet",
)  # fmt: skip


class Network:
    """The network of one machine: descriptors for its NICs, and the ports that are forwarded."""

    def __init__(self, fds: Sequence[int] = (), ports: Sequence[PortRecord] = ()) -> None:
        self._fds = list(fds)
        self.ports = tuple(ports)

    def take(self) -> list[int]:
        """The descriptors, one for each NIC; the caller's from now on."""
        fds, self._fds = self._fds, []
        return fds

    async def abandon(self) -> None:
        """Let passt end, unless its socket was taken."""
        for fd in self.take():
            os.close(fd)


async def connect(launch: Launch) -> Network:
    """The network that a launch asks for. On failure nothing is left. Raises Unsupported, HostError."""
    if not launch.macs:
        return Network()
    if len(launch.macs) > 1:
        raise Unsupported("kvm", "more than one user-mode network", hint="drop some from nics")
    wanted = [PortRecord(p.guest, p.host or 0, p.address, p.protocol) for p in launch.spec.ports]
    return await attach(wanted)


def require_passt() -> str:
    """Its path. Raises Unsupported."""
    found = find_passt()
    if found is None:
        hint = "install it: apt install passt; or give the machine no network: nics: []"
        raise Unsupported("kvm", "user-mode networking without passt", hint=hint)
    return found


async def attach(wanted: Sequence[PortRecord]) -> Network:
    """A passt that forwards these ports; host 0: any free one. Raises Unsupported, HostError, EngineError."""
    binary = require_passt()
    for left in range(_TRIES, 0, -1):
        ports = [_chosen(port) for port in wanted]
        try:
            return Network([await _run(binary, ports)], ports)
        except EngineError:
            # A free port that somebody took in between is no reason to give up; a port that was asked for is.
            if left == 1 or all(port.host for port in wanted):
                raise
    raise EngineError("no free port could be had")


def _chosen(port: PortRecord) -> PortRecord:
    """With a host port that is free now. Raises HostError."""
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        if port.protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as passt does: TIME_WAIT is no obstacle
        try:
            sock.bind((port.address, port.host))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = "choose another host port, or leave it out" if taken else None
            where = f"{port.address}:{port.host}/{port.protocol}"
            raise HostError(f"cannot listen on {where}: {error.strerror}", hint=hint) from None
        return PortRecord(port.guest, int(sock.getsockname()[1]), port.address, port.protocol)


def check_free(ports: Sequence[PortSpec]) -> None:
    """Raise HostError for the first port that is taken."""
    for port in ports:
        if port.host is not None:
            _chosen(PortRecord(port.guest, port.host, port.address, port.protocol))


def arguments(ports: Sequence[PortRecord], fd: int) -> list[str]:
    """passt's command line, after its name."""
    words = [*_NETWORK, "--fd", str(fd)]
    for port in ports:
        option = "--tcp-ports" if port.protocol == "tcp" else "--udp-ports"
        words += [option, f"{port.address}/{port.host}:{port.guest}"]
    return words


async def _run(binary: str, ports: Sequence[PortRecord]) -> int:
    """Our end of a passt that is ready. It goes to the background by itself."""
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as undo:
        undo.callback(ours.close)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                binary,
                *arguments(ports, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                cwd="/",
            )
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                _, said = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        if process.returncode:
            raise EngineError("passt did not start", detail=said.decode(errors="replace")[-500:])
        undo.pop_all()
        return ours.detach()
