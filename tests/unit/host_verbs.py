"""Actions on the vm ``one``, for the fault tests: each passes as many fault points as it can."""

from __future__ import annotations

from host_kit import spec

from posada.host.host import Host
from posada.host.merging import DEEP
from posada.model.machine import DiskSpec


async def create(host: Host) -> None:
    await host.vms.create(spec(name="two", disks=[{"name": "root"}, {"name": "data", "size": "1MiB"}]))


async def delete(host: Host) -> None:
    await host.vms.snapshot("one", "before")
    await host.vms.delete("one", force=True)


async def start(host: Host) -> None:
    await host.vms.start("one")


async def snapshot(host: Host) -> None:
    await host.vms.start("one")
    await host.vms.wait_ready("one")
    await host.vms.snapshot("one", "point")


async def snapshot_at_rest(host: Host) -> None:
    await host.vms.snapshot("one", "point")


async def delete_snapshot(host: Host) -> None:
    await host.vms.snapshot("one", "point")
    await host.vms.snapshot("one", "child")
    await host.vms.delete_snapshot("one", "point", recursive=True)


async def restore(host: Host) -> None:
    await snapshot(host)
    await host.vms.restore("one", "point")


async def restore_at_rest(host: Host) -> None:
    await host.vms.snapshot("one", "point")
    await host.vms.restore("one", "point")


async def fork(host: Host) -> None:
    await host.vms.start("one")
    await host.vms.wait_ready("one")
    await host.vms.fork("one", 3)


async def fork_snapshot(host: Host) -> None:
    await snapshot(host)
    await host.vms.fork("one", 2, snapshot="point")


async def merge(host: Host) -> None:
    """Forks until the chain of ``one`` is deep, and is merged."""
    await host.vms.start("one")
    await host.vms.wait_ready("one")
    for _ in range(DEEP + 1):
        (child,) = await host.vms.fork("one", ephemeral=True)
        await host.vms.delete(child.name, force=True)


async def clone(host: Host) -> None:
    await host.vms.clone("one", name="two")


async def attach(host: Host) -> None:
    await host.vms.attach_disk("one", DiskSpec(name="data", size=1 << 20))


async def detach(host: Host) -> None:
    await attach(host)
    await host.vms.detach_disk("one", "data")


async def attach_running(host: Host) -> None:
    await host.vms.start("one")
    await attach(host)


async def detach_running(host: Host) -> None:
    await attach_running(host)
    await host.vms.detach_disk("one", "data")


VERBS = {
    verb.__name__: verb
    for verb in (
        create, delete, start, snapshot, snapshot_at_rest, delete_snapshot, restore, restore_at_rest, fork,
        fork_snapshot, merge, clone, attach, attach_running, detach, detach_running,
    )
}  # fmt: skip
