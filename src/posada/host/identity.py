"""A machine's new identity in the guest: what makes a fork, a clone or a restored machine differ from its source."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from posada.model.records import VmRecord

if TYPE_CHECKING:
    from posada.guest.client import GuestClient
    from posada.host.house import House


async def reset(
    client: GuestClient, vm: VmRecord, *, token: bytes | None, ssh_host_keys: bool, macs: bool = True
) -> None:
    """Reseed, step the clock, name it, thaw it (docs/AGENT-PROTOCOL.md, identity.reset). Raises GuestError."""
    from posada.model.exec import IdentityReset

    await client.identity_reset(
        IdentityReset(
            token=token,
            generation=vm.generation,
            hostname=vm.spec.hostname or vm.name,
            machine_id=vm.uuid.replace("-", ""),
            macs=vm.macs if macs else (),
            entropy=secrets.token_bytes(64),
            time_ns=time.time_ns(),
            ssh_host_keys=ssh_host_keys,
        )
    )


async def reset_pending(house: House, uid: str) -> None:
    """Give a machine that booted for the first time its identity, at the first connection: its disk is its image's, or
    another vm's. Nothing for all others."""
    vm = house.recorded(uid)
    if not vm.identity_pending:
        return
    async with house.locks.hold(uid, "identity reset"):
        vm = house.recorded(uid)
        if vm.identity_pending and vm.running is not None:
            client = await house.guests.connect(vm)
            await reset(client, vm, token=None, ssh_host_keys=True, macs=False)
            house.save(vm, identity_pending=False)
