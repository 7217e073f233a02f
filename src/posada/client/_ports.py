"""Forwarded ports as the user sees them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posada.errors import HostError
from posada.model.records import PortRecord

_SCHEMES = {443: "https", 8443: "https", 22: "ssh"}


@dataclass(frozen=True)
class Port:
    """A host port that leads to a guest port."""

    record: PortRecord

    @property
    def guest(self) -> int:
        """The port in the guest."""
        return self.record.guest

    @property
    def host(self) -> int:
        """The port on this host."""
        return self.record.host

    @property
    def address(self) -> str:
        """The address of this host it listens on, such as ``127.0.0.1``."""
        return self.record.address

    @property
    def protocol(self) -> str:
        """``tcp`` or ``udp``."""
        return self.record.protocol

    @property
    def url(self) -> str:
        """Where a client on this host finds it: ``http://127.0.0.1:49153``; https for guest ports 443 and 8443."""
        address = "127.0.0.1" if self.address == "0.0.0.0" else self.address
        scheme = "udp" if self.protocol == "udp" else _SCHEMES.get(self.guest, "http")
        return f"{scheme}://{address}:{self.host}"

    def __str__(self) -> str:
        return f"{self.address}:{self.host}->{self.guest}/{self.protocol}"


class PortTable(dict[int, Port]):
    """By guest port. A port that is not forwarded raises LookupError with what is."""

    def __missing__(self, guest: int) -> Port:
        known = ", ".join(map(str, self)) or "none"
        raise LookupError(f"guest port {guest} is not forwarded (forwarded: {known}); add it with ports=[{guest}]")


def port_table(records: Sequence[PortRecord]) -> Mapping[int, Port]:
    """TCP wins where both protocols are forwarded."""
    ordered = sorted(records, key=lambda record: record.protocol == "tcp")
    return PortTable({record.guest: Port(record) for record in ordered})


def listen_tcp(address: str, port: int) -> socket.socket:
    """A listening socket on this host; port 0: any free one. Raises HostError."""
    try:
        return socket.create_server((address, port), backlog=1)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError(f"cannot listen on {address}:{port}: {reason}", hint="choose another port") from None
