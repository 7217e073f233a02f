"""One series of `bench.kvm`, in an interpreter like a monitor's. Prints its values as JSON."""

from __future__ import annotations

import _thread
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from posada.kvm.call import call
from posada.vmm import fork as forking
from posada.vmm import main as monitor
from posada.vmm import process
from posada.vmm import vcpu as running
from posada.vmm.builder import prepare, wire
from posada.vmm.config import JailConfig, MonitorConfig, VsockConfig
from posada.vmm.control import Control
from posada.vmm.fork import Child, Forker
from posada.vmm.machine import Machine
from posada.vmm.memory import PAGE, GuestMemory
from posada.vmm.pagemap import PageMap
from posada.vmm.replay import Replay
from posada.vmm.reset import Point
from posada.vmm.vcpu import Vcpus

SIZE = 256 << 20
CODE, PORT = 0x1000, 0x10
MMIO = 0xD800_0000
COUNT = bytes.fromhex("66ff060020 66a10020 66e710 ebf2")  # inc dword [0x2000]; mov eax, [0x2000]; out 0x10, eax; jmp
WRITES = bytes.fromhex("e610 ebfc")  # out 0x10, al; jmp
DIRTY_50 = bytes.fromhex(  # one word in each of 50 pages, then a port write
    "b93200 bb0010 8ec3 26ff060000 81c30001 e2f3 66ff060020 66a10020 66e710 ebdf"
)
#: 16-bit code with flat 32-bit segments: mov eax, [d8000000]; jmp
READS = bytes.fromhex("67 66 a1 000000d8 ebf7")
assert monitor.MAX_CONFIG  # imported for what it weighs

now = time.perf_counter_ns


class Device:
    """Answers the port and notes when it was first written to."""

    def __init__(self) -> None:
        self.at = self.count = 0

    def read(self, offset: int, size: int) -> int:
        self.count += 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.count += 1
        if not self.at:
            self.at = now()


def machine(code: bytes, hugepages: bool = False) -> tuple[Machine, Device]:
    config = MonitorConfig(
        uuid="", name="toy", cpus=1, memory=SIZE, kvm=os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), vsock=VsockConfig(3),
        jail=JailConfig(namespaces=False), hugepages=hugepages,
    )  # fmt: skip
    made = prepare(config, GuestMemory.anonymous(SIZE, hugepages))
    device = Device()
    made.pio.add(PORT, 4, device)
    made.mmio.add(MMIO, PAGE, device)
    wire(made)
    made.control = Control(made.loop, -1, {})
    made.memory.write(CODE, code)
    vcpu = made.vcpus.threads[0].vcpu
    sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        segment.base = segment.selector = 0
        segment.limit, segment.g = 0xFFFF_FFFF, 1
    regs.rip, regs.rsp, regs.rflags = CODE, CODE, 2
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    process.warm()
    return made, device


def child_of(parent: Machine) -> MonitorConfig:
    return replace(parent.config, kvm=-1, generation_id="12345678-1234-1234-1234-123456789abc", vsock=VsockConfig(4))


