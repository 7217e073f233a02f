"""The guests of `bench.lab_inside`: one kernel, initramfs, disk and command line, on posada's engines and on bare QEMU."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import posada
from posada.engine.base import DiskFile, Engine, Launch
from posada.engine.kvm import net
from posada.engine.kvm.engine import KvmEngine
from posada.engine.qemu.engine import QemuEngine
from posada.guest.client import GuestClient
from posada.kvm.system import System
from posada.model.machine import make_spec
from posada.storage.qcow2 import create_overlay

IMAGE = "debian:12"
MEMORY = "256MiB"
MAC = "52:54:00:12:34:56"
#: The lab is emulated: it translates a guest's code anew for each address, and pays dearly for mitigations. All alike.
QUICK = "mitigations=off norandmaps"
APPEND = f"console=ttyS0 quiet {QUICK} posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1"
NETWORK = " posada.net=10.0.2.15/24 posada.gw=10.0.2.2"
#: What is probed for in vain on machines without PCI and a keyboard: bare QEMU's command line has what ours has.
LEAN = "panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd"
#: Seconds for a guest to answer. A tenth would do, unless it has died.
PATIENCE = 60.0


@contextmanager
def kvm_stays_on() -> Iterator[None]:
    """One vm with and one without an irqchip, kept. The first and the last of each kind have the lab's kernel patch its own
    code on all processors, and after some dozens of that emulated ones hang.
    """
    with ExitStack() as stack:
        system = System.open()
        for irqchip in (False, True):
            vm = system.create_vm()
            stack.callback(vm.close)
            if irqchip:
                vm.create_irqchip()
            stack.callback(vm.create_vcpu(0).close)
        yield


@dataclass(frozen=True)
class Guest:
    """One that answers. ``took``: milliseconds from its start until then."""

    client: GuestClient
    took: float


@dataclass(frozen=True)
class Kit:
    """What all boot, and where their files go. ``extra``: a raw file for a second disk, read only."""

    kernel: Path
    initrd: Path
    disk: Path
    scratch: Path
    extra: Path | None = None
    mtu: int = 0
    """Of a network by passt; 0: no network."""

    def layer(self) -> Path:
        path = self.scratch / f"{uuid.uuid4()}.qcow2"
        create_overlay(path, size=self.disk.stat().st_size, backing=self.disk, backing_format="raw")
        return path

    @property
    def append(self) -> str:
        return APPEND + (NETWORK if self.mtu else "")


def kit(host: posada.Host, scratch: Path) -> Kit:
    """Of the lab's image; its initramfs is made by the first machine."""
    with host.run(IMAGE, engine="qemu", memory=MEMORY, boot={"append": QUICK}):
        pass
    record = host.images.get(IMAGE).record
    folder = host.home / record.path
    made = (host.home / "images/.initrd").glob(f"{record.digest[:32]}-*")
    initrd = max(made, key=lambda path: path.stat().st_mtime)
    return Kit(folder / str(record.kernel), initrd, folder / str(record.disk), scratch)


Start = Callable[[Kit], AbstractAsyncContextManager[Guest]]


@asynccontextmanager
async def _engine(engine: Engine, kit: Kit) -> AsyncIterator[Guest]:
    id = str(uuid.uuid4())
    runtime = kit.scratch / id
    runtime.mkdir(mode=0o700)
    disks = [DiskFile(name="root", size=kit.disk.stat().st_size, chain=((kit.disk, "raw"), (kit.layer(), "qcow2")))]
    if kit.extra is not None:
        extra = DiskFile(name="bench", size=kit.extra.stat().st_size, chain=((kit.extra, "raw"),), readonly=True)
        disks.append(extra)
    spec = make_spec(image=IMAGE, memory=MEMORY, nics=[{}] if kit.mtu else [])
    launch = Launch(
        uuid=id, name="bench", spec=spec, runtime=runtime, log=kit.scratch / f"{id}.log", disks=tuple(disks),
        macs=(MAC,) if kit.mtu else (), kernel=kit.kernel, initrd=kit.initrd, append=kit.append, agent=True,
        generation_id=id,
    )  # fmt: skip
    net.MTU = kit.mtu or net.MTU
    began = time.perf_counter()
    running = await engine.start(launch)
    try:
        client = await GuestClient.connect(engine.agent_channels(running), timeout=PATIENCE)
        took = (time.perf_counter() - began) * 1000
        async with client:
            yield Guest(client, took)
    finally:
        await engine.kill(running)
        engine.reap(runtime)


def posada_kvm(kit: Kit) -> AbstractAsyncContextManager[Guest]:
    return _engine(KvmEngine(), kit)


def posada_qemu(kit: Kit) -> AbstractAsyncContextManager[Guest]:
    return _engine(QemuEngine(), kit)


#: The machine that QEMU has for booting quickly. It keeps the PIT: without one this kernel spends a second on looking for
#: a timer (pit=off); and the RTC, for which it would look for seconds.
MICROVM = "microvm,acpi=on,rtc=on,isa-serial=on,pcie=off"


@asynccontextmanager
async def _bare(kit: Kit, machine: str, bus: str, append: str) -> AsyncIterator[Guest]:
    id = str(uuid.uuid4())
    channel = kit.scratch / f"{id[:8]}.sock"
    argv = [
        "qemu-system-x86_64", "-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1",
        "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", f"file:{kit.scratch}/{id}.log",
        "-kernel", str(kit.kernel), "-initrd", str(kit.initrd), "-append", f"{append} {kit.append}",
        "-drive", f"id=root,if=none,format=qcow2,file={kit.layer()}", "-device", f"virtio-blk-{bus},drive=root",
        "-device", f"virtio-rng-{bus}", "-device", f"virtio-balloon-{bus}", "-device", f"virtio-serial-{bus}",
        "-chardev", f"socket,id=agent,path={channel},server=on,wait=off",
        "-device", "virtserialport,chardev=agent,name=org.posada.agent.0",
    ]  # fmt: skip
    if kit.extra is not None:
        argv += ["-drive", f"id=bench,if=none,format=raw,readonly=on,file={kit.extra}"]
        argv += ["-device", f"virtio-blk-{bus},drive=bench"]
    fds: Sequence[int] = ()
    if kit.mtu:
        net.MTU = kit.mtu
        runtime = kit.scratch / id
        runtime.mkdir(mode=0o700)
        fds = (await net.serve(runtime, MAC, [])).take()
        argv += ["-netdev", f"stream,id=net,server=off,addr.type=fd,addr.str={fds[0]}"]
        argv += ["-device", f"virtio-net-{bus},netdev=net,mac={MAC},host_mtu={kit.mtu}"]
        argv[-1] += ",romfile=" if bus == "pci" else ""
    began = time.perf_counter()
    with subprocess.Popen(argv, pass_fds=fds) as process:  # noqa: ASYNC220  # nothing else goes on in this loop
        try:
            for fd in fds:
                os.close(fd)
            while not channel.exists():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.002)
            alive = lambda: process.poll() is None  # noqa: E731
            client = await GuestClient.connect([channel], timeout=PATIENCE, alive=alive)
            took = (time.perf_counter() - began) * 1000
            async with client:
                yield Guest(client, took)
        finally:
            process.kill()


def bare_microvm(kit: Kit) -> AbstractAsyncContextManager[Guest]:
    return _bare(kit, MICROVM, "device", f"{LEAN} pci=off")


def bare_pc(kit: Kit) -> AbstractAsyncContextManager[Guest]:
    """The machine with virtio on PCI: an interrupt costs the guest no look at a register."""
    return _bare(kit, "pc,vmport=off,usb=off", "pci", "panic=-1")
