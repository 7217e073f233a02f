"""What an image holds. Its digest is the SHA-256 of the manifest's own bytes, and the manifest has the digest of every
file: so one number vouches for all of it. Names and dates are not content, and lie beside it in ``info.json``.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from posada.errors import ImageError
from posada.model.records import ImageRecord
from posada.storage import sparse

MANIFEST = "manifest.json"
INFO = "info.json"
MODULES = "modules.tar"
_MAX_JSON = 1 << 20
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: apparent size in bytes, and `posada.storage.sparse.digest`."""

    size: int
    digest: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of an image. The names of its parts are keys of ``files``."""

    version: int = 1
    arch: str
    files: dict[str, FileEntry]
    disk: str | None = None
    disk_format: str = "raw"
    kernel: str | None = None
    initrd: str | None = None
    modules: str | None = None
    """A tar of the modules the guest loads first, in order; the initramfs is made of it and the agent."""
    append: str = ""
    agent: bool = False

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1)


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """What is not content: enough to make the image's record again when the database is lost."""

    names: tuple[str, ...]
    created: float
    source: str


def digest_of(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()


def measure(
    folder: Path, names: list[str], *, stop: threading.Event, done: Callable[[int], None]
) -> dict[str, FileEntry]:
    """Hash files; ``done`` is told the offset reached in each. Blocks. Raises OSError, Stopped."""
    out = {}
    for name in sorted(names):
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            out[name] = FileEntry(size, sparse.digest(file.fileno(), stop=stop, done=done))
    return out


def load(folder: Path, digest: str) -> Manifest:
    """The manifest of a published image. Raises ImageError when it is missing, damaged, or not of that digest."""
    try:
        with open(folder / MANIFEST, "rb") as file:
            data = file.read(_MAX_JSON)
        if digest_of(data) != digest:
            raise ImageError(f"image {digest[:12]} is damaged: its manifest is not the one it was published with")
        manifest = msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise ImageError(f"image {digest[:12]} is damaged: {error.strerror}: {error.filename}") from error
    except msgspec.MsgspecError as error:
        raise ImageError(f"image {digest[:12]} has a manifest this posada does not read: {error}") from error
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise ImageError(f"image {digest[:12]} names a file {name!r}")
    return manifest


def load_info(folder: Path) -> Info:
    """Raises ImageError."""
    try:
        with open(folder / INFO, "rb") as file:
            return msgspec.json.decode(file.read(_MAX_JSON), type=Info)
    except (OSError, msgspec.MsgspecError) as error:
        raise ImageError(f"{folder / INFO} cannot be read: {error}") from error


def verify(folder: Path, digest: str, stop: threading.Event) -> None:
    """Hash every file again. Raises ImageError that names the first one that is missing or differs."""
    manifest = load(folder, digest)
    for name, entry in manifest.files.items():
        try:
            found = measure(folder, [name], stop=stop, done=lambda _: None)[name]
        except OSError as error:
            raise ImageError(f"image {digest[:12]} is damaged: {name}: {error.strerror}") from error
        if found != entry:
            raise ImageError(f"image {digest[:12]} is damaged: {name} is not as it was published")


def record(folder: Path, path: str, digest: str, manifest: Manifest, info: Info) -> ImageRecord:
    """The row of the database. ``path`` is the folder relative to the state directory."""
    disk = manifest.files.get(manifest.disk or "")
    return ImageRecord(
        digest=digest, names=info.names, path=path, arch=manifest.arch, created=info.created,
        disk=manifest.disk, disk_format=manifest.disk_format, disk_size=disk.size if disk else 0,
        kernel=manifest.kernel, initrd=manifest.initrd, append=manifest.append, agent=manifest.agent,
        size=sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder)), source=info.source,
    )  # fmt: skip
