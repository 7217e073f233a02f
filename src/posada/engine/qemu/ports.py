"""Port forwarding of user-mode networking: what is bound, and changing it while the machine runs.

QEMU tells its forwards only through the human monitor (`info usernet`); there is no QMP command in 7.2 or 10.0.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Sequence

from posada.engine.qemu.qmp import Session
from posada.errors import HostError
from posada.model.machine import PortSpec
from posada.model.records import PortRecord

#: ``TCP[HOST_FORWARD]   3       127.0.0.1 46657       10.0.2.15    80     0     0``
_LINE = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s", re.MULTILINE)


async def bound(session: Session) -> list[PortRecord]:
    """Every forward of the machine, as it is bound."""
    text = await session.human("info usernet")
    found = _LINE.findall(text)
    return [
        PortRecord(int(guest), int(host), "0.0.0.0" if address == "*" else address, kind.lower())
        for kind, address, host, guest in found
    ]


def check_free(ports: Sequence[PortSpec]) -> None:
    """Raise HostError for the first port that is taken: QEMU would end, and say it less well."""
    for port in ports:
        if port.host is not None:
            probe(port.address, port.host, port.protocol)


def probe(address: str, host: int, protocol: str) -> None:
    """Raises HostError unless this port could be bound now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as sock:
        if protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as slirp does: TIME_WAIT is no obstacle
        try:
            sock.bind((address, host))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = "choose another host port, or leave it out" if taken else None
            raise HostError(f"cannot listen on {address}:{host}/{protocol}: {error.strerror}", hint=hint) from None


async def add(session: Session, port: PortRecord) -> PortRecord:
    """Forward it; host 0 means any free one. Returns it as bound. Raises HostError."""
    before = set(await bound(session))
    answer = await session.human(f"hostfwd_add net0 {port.protocol}:{port.address}:{port.host}-:{port.guest}")
    after = [p for p in await bound(session) if p not in before]
    if not after:
        reason = answer.strip() or "it is forwarded already"
        raise HostError(f"cannot forward {port.address}:{port.host} to port {port.guest}: {reason}")
    return after[0]


async def remove(session: Session, port: PortRecord) -> None:
    """Idempotent."""
    await session.human(f"hostfwd_remove net0 {port.protocol}:{port.address}:{port.host}")
