"""What the host's tests share: a house in a temporary directory, with an image for the fake engine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posada.host.host import Host
from posada.model.machine import MachineSpec, make_spec
from posada.model.records import ImageRecord

DIGEST = "a" * 64
IMAGE = "debian:12"
DISK_SIZE = 16 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, as sockets need it, in memory, as the many small fsyncs of the tests would take."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ph-", dir=memory) as path:
        yield Path(path)


async def open_host(base: Path) -> Host:
    return await Host.open(base / "home", base / "run")


def add_image(host: Host, *, agent: bool = True, digest: str = DIGEST, name: str = IMAGE) -> ImageRecord:
    """An image that only the fake engine would boot."""
    folder = host.paths.images / digest
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "disk.raw", "wb") as file:
        file.truncate(DISK_SIZE)
    (folder / "vmlinux").write_bytes(b"kernel")
    image = ImageRecord(
        digest=digest,
        names=(name,),
        path=f"images/{digest}",
        arch="x86_64",
        created=time.time(),
        disk="disk.raw",
        disk_size=DISK_SIZE,
        kernel="vmlinux",
        append="root=/dev/vda",
        agent=agent,
    )
    host.db.put_image(image)
    return image


def spec(**fields: Any) -> MachineSpec:
    return make_spec({"image": IMAGE, "engine": "fake", "memory": "64MiB", **fields})


def tree(folder: Path) -> list[str]:
    """Every file and directory below, but for the database's own."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.startswith("state.db") and "images" not in path.parts
    )


def check_consistent(host: Host) -> None:
    """Raise AssertionError unless records, files, and processes agree: nothing half, nothing lost, nothing left."""
    paths, vms = host.paths, host.db.vms()
    uuids = {vm.uuid for vm in vms}
    layers = {layer.id: layer for layer in host.db.layers()}
    snapshots = host.db.snapshots()
    disks = [disk for owner in (*vms, *snapshots) for disk in owner.disks]
    used = {id for disk in disks for id in disk.chain if not id.startswith("image:")}
    assert used == set(layers), "layers are recorded that nobody uses, or used that are not recorded"
    files = {paths.home / layer.path for layer in layers.values()}
    assert all(path.is_file() for path in files), "a layer's file is missing"
    on_disk = {*paths.layers.iterdir(), *paths.vms.glob("*/disks/*")}
    assert on_disk == files, f"files nobody knows: {on_disk - files}"
    assert {p.name for p in paths.vms.iterdir()} == uuids
    assert all((paths.vm_json(uuid)).is_file() for uuid in uuids)
    assert {p.name for p in paths.vms.glob("*/snapshots/*")} == {s.id for s in snapshots}
    assert {s.vm for s in snapshots} <= uuids
    assert not host.db.open_operations()
    live = {vm.uuid for vm in vms if vm.running is not None}
    assert {p.name for p in paths.machines.iterdir()} == live, "runtime directories of machines that do not run"
    assert {p.name for p in paths.locks.iterdir()} <= uuids
    for vm in vms:
        tops = [disk.chain[-1] for disk in vm.disks if not disk.readonly]
        assert not any(layers[top].frozen for top in tops), "a vm writes to a frozen layer"
        others = [d.chain for o in (*vms, *snapshots) if o is not vm for d in o.disks]
        assert not any(top in chain for top in tops for chain in others), "two stand on a layer that is written to"


def machines_of(base: Path) -> list[int]:
    """pids of all fake machines of a house, also of those that no record knows."""
    mark = f"POSADA_FAKE_MACHINE={base}/".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
