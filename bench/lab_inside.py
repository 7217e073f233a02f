"""The part of `bench.lab` that runs in the lab: posada's kvm engine beside QEMU with KVM. Prints JSON, a line for each value.

``python -m bench.lab_inside GUEST_IO RUNS PART``, where GUEST_IO is the compiled bench/guest_io.c.

Who is compared takes turns within each run: what disturbs the lab for a while disturbs all alike.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import posada
from bench import lab_guests as guests
from bench.lab_guests import IMAGE, MEMORY, QUICK, Kit, Start
from posada.engine.kvm import net, spawn
from posada.engine.kvm.probe import SLOW
from posada.errors import PosadaError

EXTRA_DISK = 96 << 20
SECONDS = "2"
#: Tries of a boot that dies: guests of the emulated lab do, now and then, whoever runs them.
TRIES = 3


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Results:
    """Each is a line of JSON as soon as it is there: a lab may die. Run 0 warms caches, the lab's translations among them,
    and does not count.
    """

    def add(self, run: int, key: str, who: str, value: float) -> None:
        tell(f"{key} {run}, {who}: {value:.1f}")
        if run:
            print(json.dumps({"key": key, "who": who, "value": value}), flush=True)

    def death(self, who: str, error: PosadaError) -> None:
        tell(f"a guest of {who} died: {error}")
        print(json.dumps({"died": who}), flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def started(stack: AsyncExitStack, start: Start, kit: Kit, who: str, results: Results) -> guests.Guest:
    for left in range(TRIES, 0, -1):
        try:
            return await stack.enter_async_context(start(kit))
        except PosadaError as error:
            results.death(who, error)
            if left == 1:
                raise
    raise AssertionError


async def boots(kit: Kit, runs: int, results: Results) -> None:
    async def boot(who: str, start: Start) -> float:
        async with AsyncExitStack() as stack:
            return (await started(stack, start, kit, who, results)).took

    for run in range(runs + 1):
        spawn.forget()
        results.add(run, "first", "kvm", await boot("kvm", guests.posada_kvm))
        results.add(run, "boot", "kvm", await boot("kvm", guests.posada_kvm))
        microvm = await boot("microvm", guests.bare_microvm)
        engine = await boot("engine", guests.posada_qemu)
        for key in ("boot", "first"):
            results.add(run, key, "microvm", microvm)
            results.add(run, key, "engine", engine)


Jobs = Mapping[str, tuple[str, ...]]


async def in_guests(
    kit: Kit, makers: Mapping[str, Start], program: Path, jobs: Jobs, runs: int, results: Results
) -> None:
    """All guests are up; one at a time works. Each job prints its figure."""
    async with AsyncExitStack() as stack:
        clients = {}
        for who, start in makers.items():
            client = clients[who] = (await started(stack, start, kit, who, results)).client
            await client.upload(program, "/root/guest_io")
            await client.run(["chmod", "755", "/root/guest_io"], check=True)
        for run in range(runs + 1):
            for key, job in jobs.items():
                for who, client in list(clients.items()):
                    try:
                        done = await client.run(["/root/guest_io", *job], check=True, timeout=30)
                        results.add(run, key, who, float(done.stdout))
                    except PosadaError as error:
                        results.death(who, error)
                        del clients[who]


VIRTIO: Mapping[str, Start] = {"kvm": guests.posada_kvm, "microvm": guests.bare_microvm, "pc": guests.bare_pc}


#: Without microvm: at an MTU of 32 KiB its guest died in the first stream, and at 1,500 pc was the faster.
NETWORKED: Mapping[str, Start] = {"kvm": guests.posada_kvm, "pc": guests.bare_pc}


async def disks(kit: Kit, program: Path, runs: int, results: Results) -> None:
    extra = kit.scratch / "extra.raw"
    extra.write_bytes(os.urandom(EXTRA_DISK))
    jobs = {
        "random1": ("random", "/dev/vdb", SECONDS, "1"),
        "random8": ("random", "/dev/vdb", SECONDS, "8"),
        "stream": ("stream", "/dev/vdb", SECONDS),
    }
    await in_guests(replace(kit, extra=extra), VIRTIO, program, jobs, runs, results)


async def networks(kit: Kit, program: Path, runs: int, results: Results) -> None:
    server = subprocess.Popen([program, "serve"], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        for mtu, suffix in ((net.MTU, ""), (1500, "1500")):
            jobs = {name + suffix: (name, "10.0.2.2", port, SECONDS) for name in ("send", "receive")}
            await in_guests(replace(kit, mtu=mtu), NETWORKED, program, jobs, runs, results)
    finally:
        server.kill()
        server.wait()


async def compute(kit: Kit, program: Path, runs: int, results: Results) -> None:
    await in_guests(kit, VIRTIO, program, {"loop": ("loop", SECONDS)}, runs, results)


def forks(host: posada.Host, runs: int, results: Results) -> None:
    with ExitStack() as stack:
        sources = {}
        for who, engine in (("kvm", "kvm"), ("engine", "qemu")):
            vm = host.run(IMAGE, engine=engine, memory=MEMORY, nics=[], boot={"append": QUICK}, timeout=120)
            sources[who] = stack.enter_context(vm)
        nonce = secrets.token_hex(16)
        for vm in sources.values():
            vm.files.write("/dev/shm/nonce", nonce)
        for run in range(runs + 1):
            for who, vm in sources.items():
                began = time.perf_counter()
                with vm.fork(1)[0] as child:
                    if child.files.read_text("/dev/shm/nonce") != nonce:
                        raise SystemExit("a child does not hold the source's memory")
                    took = (time.perf_counter() - began) * 1000
                results.add(run, "fork", who, took)


def main() -> None:
    program, runs, part = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    results = Results()
    os.environ[SLOW] = "1"  # a lab that is measured in a busy moment is not taken for a host without hardware
    with posada.connect() as host, scratch() as folder, guests.kvm_stays_on():
        if host.capabilities("qemu").accelerator != "kvm":
            raise SystemExit("QEMU does not use KVM here: there is nothing to compare with")
        if part == "fork":
            forks(host, runs, results)
        else:
            kit = guests.kit(host, folder)
            parts: Mapping[str, Callable[[], object]] = {
                "boot": lambda: asyncio.run(boots(kit, runs, results)),
                "blk": lambda: asyncio.run(disks(kit, program, runs, results)),
                "net": lambda: asyncio.run(networks(kit, program, runs, results)),
                "compute": lambda: asyncio.run(compute(kit, program, runs, results)),
            }
            parts[part]()


if __name__ == "__main__":
    main()
