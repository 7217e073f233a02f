"""Build a Debian root file system, as a disk, from the mirror this machine is configured for.

mmdebstrap makes the tree in a namespace of its own (root's, or an unprivileged user's), and its last hook, still inside
that namespace, turns the tree into an ext4 file: no loop device, no privilege, and the owners are right. The kernel's
package is unpacked, not installed: its dependencies (initramfs-tools and what that pulls in) are of no use to a guest
that boots posada's initramfs.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import subprocess
import uuid
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import msgspec

from posada.errors import HostError, ImageError, SpecError
from posada.images import sources
from posada.model.progress import Progress
from posada.model.units import GIB, format_size
from posada.storage.tools import ToolFailed, find_tool, run_tool

#: Beyond ``minbase`` (what is Essential or required, and apt): what commands run in a guest take for granted.
#: kmod: modprobe for everything the kernel offers. procps: ps, sysctl. netbase: /etc/protocols, /etc/services.
PACKAGES = ("ca-certificates", "iproute2", "kmod", "netbase", "procps")

DEFAULT_SIZE = 10 * GIB
MIN_SIZE, MAX_SIZE = GIB, 16 * 1024 * GIB
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]+)?")
_NAMESPACE = uuid.UUID("b1a7a3de-6f0c-5c62-9d3e-0f6a4f1e7c11")

#: What mmdebstrap says it is at (its ``I:`` lines) → how far that is, and what people read.
_STAGES = (
    ("running apt-get update", 0.02, "reading the package lists"),
    ("downloading packages", 0.15, "downloading packages"),
    ("extracting archives", 0.25, "unpacking the base system"),
    ("installing essential", 0.32, "installing the base system"),
    ("installing remaining", 0.45, "installing packages"),
    ("posada: kernel", 0.72, "downloading the kernel"),
    ("posada: modules", 0.80, "unpacking the kernel"),
    ("posada: disk", 0.88, "writing the disk"),
)


class DebianFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where `build_debian` puts what it makes; the files are created, or written over."""

    disk: Path
    kernel: Path
    """The bzImage (or arm64 Image) as it is in the package."""
    modules: Path
    """A tar of ``/lib/modules/VERSION``."""


def suite_of(tag: str) -> str:
    """``12`` → ``bookworm``. Raises SpecError for a tag that is no Debian release known here."""
    try:
        return sources.SUITES[tag]
    except KeyError:
        known = ", ".join(t for t in sources.SUITES if t.isdigit())
        problem = f"debian:{tag} is not a release posada can build"
        raise SpecError("image", problem, hint=f"use one of {known} or sid") from None


def check_packages(packages: Sequence[str]) -> tuple[str, ...]:
    """Raises SpecError for what is not the name of a package (and might be an option to apt)."""
    for i, name in enumerate(packages):
        if not _PACKAGE.fullmatch(name):
            raise SpecError(f"packages[{i}]", f"{name!r} is not the name of a Debian package")
    return tuple(packages)


async def build_debian(
    suite: str,
    files: DebianFiles,
    *,
    scratch: Path,
    packages: Sequence[str] = (),
    size: int = DEFAULT_SIZE,
    arch: str = "x86_64",
    etc_apt: Path = Path("/etc/apt"),
    progress: Progress,
) -> None:
    """Make the disk (sparse raw, one ext4 of ``size`` bytes), the kernel and its modules.

    ``scratch`` is a directory for the tree that is being installed; other users must be able to reach it when this is
    not run by root. Takes 15–25 s. On failure or cancellation the files are rubbish and the scratch directory is empty.
    Raises HostError (a tool is missing, no space, the mirror does not answer), ImageError, SpecError.
    """
    check_packages(packages)
    if not MIN_SIZE <= size <= MAX_SIZE or size % 4096:
        limits = f"{format_size(MIN_SIZE)} to {format_size(MAX_SIZE)}"
        raise SpecError("size", f"{size} is not a size for a root disk", hint=f"use {limits}, in multiples of 4096")
    _check_host()
    configured = sources.read_sources(etc_apt)
    options = sources.apt_options(_apt_config())
    listed = scratch / "sources.list"
    listed.write_text(sources.to_one_line(sources.sources_for(suite, configured)))
    chosen = list(dict.fromkeys((*PACKAGES, *packages)))
    with _Outputs(files, size) as (disk, kernel, modules):
        settings = {
            "POSADA_DISK": f"/proc/self/fd/{disk}",
            "POSADA_KERNEL": f"/proc/self/fd/{kernel}",
            "POSADA_MODULES": f"/proc/self/fd/{modules}",
            "POSADA_KERNEL_PACKAGE": f"linux-image-cloud-{ARCHES[arch]}",
            "POSADA_UUID": str(uuid.uuid5(_NAMESPACE, " ".join([suite, arch, *chosen]))),
            "POSADA_MKE2FS": find_tool("mke2fs", "e2fsprogs"),
            "POSADA_APT_CONF": sources.for_guest(options),
            "POSADA_PROPAGATION": _propagation(),
            "TMPDIR": str(scratch),
        }
        hook = scratch / "hook.sh"
        hook.write_text(resources.files("posada.images").joinpath("debian-hook.sh").read_text())
        # Otherwise a name that is wrong would be found out only once the base system has been installed.
        simulate = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -s -qq install {shlex.join(chosen)} >/dev/null'
        checks = [simulate] if packages else []
        argv = [
            *_own_mounts(), "mmdebstrap", "--variant=minbase", "--format=null", f"--architectures={ARCHES[arch]}",
            f"--include={','.join(chosen)}",
            "--skip=cleanup/apt,cleanup/mmdebstrap,cleanup/reproducible,cleanup/run,cleanup/tmp",
            *(f"--aptopt={line}" for line in options),
            *(f"--extract-hook={check}" for check in checks),
            f"--customize-hook=sh {shlex.quote(str(hook))} \"$1\"", suite, "-", str(listed),
        ]  # fmt: skip
        try:
            await run_tool(
                argv, package="mmdebstrap", pass_fds=(disk, kernel, modules), env=settings, on_line=_watch(progress)
            )
        except ToolFailed as error:
            raise _explain(error) from error


