"""From a record to what an engine is given: `posada.engine.base.Launch`."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from posada.engine.base import Launch
from posada.engine.registry import needs
from posada.errors import HostError, SpecError, Unsupported
from posada.host.bootline import command_line
from posada.host.house import House
from posada.host.layers import disk_files
from posada.model.capabilities import Capabilities
from posada.model.machine import MachineSpec, PortSpec
from posada.model.records import ImageRecord, PortRecord, VmRecord
from posada.model.units import format_size


def check_spec(spec: MachineSpec, can: Capabilities) -> None:
    """Raise Unsupported or SpecError for what the engine cannot do here, before anything is made."""
    for feature in needs(spec):
        can.require(feature)
    if spec.cpus > can.max_cpus:
        raise SpecError("cpus", f"the {can.engine} engine gives at most {can.max_cpus} here")
    if can.max_memory and spec.memory > can.max_memory:
        raise SpecError("memory", f"the {can.engine} engine gives at most {format_size(can.max_memory)} here")


def check_folders(house: House, spec: MachineSpec) -> None:
    """Raise SpecError for a folder that is not there, or that would give the guest posada's own state to write to."""
    for i, folder in enumerate(spec.folders):
        where = f"folders[{i}].source"
        if not os.path.isdir(folder.source):
            raise SpecError(where, f"{folder.source} is not a directory of this host", hint="make it first")
        real = os.path.realpath(folder.source)
        for own in (house.paths.home, house.paths.runtime):
            state = os.path.realpath(own)
            if not folder.readonly and os.path.commonpath([real, state]) in (real, state):
                hint = "share less, or read-only"
                raise SpecError(where, f"the guest could change posada's state in {state}", hint=hint)


def refuse_folders(vm: VmRecord, what: str) -> None:
    """Raise Unsupported for a vm that has folders: what its guest has open there cannot be copied."""
    if vm.spec.folders:
        shared = ", ".join(folder.source for folder in vm.spec.folders)
        hint = "take a snapshot of its disks only, or use a machine without folders"
        raise Unsupported(vm.engine, f"{what} of {vm.name!r}, which shares {shared}", hint=hint)


def new_mac() -> str:
    """Random, in the range that QEMU and Xen use for guests (52:54:00)."""
    return "52:54:00:" + ":".join(f"{b:02x}" for b in secrets.token_bytes(3))


def macs_for(spec: MachineSpec) -> tuple[str, ...]:
    return tuple(nic.mac or new_mac() for nic in spec.nics)


def build_launch(house: House, vm: VmRecord, *, ports: Sequence[PortRecord] = (), boot: bool = True) -> Launch:
    """What the engine needs to run ``vm``. Makes its runtime directory.

    ``ports`` pins forwarded ports to the numbers they had. ``boot`` is False for a machine that comes out of a snapshot
    or a fork: it has its kernel in memory already. Raises HostError for a kernel that is not there.
    """
    runtime = house.paths.machine(vm.uuid)
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    house.paths.activity(vm.uuid).touch()
    spec = _pin(vm.spec, ports)
    check_folders(house, spec)
    agent = house.has_agent(vm)
    kernel, initrd, append = None, None, ""
    # The fake engine boots nothing: its tests need no kernel, and no agent built.
    if boot and spec.firmware == "direct" and vm.engine != "fake":
        image = house.image_of(vm)
        kernel, initrd = _kernel(house, spec, image)
        append = command_line(
            agent=agent,
            root=bool(vm.disks),
            hostname=spec.hostname or vm.name,
            network=bool(spec.nics),
            emulated="tcg" in house.engine(vm.engine).capabilities().accelerator,
            image_append=image.append if image is not None and spec.boot.kernel is None else "",
            user_append=spec.boot.append,
            folders=spec.folders,
        )
    return Launch(
        uuid=vm.uuid,
        name=vm.name,
        spec=spec,
        runtime=runtime,
        log=house.paths.log(vm.uuid),
        disks=disk_files(house, vm.disks),
        macs=vm.macs,
        kernel=kernel,
        initrd=initrd,
        append=append,
        agent=agent,
        owner=vm.owner,
        generation_id=str(uuid.uuid4()),
    )


def _kernel(house: House, spec: MachineSpec, image: ImageRecord | None) -> tuple[Path, Path | None]:
    kernel = Path(spec.boot.kernel) if spec.boot.kernel else None
    initrd = Path(spec.boot.initrd) if spec.boot.initrd else None
    if image is not None:
        folder = house.paths.absolute(image.path)
        if kernel is None and image.kernel is not None:
            kernel = folder / image.kernel
            initrd = initrd or house.images.initrd_for(image)
    if kernel is None:
        raise SpecError("boot.kernel", "is missing: the image has none", hint="give a kernel, or firmware bios or uefi")
    for path in (kernel, initrd):
        if path is not None and not os.access(path, os.R_OK):
            raise HostError(f"cannot read {path}", hint="the vm boots from it")
    return kernel, initrd


def _pin(spec: MachineSpec, ports: Sequence[PortRecord]) -> MachineSpec:
    if not ports:
        return spec
    bound = {(p.guest, p.protocol, p.address): p.host for p in ports}

    def pinned(port: PortSpec) -> PortSpec:
        host = port.host or bound.get((port.guest, port.protocol, port.address))
        return msgspec.structs.replace(port, host=host)

    return msgspec.structs.replace(spec, ports=tuple(pinned(p) for p in spec.ports))
