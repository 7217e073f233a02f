"""``posada doctor``: what this host has and what it lacks, measured, each with what to do about it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from posada.engine import registry
from posada.errors import PosadaError
from posada.host.paths import Paths
from posada.model.units import GIB, MIB, format_size


class Check(msgspec.Struct, frozen=True):
    """One line. ``ok``: True, False, or None for something that only narrows what works."""

    name: str
    ok: bool | None
    detail: str
    hint: str | None = None


def examine(paths: Paths) -> list[Check]:
    """All checks. Never raises; a check that itself fails says so."""
    found: list[Check] = []
    for name, check in _CHECKS.items():
        try:
            found += check(paths)
        except (OSError, ValueError, PosadaError) as error:
            found.append(Check(name, None, f"could not be checked: {error}"))
    return found


def _python(paths: Paths) -> Iterator[Check]:
    version = platform.python_version()
    yield Check(
        "python", sys.version_info >= (3, 11), version, None if sys.version_info >= (3, 11) else "use 3.11 or newer"
    )


def _kernel(paths: Paths) -> Iterator[Check]:
    kernel = platform.release()
    new_enough = tuple(int(n) for n in kernel.split("-")[0].split(".")[:2]) >= (5, 10)
    yield Check("kernel", platform.system() == "Linux" and new_enough, f"{kernel} on {platform.machine()}")


def _state(paths: Paths) -> Iterator[Check]:
    writable = os.access(paths.home, os.W_OK | os.X_OK)
    yield Check(
        "state directory",
        writable,
        f"{paths.home} on {_file_system(paths.home)}",
        None if writable else "set POSADA_HOME to a directory of your own",
    )
    stat = os.statvfs(paths.home)
    free = stat.f_bavail * stat.f_frsize
    yield Check(
        "disk space",
        free >= 2 * GIB or (None if free >= 512 * MIB else False),
        f"{format_size(free)} free for images and disks",
        None if free >= 2 * GIB else "an image needs about 1GiB while it is built",
    )


def _runtime(paths: Paths) -> Iterator[Check]:
    kind = _file_system(paths.runtime)
    fast = kind in ("tmpfs", "ramfs")
    yield Check(
        "runtime directory",
        True if fast else None,
        f"{paths.runtime} on {kind}",
        None if fast else "a tmpfs is faster and is empty after a reboot",
    )


def _engines(paths: Paths) -> Iterator[Check]:
    probes = [registry.probe(name) for name in registry.AUTOMATIC if name in registry.names()]
    enough = any(probe.ok for probe in probes)
    for probe in probes:
        # One is enough; what the others lack only narrows what works.
        yield Check(f"engine {probe.engine}", True if probe.ok else None if enough else False, probe.detail, probe.hint)


def _tools(paths: Paths) -> Iterator[Check]:
    for tool, package, why in (
        ("qemu-img", "qemu-utils", "importing and resizing disks"),
        ("mmdebstrap", "mmdebstrap", "building Debian images"),
        ("mke2fs", "e2fsprogs", "building Debian images"),
        ("passt", "passt", "networks of machines of the kvm engine"),
    ):
        path = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        yield Check(
            tool,
            True if path else None,
            path or f"missing; it is for {why}",
            None if path else f"apt install {package}",
        )


def _memory(paths: Paths) -> Iterator[Check]:
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    enough = available >= GIB
    yield Check(
        "memory",
        True if enough else None,
        f"{format_size(available)} available of {format_size(int(facts['MemTotal'].split()[0]) * 1024)}",
        None if enough else "give machines less: --memory 256MiB",
    )
    memfd = hasattr(os, "memfd_create")
    yield Check("memfd", memfd, "memory can be shared copy-on-write" if memfd else "missing: no snapshots, no forks")


def _cgroups(paths: Paths) -> Iterator[Check]:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if controllers.exists():
        writable = os.access("/sys/fs/cgroup", os.W_OK)
        yield Check(
            "cgroups", True if writable else None, f"v2: {controllers.read_text('ascii').strip() or 'no controllers'}"
        )
    elif Path("/sys/fs/cgroup/memory").is_dir():
        writable = os.access("/sys/fs/cgroup/memory", os.W_OK)
        yield Check("cgroups", True if writable else None, "v1")
    else:
        yield Check(
            "cgroups", None, "none: machines are not limited in what they use", "mount cgroup2 on /sys/fs/cgroup"
        )


def _devices(paths: Paths) -> Iterator[Check]:
    for device, what, hint in (
        ("/dev/net/tun", "bridged networks", "user-mode networking works without it"),
        ("/dev/vhost-vsock", "vsock", "machines work without it"),
    ):
        there = os.access(device, os.R_OK | os.W_OK)
        yield Check(
            device, True if there else None, f"{'usable' if there else 'not usable'}: {what}", None if there else hint
        )


def _limits(paths: Paths) -> Iterator[Check]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files >= 1024 or files == resource.RLIM_INFINITY
    yield Check("open files", True if enough else None, f"{files}", None if enough else "raise it: ulimit -n 4096")
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    enough = processes >= 512 or processes == resource.RLIM_INFINITY
    text = "unlimited" if processes == resource.RLIM_INFINITY else str(processes)
    yield Check("processes", True if enough else None, text, None if enough else "raise it: ulimit -u 4096")


def _file_system(path: Path) -> str:
    """The type of the file system it is on, by the longest mount point above it (proc(5), mountinfo)."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4]
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


_CHECKS: dict[str, Callable[[Paths], Iterator[Check]]] = {
    "python": _python,
    "kernel": _kernel,
    "state directory": _state,
    "runtime directory": _runtime,
    "engines": _engines,
    "tools": _tools,
    "memory": _memory,
    "cgroups": _cgroups,
    "devices": _devices,
    "limits": _limits,
}
