"""``Host``: one computer that runs machines, opened. No daemon: this process works on the state directory itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from posada.errors import StateError
from posada.host.db import Database
from posada.host.house import House
from posada.host.machines import Machines
from posada.host.paths import Paths
from posada.host.process import boot_id

if TYPE_CHECKING:
    from posada.host.doctor import Check
    from posada.host.events import Events
    from posada.host.operations import Operations
    from posada.host.recovery import RecoverReport
    from posada.images.store import ImageStore


class Host:
    """An open host. Make it with `open`; `close` closes connections and the database, and the machines live on."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.vms = Machines(house)

    @classmethod
    async def open(cls, home: Path | None = None, runtime: Path | None = None, *, salvage: bool = False) -> Host:
        """Open the state directory; made if it is not there. What dead processes left undone is put right first.

        ``salvage``: a damaged database is set aside and a new one made, to be filled by ``recover(rebuild=True)``.

        Raises StateError (damaged, locked, newer), HostError (cannot be made).
        """
        paths = Paths.default(home, runtime)
        paths.make()
        try:
            house = House(paths)
        except StateError:
            if not salvage:
                raise
            Database.set_aside(paths.database)
            house = House(paths)
        try:
            await _settle(house)
        except BaseException:
            await house.close()
            raise
        return cls(house)

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.house.close()

    @property
    def paths(self) -> Paths:
        return self.house.paths

    @property
    def db(self) -> Database:
        return self.house.db

    @property
    def images(self) -> ImageStore:
        return self.house.images

    @property
    def operations(self) -> Operations:
        return self.house.operations

    @property
    def events(self) -> Events:
        return self.house.events

    def doctor(self) -> list[Check]:
        """What this host has and lacks, measured. Takes up to a second."""
        from posada.host.doctor import examine

        return examine(self.paths)

    async def recover(self, *, rebuild: bool = False) -> RecoverReport:
        """Finish or roll back what was interrupted. ``rebuild``: first make state.db anew from the vm.json files."""
        from posada.host import rebuild as rebuilding
        from posada.host import recovery

        found = None
        if rebuild:
            self.images.collect_garbage()  # finds the images again
            found = rebuilding.rebuild(self.house)
            for vm in self.house.db.vms():
                if vm.name in found.rebuilt:  # a machine that still runs is known to nobody: its disks need one writer
                    await self.house.engine(vm.engine).abandon(self.paths.machine(vm.uuid))
        report = await recovery.recover(self.house)
        await self.vms.reap()
        return report if found is None else found.merge(report)


async def _settle(house: House) -> None:
    """Cheap when there is nothing to do, which is nearly always: `recovery` is not even imported then."""
    moved = house.db.meta("boot") != boot_id() or house.db.meta("runtime") != str(house.paths.runtime)
    interrupted = any(map(house.operations.interrupted, house.db.open_operations()))
    if _half_made_images(house.paths.images):
        house.images.collect_garbage()
    if moved or interrupted:
        from posada.host import recovery

        recovery.check_runtime(house)
        recovery.bury_earlier_boot(house)
        await recovery.recover(house)
    await Machines(house).reap()


def _half_made_images(images: Path) -> bool:
    """Somebody builds an image, or died doing so: `ImageStore.collect_garbage` tells them apart."""
    try:
        return any(name.startswith((".partial-", ".trash-")) for name in os.listdir(images))
    except FileNotFoundError:
        return False
