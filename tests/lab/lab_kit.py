"""The KVM lab: a machine of posada's own in which ``/dev/kvm`` is real, on computers that have none.

Under emulation QEMU shows its guest a processor with AMD SVM, Debian's ``kvm_amd`` works with that, and guests of the
guest run as hardware would run them, only more slowly. What is tested in there is what a user with hardware has.

From nothing: image of Debian with Python and QEMU (25 s), Python packages (5 s), kernels and images for the inner guests
(30 s), boot, modules, snapshot (20 s). All of it is kept in ``.cache/lab``, named after its contents. From then on a lab
is a fork of that snapshot, up in a second, with the checkout copied in as it is now.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import lab_parts as parts
from lab_report import Report, read_junit

import posada
from posada.guest.binary import agent_binary
from posada.storage.tools import find_tool

#: Python for posada, passt for networks, QEMU to compare with and to check disk images, and the kernel's headers to
#: compare numbers with.
PACKAGES = ("python3", "qemu-system-x86", "qemu-utils", "passt", "linux-libc-dev")
#: Images for the inner guests, and the releases whose kernel packages are there too.
IMAGES = ("debian:12", "debian:13")
SUITES = ("bookworm", "trixie")

CPUS = int(os.environ.get("POSADA_LAB_CPUS", "2"))
MEMORY = os.environ.get("POSADA_LAB_MEMORY", "3GiB")
#: The emulated processors' time stamp counters agree, which the kernel cannot know. Without this each look at the time is
#: an access to the HPET, and the inner guests' kvm-clock is of the slow kind.
APPEND = "tsc=reliable"
READY = "ready"
#: Seconds between two looks whether a lab still answers, and those that it has for an answer.
PULSE, PATIENCE = 20, 60

#: Where things are in the lab.
TREE, PYTHON, HOME, DATA = "/posada", "/python", "/var/lib/posada", "/data"
ENVIRONMENT = {
    "PYTHONPATH": f"{TREE}/src:{PYTHON}",
    "POSADA_HOME": HOME,
    "POSADA_TEST_HOME": HOME,
    "POSADA_RUNTIME": "/run/posada",
    "POSADA_LAB": DATA,  # says to tests that they are inside, and where kernels are
    "HYPOTHESIS_STORAGE_DIRECTORY": "/run/hypothesis",
}

#: Done once, before the snapshot. Modules are loaded here: the agent, which is init, loads only those of the boot. Nobody
#: else gives /dev/kvm to the group it has on every installed system. No huge pages: khugepaged was suspected of the
#: crashes that inner guests have now and then. They went on without it; their cause is open.
SETUP = f"""
set -e
modprobe kvm_amd 2>/dev/null || modprobe kvm_intel
for module in tun vhost_net vhost_vsock; do modprobe $module; done
groupadd --system --force kvm
chgrp kvm /dev/kvm
chmod 660 /dev/kvm
echo never > /sys/kernel/mm/transparent_hugepage/enabled
mkdir -p {DATA} {HOME}/images /run/posada
chmod 700 {HOME} /run/posada
mount -o ro /dev/vdb {DATA}
for image in {DATA}/images/*; do ln -s "$image" {HOME}/images/; done
python3 -m compileall -q -j 0 {PYTHON} || true
"""

#: Done with each checkout: the inner home learns of the images, so that no test builds one.
LOADED = """
import posada
with posada.connect() as host:
    host.recover(rebuild=True)
    names = sorted(name for image in host.images.list() for name in image.names)
    assert names, "the lab has no images"
    print(*names)
"""

Say = Callable[[str], None]


class NoLab(Exception):
    """This computer cannot have a lab; the text says why."""


class Overran(Exception):
    """A suite took too long; the text is how far it came."""


class Hung(Exception):
    """The lab itself, its kernel, answers no more: nothing that ran in it is to blame, as far as one can see."""


class Lab:
    """A running lab. `fork` gives another one just like it."""

    def __init__(self, vm: posada.VM) -> None:
        self.vm = vm

    @contextlib.contextmanager
    def fork(self) -> Iterator[Lab]:
        """A lab of its own for whoever might break it."""
        (vm,) = self.vm.fork(1)
        with vm:
            yield Lab(vm)

    def load(self) -> None:
        """Copy the checkout in, as it is now."""
        self.vm.shell(f"rm -rf {TREE}", check=True)
        self.vm.files.write_tar(TREE, [parts.checkout()])
        self.run("python3", "-c", LOADED, timeout=60)

    def run(self, *argv: str, timeout: float = 120, env: Mapping[str, str] | None = None) -> str:
        """Standard output of a command that must succeed; its working directory is the checkout."""
        result = self.vm.exec(*argv, cwd=TREE, env={**ENVIRONMENT, **(env or {})}, timeout=timeout, check=True)
        return result.stdout

    def pytest(self, *arguments: str, timeout: float, env: Mapping[str, str] | None = None) -> Report:
        """Run a suite in the lab. Whether its tests passed is the report's to say.

        Raises Overran when the suite takes longer than ``timeout`` seconds, and Hung.
        """
        results = "/run/results.xml"
        argv = [
            "python3", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=short",
            "-o", f"timeout={timeout:.0f}", f"--junitxml={results}", "-o", "junit_family=xunit1", *arguments,
        ]  # fmt: skip
        # To a file: a suite that hangs leaves what it has said.
        script = f"exec {shlex.join(argv)} > /run/pytest.log 2>&1"
        with self._watched() as hung:
            try:
                result = self.vm.shell(script, cwd=TREE, env={**ENVIRONMENT, **(env or {})}, timeout=timeout)
            except posada.PosadaError as error:
                if hung.is_set():
                    raise Hung(f"the lab answered nobody for {PATIENCE} s") from error
                if isinstance(error, posada.Timeout):
                    raise Overran(f"{error}\n{self._log()}") from None
                raise
        found = read_junit(self.vm.files.read_bytes(results)) if self.vm.files.exists(results) else []
        return Report(found, exit_code=result.exit_code, output=self._log())

    def answers(self, seconds: float) -> bool:
        """Whether it runs a command within that time."""
        done = threading.Event()

        def ask() -> None:
            with contextlib.suppress(posada.PosadaError):
                self.vm.exec("true")
                done.set()

        threading.Thread(target=ask, daemon=True).start()
        return done.wait(seconds)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[threading.Event]:
        """Inside, a lab that does not answer is killed, and the event set: whoever waits for it hears of that."""
        over, hung = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.wait(PULSE):
                if not self.answers(PATIENCE) and not over.is_set():
                    hung.set()
                    with contextlib.suppress(posada.PosadaError):
                        self.vm.kill()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield hung
        finally:
            over.set()

    def _log(self) -> str:
        return self.vm.files.read_text("/run/pytest.log", errors="replace")


@contextlib.contextmanager
def labs(say: Say = print) -> Iterator[Lab]:
    """A lab with the checkout in it, gone at the end. Raises NoLab."""
    with house() as host:
        parked = prepare(host, say)
        (vm,) = parked.fork(1, snapshot=READY, ephemeral=True)
        with vm:
            lab = Lab(vm)
            lab.load()
            yield lab


def places() -> tuple[Path, Path]:
    """(home, runtime) of posada's state for labs: apart from any other, and the same for all who want labs at once."""
    home = Path(os.environ.get("POSADA_LAB_HOME", parts.CACHE / "home"))
    tag = hashlib.sha256(os.fsencode(home)).hexdigest()[:8]
    return home, Path(tempfile.gettempdir(), f"posada-lab-{os.getuid()}-{tag}")


@contextlib.contextmanager
def house() -> Iterator[posada.Host]:
    """The host that labs run on. Raises NoLab."""
    home, runtime = places()
    with posada.connect(home=home, runtime=runtime) as host:
        try:
            if platform.machine() != "x86_64":
                raise posada.HostError(f"the kvm engine is for x86-64, and this is {platform.machine()}")
            host.capabilities("qemu").require(posada.Feature.NESTED)
            for tool, package in parts.TOOLS.items():
                find_tool(tool, package)
        except (posada.Unsupported, posada.HostError) as error:
            raise NoLab(f"no lab on this computer: {error}") from None
        yield host


def prepare(host: posada.Host, say: Say) -> posada.VM:
    """The parked machine whose snapshot `READY` all labs are forks of; made if it is not there."""
    with parts.alone(say):
        host.recover()
        base = _base_image(host, say)
        python = parts.python_packages()
        data = parts.data_disk([parts.image(host, ref) for ref in IMAGES], parts.kernels(SUITES))
        agent = hashlib.sha256(agent_binary("x86_64").read_bytes()).hexdigest()
        qemu = host.capabilities("qemu")
        key = parts.digest(
            base, python.name, data.parent.name, agent, CPUS, MEMORY, APPEND, SETUP, qemu.version, qemu.accelerator
        )
        name = f"kvm-{key}"
        for vm in host.vms.list():
            if vm.name == name and any(s.name == READY for s in vm.snapshots):
                if vm.state is not posada.State.STOPPED:
                    vm.kill()  # whoever saved it was killed before it came to that
                return vm
            if vm.name.startswith("kvm-") and not vm.spec.ephemeral:
                vm.delete()  # of an older checkout, or half made
        parked = _park(host, name, base, python, data, say)
        parts.sweep(python, data.parent, parts.kernels(SUITES))
        return parked


def _base_image(host: posada.Host, say: Say) -> str:
    name = f"lab:{parts.digest(PACKAGES)}"
    if not any(name in image.names for image in host.images.list()):
        say("building the lab's image, once …")
        host.images.build("debian:12", packages=PACKAGES, name=name)
    return name


def _park(host: posada.Host, name: str, image: str, python: Path, data: Path, say: Say) -> posada.VM:
    say("booting the lab, once …")
    began = time.monotonic()
    disks = [{}, {"name": "data", "source": str(data), "readonly": True}]
    boot = {"append": APPEND}
    vm = host.vms.create(
        image, name=name, engine="qemu", nested=True, cpus=CPUS, memory=MEMORY, boot=boot, disks=disks,
        ephemeral=True,  # until it is worth keeping: it ends with us, however we end
    )  # fmt: skip
    try:
        vm.start(timeout=120)
        vm.files.upload(python, PYTHON)
        vm.shell(SETUP, check=True, timeout=300)
        vm.keep()
        vm.snapshot(READY)
        vm.kill()
    except BaseException:
        vm.delete()
        raise
    say(f"the lab was booted and saved in {time.monotonic() - began:.0f} s")
    return vm
