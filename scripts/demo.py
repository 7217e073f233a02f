"""The main job on real guests, with the time of each step: image, run, exec, files, snapshot, fork, restore, discard.

Everything is checked, and nothing is left behind but the image (in ``.cache/demo``: the next time is quick). The
exit status is not 0 if anything was other than it should be. ``--image debian:13`` tries another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import posada

ROOT = Path(__file__).resolve().parent.parent
MAC = "/sys/class/net/eth0/address"


class Mismatch(Exception):
    """A guest did not say what it has to say."""


class Step:
    """One line: what is done, then how long it took and what came out."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.result = ""
        self.live = sys.stdout.isatty()
        self.began = time.monotonic()

    def progress(self, fraction: float | None, message: str) -> None:
        """For verbs that take long: shown on a terminal only, on the step's own line."""
        if self.live:
            part = "" if fraction is None else f"{fraction:4.0%} "
            print(f"\r\x1b[K          {self.what}: {part}{message[:60]}", end="", flush=True)

    def __enter__(self) -> Step:
        if self.live:
            print(f"          {self.what} …", end="", flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took = time.monotonic() - self.began
        start = "\r\x1b[K" if self.live else ""
        end = f"  → {self.result}" if self.result and error is None else ""
        print(f"{start}{_time(took)}  {self.what}{' FAILED' if error else ''}{end}", flush=True)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:5.0f} ms" if seconds < 1 else f"{seconds:6.2f} s"


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Mismatch(what)


def identity(vm: posada.VM) -> dict[str, str]:
    """What has to differ between two machines, as the guest itself sees it."""
    script = f"""
        hostname; cat /etc/machine-id {MAC}; head -c 16 /dev/urandom | od -An -tx1
        cat /run/posada/generation 2>/dev/null || echo 0
    """
    names = ("hostname", "machine-id", "MAC", "random bytes", "generation")
    return dict(zip(names, vm.shell(script, check=True).stdout.splitlines(), strict=True))


def title(text: str) -> None:
    print(f"\n{text}")


def demo(host: posada.Host, image: str) -> None:
    title("An image")
    with Step(f"image {image}") as step:
        found = next((i for i in host.images.list() if image in i.names), None)
        made = found or host.images.build(image, progress=step.progress)
        step.result = f"{'here already' if found else 'built'}, {made.size >> 20} MiB, {made.digest[:12]}"

    title("Two machines at once")
    with contextlib.ExitStack() as machines:
        with Step("run the first") as step:
            one = machines.enter_context(host.run(image, name="one", memory="512MiB", progress=step.progress))
            step.result = one.exec("uname", "-srm", check=True).stdout.strip()
        with Step("run the second") as step:
            two = machines.enter_context(host.run(image, name="two", memory="512MiB", progress=step.progress))
            step.result = two.shell(". /etc/os-release; echo $PRETTY_NAME", check=True).stdout.strip()
        with Step("they are two") as step:
            a, b = identity(one), identity(two)
            for key in ("hostname", "machine-id", "MAC", "random bytes"):
                expect(a[key] != b[key], f"both machines have the {key} {a[key]}")
            step.result = f"{a['hostname']} {a['MAC']}, {b['hostname']} {b['MAC']}"

        title("Work inside")
        work_inside(one)
        with Step("delete the second"):
            two.delete()

        title("Snapshot, fork, restore")
        branch(one)

        title("Throw away")
        with Step("stop the first (it powers itself off)") as step:
            one.keep()  # an ephemeral machine would be deleted when it stops
            one.stop()
            step.result = str(one.state)
        with Step("delete it"):
            one.delete()
    left = [vm.name for vm in host.vms.list()]
    expect(not left, f"machines are left: {left}")


def work_inside(vm: posada.VM) -> None:
    with Step("100 commands, one after the other") as step:
        began = time.monotonic()
        for number in range(100):
            result = vm.exec("echo", str(number), check=True)
            expect(result.stdout == f"{number}\n", f"echo {number} said {result.stdout!r}")
        step.result = f"{(time.monotonic() - began) * 10:.1f} ms each"
    with Step("an exit status, a signal, both streams") as step:
        result = vm.shell("echo out; echo err >&2; exit 7")
        expect((result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7), f"got {result}")
        result = vm.shell("kill -9 $$")
        expect(result.signal == 9, f"got {result}")
        step.result = "7, signal 9"
    script = "for i in 1 2 3; do echo line $i; done"
    with Step("a stream, event by event") as step, vm.shell(script, stream=True) as proc:
        text = "".join(event.text for event in proc)
        expect(text == "line 1\nline 2\nline 3\n", f"got {text!r}")
        step.result = "3 lines"
    with Step("8 MiB to the guest and back") as step, tempfile.TemporaryDirectory() as scratch:
        data = secrets.token_bytes(8 << 20)
        digest = hashlib.sha256(data).hexdigest()
        there, back = Path(scratch, "there"), Path(scratch, "back")
        there.write_bytes(data)
        vm.files.upload(there, "/root/blob")
        inside = vm.exec("sha256sum", "/root/blob", check=True).stdout.split()[0]
        vm.files.download("/root/blob", back)
        expect(inside == digest == hashlib.sha256(back.read_bytes()).hexdigest(), "the bytes changed on the way")
        step.result = f"sha256 {digest[:12]}… three times"


