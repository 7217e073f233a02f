"""The part of `bench.lab` that runs in the lab: posada's kvm engine beside QEMU with KVM. Prints JSON.

``python -m bench.lab_inside GUEST_IO RUNS``, where GUEST_IO is the compiled bench/guest_io.c.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import posada
from posada.engine.base import DiskFile, Launch
from posada.engine.kvm.engine import KvmEngine
from posada.guest.client import GuestClient
from posada.model.machine import make_spec
from posada.storage.qcow2 import create_overlay

IMAGE = "debian:12"
MEMORY = "256MiB"
#: The lab is emulated: it translates a guest's code anew for each address, and pays dearly for mitigations. Both alike.
QUICK = "mitigations=off norandmaps"
ROOT = "console=ttyS0 quiet posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1 panic=-1 " + QUICK
BENCH_DISK = 96 << 20
SECONDS = 3.0

Values = dict[str, dict[str, list[float]]]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Files:
    """What both boot: the image's kernel, initramfs and disk."""

    def __init__(self, host: posada.Host) -> None:
        with host.run(IMAGE, engine="qemu", memory=MEMORY, boot={"append": QUICK}):
            pass  # its initramfs is made now
        record = host.images.get(IMAGE).record
        folder = host.home / record.path
        self.kernel, self.disk = folder / str(record.kernel), folder / str(record.disk)
        made = (host.home / "images/.initrd").glob(f"{record.digest[:32]}-*")
        self.initrd = max(made, key=lambda path: path.stat().st_mtime)
        self.size = self.disk.stat().st_size


async def boot_kvm(files: Files, scratch: Path) -> float:
    """Milliseconds from the engine's start to the agent's answer."""
    engine = KvmEngine()
    id = str(uuid.uuid4())
    runtime = scratch / id
    runtime.mkdir(mode=0o700)
    layer = scratch / f"{id}.qcow2"
    create_overlay(layer, size=files.size, backing=files.disk, backing_format="raw")
    launch = Launch(
        uuid=id, name="bench", spec=make_spec(image=IMAGE, memory=MEMORY, nics=[]), runtime=runtime,
        log=scratch / f"{id}.log", disks=(DiskFile(name="root", size=files.size, chain=((files.disk, "raw"), (layer, "qcow2"))),),
        kernel=files.kernel, initrd=files.initrd, append=ROOT, agent=True, generation_id=id,
    )  # fmt: skip
    began = time.perf_counter()
    running = await engine.start(launch)
    try:
        client = await GuestClient.connect(engine.agent_channels(running), timeout=120)
        took = (time.perf_counter() - began) * 1000
        await client.close()
    finally:
        await engine.kill(running)
        engine.reap(runtime)
    return took


async def boot_microvm(files: Files, scratch: Path) -> float:
    """Milliseconds from exec of QEMU to the agent's answer, on the machine type it has for booting quickly."""
    id = secrets.token_hex(4)
    channel, layer = scratch / f"{id}.sock", scratch / f"{id}.qcow2"
    create_overlay(layer, size=files.size, backing=files.disk, backing_format="raw")
    argv = [
        "qemu-system-x86_64", "-M", "microvm,acpi=on,rtc=on,isa-serial=on", "-accel", "kvm", "-cpu", "host", "-smp", "1",
        "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{scratch}/{id}.log",
        "-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", ROOT,
        "-drive", f"id=root,if=none,format=qcow2,file={layer}", "-device", "virtio-blk-device,drive=root",
        "-device", "virtio-rng-device", "-device", "virtio-balloon-device", "-device", "virtio-serial-device",
        "-chardev", f"socket,id=agent,path={channel},server=on,wait=off",
        "-device", "virtserialport,chardev=agent,name=org.posada.agent.0",
    ]  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(argv) as process:  # noqa: ASYNC220  # nothing else goes on in this loop
        try:
            while not channel.exists():
                time.sleep(0.002)  # noqa: ASYNC251  # nobody tells
            client = await GuestClient.connect([channel], timeout=120, alive=lambda: process.poll() is None)
            took = (time.perf_counter() - began) * 1000
            await client.close()
        finally:
            process.kill()
    return took


def boots(host: posada.Host, runs: int, found: Values) -> None:
    files = Files(host)
    with tempfile.TemporaryDirectory(prefix="boot-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o755)
        for number in range(runs + 1):
            for name, boot in (("kvm", boot_kvm), ("qemu", boot_microvm)):
                took = asyncio.run(boot(files, scratch))
                tell(f"boot {number}, {name}: {took:.0f} ms")
                if number:
                    found.setdefault("boot", {}).setdefault(name, []).append(took)


@contextmanager
def machine(host: posada.Host, engine: str, **spec: object) -> Iterator[posada.VM]:
    with host.run(IMAGE, engine=engine, memory=MEMORY, nics=[], boot={"append": QUICK}, timeout=120, **spec) as vm:
        yield vm


def forks(host: posada.Host, engine: str, runs: int, add: Callable[[str, float], None]) -> None:
    with machine(host, engine) as vm:
        nonce = secrets.token_hex(16)
        vm.files.write("/dev/shm/nonce", nonce)
        for number in range(runs + 1):
            began = time.perf_counter()
            with vm.fork(1)[0] as child:
                if child.files.read_text("/dev/shm/nonce") != nonce:
                    raise SystemExit("a child does not hold the source's memory")
                took = (time.perf_counter() - began) * 1000
            tell(f"fork {number}, {engine}: {took:.0f} ms")
            if number:
                add("fork", took)


def inside_guest(host: posada.Host, engine: str, program: Path, runs: int, add: Callable[[str, float], None]) -> None:
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".raw") as file:
        for _ in range(BENCH_DISK >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        disks = [{}, {"name": "bench", "source": file.name, "readonly": True}]
        with machine(host, engine, disks=disks) as vm:
            vm.files.upload(program, "/root/guest_io")
            vm.exec("chmod", "755", "/root/guest_io", check=True)
            jobs = {
                "random1": ("random", "/dev/vdb", str(SECONDS), "1"),
                "random8": ("random", "/dev/vdb", str(SECONDS), "8"),
                "stream": ("stream", "/dev/vdb", str(SECONDS)),
                "loop": ("loop", str(SECONDS)),
            }
            for number in range(runs + 1):
                for key, arguments in jobs.items():
                    value = float(vm.exec("/root/guest_io", *arguments, check=True, timeout=60).stdout)
                    tell(f"{key} {number}, {engine}: {value:.1f}")
                    if number:
                        add(key, value)


def main() -> None:
    program, runs = Path(sys.argv[1]), int(sys.argv[2])
    found: Values = {}
    with posada.connect() as host:
        if host.capabilities("qemu").accelerator != "kvm":
            raise SystemExit("QEMU does not use KVM here: there is nothing to compare with")
        boots(host, runs, found)
        for engine in ("kvm", "qemu"):

            def add(key: str, value: float, engine: str = engine) -> None:
                found.setdefault(key, {}).setdefault(engine, []).append(value)

            forks(host, engine, runs, add)
            inside_guest(host, engine, program, max(1, runs // 2), add)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
