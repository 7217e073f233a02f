"""The peers, in the same run on the same machine: what is installed is measured, what is not is named as such.

All boot the very kernel and initramfs of the image that posada's figures use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.series import Figure, percentile, written

READY = b"posada-agent: ready"
APPEND = "console=ttyS0 quiet mitigations=off panic=-1 posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1 posada.mode=fast"

Tell = Callable[[str], None]


class PeerFailed(Exception):
    """The peer is there, but did not do its part; the table says so."""


def bare_qemu(image: dict[str, Path], runs: int, tell: Tell) -> dict[str, str]:
    """Figure key → text, for QEMU started by hand."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return {"cold": "bare QEMU: not installed"}
    took = Figure("bare", "")
    for number in range(runs + 1):
        value = _boot(qemu, image)
        if number:
            took.add(value)
        tell(f"bare QEMU {number}: {value:.0f} ms to the agent's first word")
    return {"cold": f"bare QEMU to the same agent's first word {written(took.result, 'ms')}"}


def _boot(qemu: str, image: dict[str, Path]) -> float:
    """Milliseconds from exec to READY on the console."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            qemu, "-M", "pc", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "512", "-nodefaults", "-no-user-config",
            "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", str(image["kernel"]),
            "-initrd", str(image["initrd"]), "-append", APPEND,
            "-drive", f"if=virtio,snapshot=on,format={image['format']},file={image['disk']}",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _read_until(process, READY, 60)
        return (time.perf_counter() - began) * 1000
    finally:
        process.kill()
        process.wait()


def _read_until(process: subprocess.Popen[bytes], wanted: bytes, timeout: float) -> None:
    if process.stdout is None:
        raise PeerFailed("no console")
    seen, end = b"", time.monotonic() + timeout
    while wanted not in seen:
        ready, _, _ = select.select([process.stdout], [], [], max(0, end - time.monotonic()))
        chunk = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not chunk:
            raise PeerFailed(f"never said {wanted!r}: {seen[-200:]!r}")
        seen += chunk


_DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{append}</cmdline>
</os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
<serial type='file'><source path='{log}'/></serial></devices></domain>"""


def libvirt(image: dict[str, Path], runs: int, tell: Tell) -> dict[str, str]:
    """Start, save and restore of the same guest by virsh; and a list, if its daemon runs."""
    virsh = shutil.which("virsh")
    if virsh is None or subprocess.run([virsh, "-q", "version"], capture_output=True, check=False).returncode:
        state = "not installed" if virsh is None else "installed, its daemon does not answer"
        return dict.fromkeys(("cold", "restore", "snapshot-pause", "ps"), f"libvirt: {state}")

    def call(*arguments: str) -> float:
        began = time.perf_counter()
        done = subprocess.run([virsh, "-q", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerFailed(done.stderr.strip())
        return (time.perf_counter() - began) * 1000

    name = f"posada-bench-{os.getpid()}"
    boots, saves, restores, lists = ([] for _ in range(4))  # type: list[list[float]]
    with tempfile.TemporaryDirectory(prefix="posada-bench-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        log, disk, saved = folder / "log", folder / "disk.qcow2", folder / "saved"
        try:
            for number in range(runs):
                log.unlink(missing_ok=True)
                _overlay(disk, image)
                (folder / "domain.xml").write_text(
                    _DOMAIN.format(name=name, append=APPEND, disk=disk, log=log, **{k: image[k] for k in ("kernel", "initrd")})
                )
                began = time.perf_counter()
                call("create", str(folder / "domain.xml"))
                while not log.exists() or READY not in log.read_bytes():
                    if time.perf_counter() - began > 60:
                        raise PeerFailed("the guest of libvirt did not boot")
                boots.append((time.perf_counter() - began) * 1000)
                saves.append(call("save", name, str(saved)))
                restores.append(call("restore", str(saved)))
                lists.append(call("list", "--all"))
                call("destroy", name)
                tell(f"libvirt {number}: boot {boots[-1]:.0f}, save {saves[-1]:.0f}, restore {restores[-1]:.0f} ms")
        except PeerFailed as error:
            return {"cold": f"libvirt: {error}"}
        finally:
            with contextlib.suppress(PeerFailed):
                call("destroy", name)
    return {
        "cold": f"libvirt to the agent's first word {written(percentile(boots, 'p50'), 'ms')}",
        "restore": f"libvirt restore (no reply) {written(percentile(restores, 'p50'), 'ms')}",
        "snapshot-pause": f"libvirt save {written(percentile(saves, 'p50'), 'ms')}",
        "ps": f"libvirt list (as many as there are) {written(percentile(lists, 'p50'), 'ms')}",
    }


def _overlay(disk: Path, image: dict[str, Path]) -> None:
    disk.unlink(missing_ok=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", str(image["format"]), "-b", str(image["disk"]), str(disk)],
        check=True,
    )
    disk.chmod(0o666)


def quicksand(image: dict[str, Path], runs: int, tell: Tell) -> dict[str, str]:
    """quick-sandbox from PyPI, with its own Alpine image; in this environment or in that of QUICKSAND_PYTHON."""
    python = os.environ.get("QUICKSAND_PYTHON") or (sys.executable if importlib.util.find_spec("quicksand") else None)
    if python is None:
        return dict.fromkeys(("cold", "exec", "restore", "snapshot-pause"), "quicksand: not installed")
    script = Path(__file__).with_name("quicksand_peer.py")
    done = subprocess.run([python, script, str(runs)], capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return {"cold": f"quicksand failed: {done.stderr.strip().splitlines()[-1][:80]}"}
    took = {name: percentile(values, "p50") for name, values in json.loads(done.stdout.splitlines()[-1]).items()}
    tell("quicksand: " + ", ".join(f"{name} {value:.0f} ms" for name, value in took.items()))
    return {
        "cold": f"quicksand (Alpine) {written(took['cold'], 'ms')}",
        "exec": f"quicksand {written(took['exec'], 'ms')}",
        "restore": f"quicksand revert + exec {written(took['restore'], 'ms')}",
        "snapshot-pause": f"quicksand checkpoint {written(took['checkpoint'], 'ms')}",
    }


ALL: tuple[Callable[[dict[str, Path], int, Tell], dict[str, str]], ...] = (bare_qemu, libvirt, quicksand)
