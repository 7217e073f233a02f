"""A running Debian that writes to its disk is put back in place, again and again, by its monitor in its real jail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from test_migrate import NAME, sh
from test_migrate import host as host

from posada.engine.kvm.control import connect
from posada.host.host import Host
from posada.host.layers import disk_files
from posada.model.records import VmRecord
from posada.proto.monitor import Op
from posada.storage import qcow2


async def ask(vm: VmRecord, *fds: int, **args: Any) -> Any:
    assert vm.running is not None
    async with connect(Path(vm.running.runtime)) as session:
        return await session.call(Op.RESET, args, fds=fds, timeout=60)


async def make_point(host: Host, vm: VmRecord, folder: Path) -> None:
    assert vm.running is not None
    (disk,) = disk_files(host.vms._house, vm.disks)
    path, format = disk.chain[-1]
    qcow2.create_overlay(folder / "throwaway.qcow2", size=disk.size, backing=path, backing_format=format)
    top = os.open(folder / "throwaway.qcow2", os.O_RDWR)
    pagemap = os.open(f"/proc/{vm.running.process.pid}/pagemap", os.O_RDONLY)
    try:
        await ask(vm, pagemap, top, pagemap=0, layers=[{"disk": disk.name, "top": 1}])
    finally:
        os.close(top)
        os.close(pagemap)


async def test_debian_forgets_what_it_wrote(host: Host, tmp_path: Path) -> None:
    vm = host.vms.get(NAME)
    before = await sh(await host.vms.guest(NAME), "echo kept > /root/kept; sync; ls -R /usr/share | sha256sum")
    await make_point(host, vm, tmp_path)
    for turn in range(3):
        guest = await host.vms.guest(NAME)
        assert await sh(guest, "cat /root/*") == "kept"
        await sh(guest, f"echo {turn} > /root/later; rm -r /usr/share/doc /usr/share/man; sync")
        await sh(
            guest,
            "head -c 20000000 /dev/urandom > /root/big; echo lost > /root/kept; sync; echo 3 > /proc/sys/vm/drop_caches",
        )
        await host.vms._house.guests.drop(vm.uuid)  # what it says is of a time that is not any more
        assert (await ask(vm))["pages"] > 0
        guest = await host.vms.guest(NAME)
        assert await sh(guest, "ls /root; cat /root/kept") == "kept\nkept"
        await sh(guest, "echo 3 > /proc/sys/vm/drop_caches")
        assert await sh(guest, "cat /root/kept; ls -R /usr/share | sha256sum") == f"kept\n{before}"
        assert await sh(guest, "dmesg | grep -ciE 'I/O error|EXT4-fs error' || true") == "0"
        await host.vms._house.guests.drop(vm.uuid)
        await ask(vm)