def _own_mounts() -> tuple[str, ...]:
    """How root starts mmdebstrap, which mounts proc, sys and dev below the tree: in a namespace of their own, where they
    are gone with it, however it dies, and nobody who removes the tree can walk into them.

    Where root may not make one (a container), mmdebstrap cannot mount either, and does without. Other users' builds
    always have a namespace of their own.
    """
    if os.geteuid() != 0:
        return ()
    command = (find_tool("unshare", "util-linux"), "--mount", f"--propagation={_propagation()}")
    return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else ()


def _propagation() -> str:
    """``private``; ``unchanged`` in a chroot whose root is a mere directory, which has no propagation to change."""
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return "private" if any(line.split()[4] == "/" for line in mounts) else "unchanged"


class _Outputs:
    """The files the hook writes to, open: in its namespace the user's directories may be out of reach."""

    def __init__(self, files: DebianFiles, size: int) -> None:
        self._files, self._size, self._fds = files, size, [-1, -1, -1]

    def __enter__(self) -> list[int]:
        paths = (self._files.disk, self._files.kernel, self._files.modules)
        for i, path in enumerate(paths):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            # High numbers: mmdebstrap uses the lowest free ones in shell redirections, where dash knows but one digit.
            self._fds[i] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100)
            os.close(fd)
        for fd in self._fds:
            os.fchmod(fd, 0o666)  # opened anew through /proc by the namespace's root, who is another user to the host
        os.ftruncate(self._fds[0], self._size)
        return self._fds

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds:
            os.fchmod(fd, 0o600)
            os.close(fd)


def _watch(progress: Progress) -> Callable[[str], None]:
    def line(text: str) -> None:
        for mark, fraction, message in _STAGES:
            if text.startswith(f"I: {mark}"):
                progress(fraction, message)
                return

    return line


def _check_host() -> None:
    find_tool("mmdebstrap", "mmdebstrap")
    find_tool("mke2fs", "e2fsprogs")
    if not sources.KEYRING.exists():
        raise HostError(f"{sources.KEYRING} is missing", hint="install it with: apt install debian-archive-keyring")
    if os.geteuid() != 0:
        find_tool("newuidmap", "uidmap")


def _apt_config() -> str:
    done = subprocess.run([find_tool("apt-config", "apt"), "dump"], capture_output=True, text=True, check=False)
    return done.stdout


def _explain(error: ToolFailed) -> Exception:
    """mmdebstrap's failure in words a user can act on."""
    output = error.output
    missing = re.search(r"Unable to locate package (\S+)", output)
    if missing:
        return SpecError("packages", f"there is no package {missing[1]} in this release")
    if "Could not allocate block" in output or "Could not allocate inode" in output:
        return SpecError("size", "is too small for what was installed", hint="ask for a larger disk")
    if re.search(r"Temporary failure resolving|Could not connect|Failed to fetch|Cannot initiate the conn", output):
        first = next((line for line in output.splitlines() if line.startswith(("E:", "Err:"))), "")
        return HostError(f"the Debian mirror does not answer: {first}", hint="check the network and apt's sources")
    if "unable to pick chroot mode" in output:
        hint = "allow this user unprivileged user namespaces, or build as root"
        return HostError("namespaces are not permitted here, and building an image needs them", hint=hint)
    if "/etc/subuid" in output or "newuidmap" in output:
        add = "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"
        return HostError("this user has no range of subordinate user ids", hint=f"as root: {add}")
    said = [line for line in output.splitlines() if line.strip() and not line.startswith(("I:", "W:"))]
    return ImageError(f"mmdebstrap failed: {'; '.join(said[-4:])}")
