"""Which QEMU, and which accelerator: found by measurement, remembered per boot and binary.

The answer costs 0.1 s, so it is kept in the runtime directory; a new boot, another QEMU or another uid asks again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from posada.engine.common import facts as common
from posada.engine.common.kvm import kvm_nests, kvm_rate
from posada.errors import HostError

BINARY = "qemu-system-x86_64"
MIN_VERSION = (7, 2)
_CACHE = "qemu-probe.json"


class Facts(common.Facts, frozen=True, kw_only=True):
    """What was measured of this host."""

    binary: str
    version: str
    accelerator: str
    """``kvm`` or ``tcg``."""
    kvm: str
    """Why KVM is used, or why not, in words."""
    kvm_rate: float = 0.0
    """Instructions per second at ring 0; 0 if not measured."""
    vsock: bool = False
    nested: bool = False
    """Guests can be given svm or vmx: TCG emulates svm, KVM passes the processor's on if its module was told to."""

    @property
    def file_uri(self) -> bool:
        """It reads migration streams from files by name (8.2)."""
        major, minor = self.version.split(".")[:2]
        return (int(major), int(minor)) >= (8, 2)

    @property
    def machine(self) -> str:
        """The versioned machine type: what a snapshot taken here needs elsewhere."""
        return "pc-i440fx-" + ".".join(self.version.split(".")[:2])


def facts(runtime: Path | None = None) -> Facts:
    """Measured, or remembered. Raises HostError when there is no usable QEMU."""
    binary = find_binary()
    key = _key(binary)
    cache = (runtime or common.default_runtime()) / _CACHE
    found = common.recall(cache, key, Facts)
    if found is None:
        found = _measure(binary, key)
        common.remember(cache, found)
    return found


def find_binary() -> str:
    """The path of QEMU: $POSADA_QEMU or what is on the PATH. Raises HostError."""
    wanted = os.environ.get("POSADA_QEMU") or BINARY
    path = shutil.which(wanted)
    if path is None:
        raise HostError(f"{wanted} is not installed", hint="install QEMU: apt install qemu-system-x86")
    return os.path.realpath(path)


def _key(binary: str) -> str:
    info = os.stat(binary)
    return f"2 {common.boot_id()} {binary} {info.st_mtime_ns} {info.st_size} {os.geteuid()}"


def _measure(binary: str, key: str) -> Facts:
    version = qemu_version(binary)
    rate, useful, words = kvm_rate()
    accelerator = "tcg"
    if useful:
        refused = _qemu_refuses_kvm(binary)
        if refused:
            words += f", but QEMU cannot use it: {refused}"
        else:
            accelerator = "kvm"
    vsock = os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)
    return Facts(
        key=key,
        binary=binary,
        version=version,
        accelerator=accelerator,
        kvm=words,
        kvm_rate=rate,
        vsock=vsock,
        nested=accelerator == "tcg" or kvm_nests(),
    )


def qemu_version(binary: str) -> str:
    """Such as ``7.2.22``. Raises HostError when it does not run or is too old."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{binary} does not run: {error}") from None
    match = re.search(r"version (\d+)\.(\d+)(\.\d+)?", done.stdout)
    if done.returncode or match is None:
        raise HostError(f"{binary} does not run: {(done.stderr or done.stdout).strip()[:300]}")
    if (int(match[1]), int(match[2])) < MIN_VERSION:
        raise HostError(f"{binary} is version {match[0][8:]}", hint="posada needs QEMU 7.2 or newer")
    return match[0].removeprefix("version ")


def _qemu_refuses_kvm(binary: str) -> str:
    """Its words when it cannot start a machine on KVM, else an empty string."""
    command = [binary, "-M", "pc", "-accel", "kvm", "-cpu", "host", "-m", "64", "-S"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    quit = '{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'
    try:
        done = subprocess.run(command, input=quit, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip()[-200:] or f"status {done.returncode}"
