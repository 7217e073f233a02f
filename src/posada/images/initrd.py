"""The initramfs an image boots with today: its own modules, and the agent this posada carries.

The image keeps only the modules, so that a new agent needs no new image. What was made is kept beside the images, named
after the image and the agent's hash; making it takes some ten milliseconds, finding it again some ten microseconds.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from posada.errors import HostError, ImageError
from posada.images.initramfs import build_initramfs
from posada.storage.disks import disk_errors

FOLDER = ".initrd"
_MAX_AGENT = 64 << 20
_MAX_MODULES = 256 << 20
_STALE = 86400.0
"""Seconds without use after which an initramfs is removed: it is made again when it is wanted."""


def pack_modules(modules: Sequence[tuple[str, bytes]]) -> bytes:
    """Modules in load order as a tar that is the same every time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in modules:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def unpack_modules(path: Path) -> list[tuple[str, bytes]]:
    """Raises ImageError."""
    out = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.size <= _MAX_MODULES else None
                if file is None:
                    raise ImageError(f"{path} holds something that is not a module: {member.name!r}")
                out.append((member.name, file.read()))
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"{path} is damaged: {error}") from error
    return out


class InitrdCache:
    """``agent`` finds the agent's binary for an architecture. Not for several threads at once."""

    def __init__(self, root: Path, agent: Callable[[str], Path]) -> None:
        self._folder = root / FOLDER
        self._find = agent
        self._agents: dict[str, Path] = {}
        self._keys: dict[tuple[str, int, int, int], str] = {}

    def get(self, digest: str, modules: Path, arch: str) -> Path:
        """The initramfs of the image with that digest and modules archive. Raises HostError, ImageError."""
        agent = self._agents.get(arch)
        if agent is None:
            agent = self._agents[arch] = self._find(arch)
        path = self._folder / f"{digest[:32]}-{self._key(agent)}"
        try:
            os.utime(path)  # it is in use: `collect` goes by this
        except FileNotFoundError:
            self._make(path, agent, modules)
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        return path

    def _key(self, agent: Path) -> str:
        with disk_errors(agent):
            info = os.stat(agent)
        seen = (str(agent), info.st_ino, info.st_size, info.st_mtime_ns)
        key = self._keys.get(seen)
        if key is None:
            key = self._keys[seen] = hashlib.sha256(_read_agent(agent)).hexdigest()[:16]
        return key

    def _make(self, path: Path, agent: Path, modules: Path) -> None:
        data = build_initramfs(_read_agent(agent), unpack_modules(modules))
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with disk_errors(partial):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with open(partial, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(partial, 0o444)
                os.rename(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def collect(self, digests: Sequence[str]) -> list[str]:
        """Remove those of images that are gone, and those not used for a day (another agent's). Returns their names."""
        removed = []
        known = {digest[:32] for digest in digests}
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            digest = path.name.partition("-")[0]
            try:
                fresh = time.time() - path.stat().st_mtime < _STALE
                if fresh and (digest in known or digest.startswith(".")):
                    continue
                path.unlink()
            except FileNotFoundError:
                continue
            removed.append(path.name)
        return removed


def _read_agent(path: Path) -> bytes:
    with disk_errors(path), open(path, "rb") as file:
        data = file.read(_MAX_AGENT + 1)
    if data[:4] != b"\x7fELF" or len(data) > _MAX_AGENT:
        raise HostError(f"{path} is not the agent's binary", hint="install posada again")
    return data