class Stamps:
    """When steps of a fork end, in the process that takes them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: dict[str, int] = {}
        self.faults = 0
        self.spent = 0
        """Nanoseconds of processor time: of this thread until fork(2) is done; in a child, of all of it until its first exit."""
        for owner, name, text in (
            (Vcpus, "quiesce", "vcpus parked"),
            (Replay, "record", "state recorded"),
            (forking, "_fork", "fork(2) has returned in the child"),
            (Replay, "play", "its kernel vm is made, state put in"),
            (forking, "_adopt", "its descriptors are its own"),
        ):
            self._wrap(owner, name, text)
        plain = running.enter

        def enter_and_note(fd: int) -> bool:
            entered = plain(fd)
            self.at["first exit"] = now()
            self.spent = time.process_time_ns()
            self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            return entered

        setattr(running, "enter", enter_and_note)  # noqa: B010

    def _wrap(self, owner: Any, name: str, text: str) -> None:
        plain = getattr(owner, name)

        def noted(*arguments: Any) -> Any:
            result = plain(*arguments)
            self.at[text] = now()
            if name == "_fork" and result:
                self.spent = time.thread_time_ns()
            elif name == "_fork":
                self.device.at = 0
            return result

        setattr(owner, name, noted)


def forks(runs: int, touched: bool = False, hugepages: bool = False) -> dict[str, Any]:
    parent, device = machine(COUNT, hugepages)
    if touched:
        for at in range(4 << 20, SIZE, PAGE):
            parent.memory.view(at, 1)[0] = 1
    stamps, forker, config = Stamps(device), Forker(parent, lambda: live(parent, lambda: tell(*told))), child_of(parent)
    told: tuple[int, int] = -1, 0
    found: dict[str, Any] = {"first": [], "answered": [], "pause": [], "spent": [], "faults": [], "steps": {}}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent.start()

    def once() -> None:
        nonlocal told
        reader, writer = os.pipe()
        stamps.at.clear()
        child = Child(config)
        spent = time.thread_time_ns()
        told = writer, now()
        outcome = forker.fork([child])
        assert outcome is not None
        os.close(writer)
        with open(reader, "rb") as answer:
            values = json.load(answer)
        found["first"].append(values["at"]["first exit"] / 1e6)
        found["answered"].append(values["answered"] / 1e6)
        found["faults"].append(values["faults"])
        found["spent"].append((values["spent"] + stamps.spent - spent) / 1e6)
        found["pause"].append(outcome.pause * 1e3)
        for name, at in values["at"].items():
            found["steps"].setdefault(name, []).append(at / 1e3)
        if len(found["first"]) < runs:
            parent.loop.timer(0.02, once)  # the last child is gone by then
        else:
            parent.loop.stop()

    def tell(writer: int, begun: int) -> None:
        if not device.at:
            parent.loop.timer(0.001, lambda: tell(writer, begun))
            return
        values = {
            "at": {name: at - begun for name, at in stamps.at.items()},
            "answered": device.at - begun,
            "faults": stamps.faults,
            "spent": stamps.spent,
        }
        os.write(writer, json.dumps(values).encode())
        os._exit(0)

    parent.loop.timer(0.1, once)
    parent.loop.run()
    order = sorted(found["steps"], key=lambda name: sorted(found["steps"][name])[runs // 2])
    found["steps"] = {name: found["steps"][name] for name in order}
    return found


def live(child: Machine, first: Callable[[], object]) -> NoReturn:
    first()
    child.loop.run()
    os._exit(0)


def touched(runs: int) -> dict[str, Any]:
    """The parent's second half, in a process of its own: one machine per process."""
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, json.dumps(forks(runs // 3, True, True)["first"]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        huge = json.load(told)
    os.wait()
    return {"first": forks(runs // 3, True)["first"], "huge": huge}


def private(guest: GuestMemory) -> dict[str, int]:
    """KiB of Private_Dirty by what holds it, without guest memory. Page tables are not counted."""
    first = guest.regions[0]
    found: Counter[str] = Counter()
    skip, name = False, ""
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head, _, rest = line.partition(" ")
            if "-" in head and not head.endswith(":"):
                start = int(head.split("-")[0], 16)
                skip = first.address - (4 << 20) <= start < first.address + SIZE
                path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) > 5 else ""
                name = (
                    "libraries' data"
                    if ".so" in path or "/bin/" in path
                    else path
                    if path.startswith("[")
                    else "Python's heap"
                )
            elif head == "Private_Dirty:" and not skip:
                found[name] += int(rest.split()[0])
    return {name: kib for name, kib in found.most_common() if kib}


def memory(runs: int) -> dict[str, Any]:
    parent, device = machine(COUNT)
    forker, config = Forker(parent, lambda: live(parent, report)), child_of(parent)
    reader, writer = os.pipe()
    alone: dict[str, int] = {}
    parent.start()

    def report() -> None:
        if device.count < 100:
            parent.loop.timer(0.01, report)
            return
        os.write(writer, json.dumps(private(parent.memory)).encode())
        os._exit(0)

    def once() -> None:
        alone.update(private(parent.memory))
        device.count = 0
        forker.fork([Child(config)])
        parent.loop.stop()

    parent.loop.timer(0.2, once)
    parent.loop.run()
    os.close(writer)
    with open(reader, "rb") as told:
        parts = json.load(told)
    return {"first": sum(alone.values()), "child": sum(parts.values()), "parts": parts}


def reset(runs: int) -> dict[str, Any]:
    toy, _ = machine(DIRTY_50)
    vcpu = toy.vcpus.threads[0].vcpu

    def guest() -> None:
        vcpu.run()
        vcpu.immediate_exit = 1
        vcpu.run()
        vcpu.immediate_exit = 0

    guest()
    point = Point(toy, PageMap.open())
    count = 10 * runs

    def rate(work: Callable[[], object]) -> float:
        begun = time.process_time()
        for _ in range(count):
            work()
        return count / (time.process_time() - begun)

    def both() -> None:
        guest()
        assert 50 <= point.put_back() < 60

    found: dict[str, Any] = {"count": count, "with_run": rate(both), "alone": rate(point.put_back)}
    replay = point._replay
    requests = [(vcpu.fd, r) for r in replay.cpus[0].sets] + [(toy.vm.fd, r) for r in replay.chips.sets]
    costs: dict[str, float] = {}
    for fd, request in requests:
        begun = now()
        for _ in range(200):
            call(fd, *request)
        costs[f"KVM_{request.number.name}"] = (now() - begun) / 200e3
    begun = now()
    for _ in range(200):
        toy.vm.dirty_log(0)
    costs["KVM_GET_DIRTY_LOG, 256 MiB, clean"] = (now() - begun) / 200e3
    for name, slot in toy.slots.items():
        begun = now()
        for _ in range(200):
            assert slot.transport.save() == point._devices[name]
        costs[f"{name}: is it as it was?"] = (now() - begun) / 200e3
    found["costs"] = costs
    toy.start()
    begun = now()
    for _ in range(count // 10):
        point.reset()
    found["threaded"] = count / 10 / (now() - begun) * 1e9
    return found


def exits(runs: int) -> dict[str, Any]:
    found: dict[str, Any] = {"profile": {}}
    for name, code in (("pio", WRITES), ("mmio", READS)):
        toy, device = machine(code)
        toy.start()
        samples: Counter[str] = Counter()
        me = _thread.get_ident()
        begun, before = now(), device.count
        while now() - begun < 1_000_000_000:
            time.sleep(0.001)
            if name == "pio":
                for ident, frame in sys._current_frames().items():
                    if ident != me:
                        samples[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"] += 1
        found[name] = (device.count - before) / (now() - begun) * 1e9
        if name == "pio":
            total = sum(samples.values())
            found["profile"] = {key: n / total for key, n in samples.most_common(8)}
        with toy.loop.lock:
            toy.vcpus.stop()
    toy, _ = machine(WRITES)
    vcpu, begun = toy.vcpus.threads[0].vcpu, now()
    for _ in range(20_000):
        vcpu.run()
    found["bare"] = 20_000 / (now() - begun) * 1e9
    return found


if __name__ == "__main__":
    series = {"fork": forks, "touched": touched, "memory": memory, "reset": reset, "exits": exits}[sys.argv[1]]
    text = json.dumps(series(int(sys.argv[2])))
    sys.stdout.write(text)
    sys.stdout.flush()
    os._exit(0)
