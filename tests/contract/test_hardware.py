"""Disks, sizes and ports, of machines that run and of those that do not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from contract_kit import Inn

from posada.errors import AlreadyExists, HostError, NotFound, SpecError, Unsupported
from posada.model.machine import DiskSpec, PortSpec
from posada.model.units import MIB


async def test_a_data_disk_comes_and_goes(inn: Inn) -> None:
    await inn.machine()
    await inn.vms.attach_disk("one", DiskSpec(name="data", size=16 * MIB))
    assert [d.name for d in inn.vms.get("one").disks] == ["root", "data"]
    with pytest.raises(AlreadyExists):
        await inn.vms.attach_disk("one", DiskSpec(name="data", size=16 * MIB))
    if inn.engine != "fake":
        wait = "for i in $(seq 100); do test -e /sys/block/vdb && exec cat /sys/block/vdb/size; sleep 0.1; done"
        listed = await inn.sh("one", "sh", "-c", wait)
        assert int(listed.stdout) * 512 == 16 * MIB
    await inn.vms.snapshot("one", "with-data")
    await inn.vms.detach_disk("one", "data")
    assert [d.name for d in inn.vms.get("one").disks] == ["root"]
    with pytest.raises(SpecError, match="root"):
        await inn.vms.detach_disk("one", "root")
    with pytest.raises(NotFound):
        await inn.vms.detach_disk("one", "data")
    await inn.vms.restore("one", "with-data")
    assert [d.name for d in inn.vms.get("one").disks] == ["root", "data"]


async def test_disks_of_a_machine_at_rest(inn: Inn, tmp_path: Path) -> None:
    source = tmp_path / "data.raw"
    source.write_bytes(b"what is on it".ljust(MIB, b"\0"))
    await inn.vms.create(inn.spec(name="one", disks=[{"name": "root"}, {"name": "data", "source": str(source)}]))
    await inn.vms.attach_disk("one", DiskSpec(name="more", source=str(source), readonly=True))
    vm = inn.vms.get("one")
    assert [(d.name, d.readonly) for d in vm.disks] == [("root", False), ("data", False), ("more", True)]
    clone = await inn.vms.clone("one")
    assert clone.disks[2].chain == vm.disks[2].chain, "a read-only disk is shared"
    await inn.vms.detach_disk("one", "data")
    assert [d.name for d in inn.vms.get(clone.name).disks] == ["root", "data", "more"]


async def test_growing_the_root_disk(inn: Inn) -> None:
    await inn.machine()
    size = inn.vms.get("one").disks[0].size + 64 * MIB
    await inn.vms.resize("one", disk=("root", size))
    assert inn.vms.get("one").disks[0].size == size
    if inn.engine != "fake":
        seen = await inn.sh("one", "cat", "/sys/block/vda/size")
        assert int(seen.stdout) * 512 == size
    with pytest.raises(SpecError, match="shrink"):
        await inn.vms.resize("one", disk=("root", MIB))
    await inn.vms.stop("one")
    await inn.vms.resize("one", disk=("root", size + MIB), cpus=2)
    vm = inn.vms.get("one")
    assert (vm.disks[0].size, vm.spec.cpus) == (size + MIB, 2)


async def test_memory(inn: Inn) -> None:
    vm = await inn.machine()
    await inn.vms.resize("one", memory=vm.spec.memory // 2 // MIB * MIB)
    with pytest.raises(Unsupported, match="stop"):
        await inn.vms.resize("one", memory=vm.spec.memory * 2)
    with pytest.raises(Unsupported, match="stop"):
        await inn.vms.resize("one", cpus=4)
    await inn.vms.stop("one")
    assert (await inn.vms.resize("one", memory=vm.spec.memory * 2)).spec.memory == vm.spec.memory * 2


async def test_ports(inn: Inn) -> None:
    await inn.machine()
    bound = await inn.vms.add_port("one", PortSpec(guest=80))
    assert bound.host > 0
    assert inn.vms.ports("one") == [bound]
    with socket.create_connection(("127.0.0.1", bound.host), timeout=10):
        pass
    with pytest.raises(AlreadyExists):
        await inn.vms.add_port("one", PortSpec(guest=80))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(HostError):
            await inn.vms.add_port("one", PortSpec(guest=81, host=taken.getsockname()[1]))
    await inn.vms.remove_port("one", 80)
    assert inn.vms.ports("one") == []
    with pytest.raises(NotFound):
        await inn.vms.remove_port("one", 80)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", bound.host), timeout=1)


async def test_a_restore_keeps_the_ports(inn: Inn) -> None:
    await inn.machine()
    bound = await inn.vms.add_port("one", PortSpec(guest=80))
    await inn.vms.snapshot("one", "point")
    await inn.vms.restore("one", "point")
    assert inn.vms.ports("one") == [bound]


async def test_bad_specs_leave_nothing(inn: Inn, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="smaller"):
        await inn.vms.create(inn.spec(name="one", disks=[{"name": "root", "size": MIB}]))
    lying = tmp_path / "lying.qcow2"
    lying.write_bytes(b"QFI\xfb" + bytes(100))
    with pytest.raises(ValueError, match=r"."):
        await inn.vms.create(inn.spec(name="one", disks=[{"name": "root"}, {"name": "x", "source": str(lying)}]))
    assert "one" not in {vm.name for vm in inn.vms.list()}