def branch(vm: posada.VM) -> None:
    nonce = secrets.token_hex(16)
    vm.shell(f"echo {nonce} > /dev/shm/nonce; echo {nonce} > /root/nonce", check=True)
    before = identity(vm)
    with Step("a command that runs through all of this") as step:
        ticker = vm.shell("while echo tick; do sleep 0.1; done", stream=True)
        ticks = iter(ticker)
        expect(next(ticks).text.startswith("tick"), "it does not tick")
        step.result = "ticks"
    with Step("snapshot (memory, devices, disk)") as step:
        base = vm.snapshot("base", progress=step.progress)
        step.result = f"the machine stood still for {base.pause * 1000:.0f} ms"
    with contextlib.ExitStack() as machines:
        with Step("fork into three") as step:
            kids = vm.fork(3)
            for kid in kids:
                machines.enter_context(kid)
            for kid in kids:
                expect(kid.exec("cat", "/dev/shm/nonce").stdout.strip() == nonce, "a fork has not the source's memory")
            step.result = "each holds a secret that only the source's memory held"
        with Step("they are new machines") as step:
            everyone = [before, *map(identity, kids)]
            for key in ("hostname", "machine-id", "MAC", "random bytes"):
                values = [who[key] for who in everyone]
                expect(len(set(values)) == len(values), f"{key} is not new in each fork: {values}")
            step.result = ", ".join(who["hostname"] for who in everyone[1:])
        with Step("what one writes no other sees") as step:
            for number, machine in enumerate([vm, *kids]):
                machine.shell(f"echo {number} | tee /dev/shm/mine > /root/mine; sync", check=True)
            for number, machine in enumerate([vm, *kids]):
                seen = machine.shell("cat /dev/shm/mine /root/mine", check=True).stdout.split()
                expect(seen == [str(number)] * 2, f"machine {number} sees {seen}")
            step.result = "in memory and on disk"
        with Step("the source's command still runs") as step:
            expect(next(ticks).text.startswith("tick"), "it has stopped")
            ticker.close()
            step.result = "ticks"
        with Step("fork of a fork") as step, kids[0].fork(1)[0] as grandchild:
            expect(grandchild.exec("cat", "/dev/shm/nonce").stdout.strip() == nonce, "the memory is not there")
            step.result = f"generation {identity(grandchild)['generation']}"
        with Step("delete the forks"):
            machines.close()
    vm.shell("rm -rf /usr/bin /root/nonce /dev/shm/nonce")
    with Step("rm -rf /usr/bin … and restore") as step:
        vm.restore(base)
        seen = vm.shell("cat /dev/shm/nonce /root/nonce", check=True).stdout.split()
        expect(seen == [nonce] * 2, f"after the restore it holds {seen}")
        after = identity(vm)
        for key in ("hostname", "machine-id", "MAC"):
            expect(after[key] == before[key], f"{key} changed in a restore")
        expect(after["random bytes"] != before["random bytes"], "the same random bytes twice")
        step.result = "all is as it was, and it is still the same machine"
    with Step("fork of the snapshot") as step, vm.fork(1, snapshot=base)[0] as kid:
        expect(kid.exec("cat", "/dev/shm/nonce").stdout.strip() == nonce, "the memory is not there")
        step.result = identity(kid)["hostname"]


@contextlib.contextmanager
def places() -> Iterator[tuple[Path, Path]]:
    """A state directory in the checkout, and a short run directory of its own: socket paths have at most 107 bytes."""
    home = ROOT / ".cache/demo"
    home.mkdir(parents=True, exist_ok=True)
    tag = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    runtime = Path(tempfile.gettempdir(), f"posada-demo-{os.getuid()}-{tag}")
    runtime.mkdir(mode=0o700, exist_ok=True)
    try:
        yield home, runtime
    finally:
        with contextlib.suppress(OSError):
            for left in sorted(runtime.rglob("*"), reverse=True):
                left.rmdir()  # empty directories only: anything else would be a leak, and stays to be seen
            runtime.rmdir()


def checked(main: Callable[[], None]) -> int:
    began = time.monotonic()
    try:
        main()
    except Mismatch as error:
        print(f"\ndemo: WRONG: {error}", file=sys.stderr)
        return 1
    except posada.PosadaError as error:
        print(f"\ndemo: failed: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"demo: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"\nAll of it was checked; nothing is left running. {time.monotonic() - began:.1f} s.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="debian:12", metavar="NAME:TAG")
    arguments = parser.parse_args()

    def run() -> None:
        with places() as (home, runtime), posada.connect(home=home, runtime=runtime) as host:
            host.recover()
            for left in host.vms.list():  # of a demo that was killed
                left.delete()
            demo(host, arguments.image)

    return checked(run)


if __name__ == "__main__":
    sys.exit(main())
