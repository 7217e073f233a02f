"""The images of this host: content-addressed, verified, immutable, and never half there.

A directory a digest, below ``root``; a row an image, in the database. A build or an import works in a directory aside
(`posada.images.partial`) and is published by one rename; the row follows. Whatever a crash leaves between the two,
`ImageStore.collect_garbage` puts right: it is called when the state is opened, and never touches what is worked on.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec

from posada.errors import ImageError, InUse, NotFound, PosadaError, SpecError
from posada.images import manifest as manifests
from posada.images import names, partial
from posada.images.contents import fill_debian, fill_imported
from posada.images.debian import ARCHES, check_packages, suite_of
from posada.images.initrd import InitrdCache
from posada.model.progress import Progress, quiet
from posada.model.records import ImageRecord
from posada.storage.disks import disk_errors, export_disk, in_thread


class ImageDb(Protocol):
    """Where records are kept. Called in the event loop's thread."""

    def list_images(self) -> list[ImageRecord]: ...
    def put_image(self, image: ImageRecord, /) -> None: ...
    def drop_image(self, digest: str, /) -> None: ...


def packaged_agent(arch: str) -> Path:
    """The agent this posada carries. Raises HostError."""
    from posada.guest.binary import agent_binary

    return agent_binary(arch)


class ImageStore:
    """All verbs on images. Opening it costs nothing; several processes may use one ``root`` and database at once."""

    def __init__(self, root: Path, db: ImageDb, *, agent: Callable[[str], Path] = packaged_agent) -> None:
        self.root = root
        self._db = db
        self._initrds = InitrdCache(root, agent)

    # looking

    def list(self) -> list[ImageRecord]:
        """Newest first."""
        return sorted(self._db.list_images(), key=lambda image: image.created, reverse=True)

    def resolve(self, ref: str) -> ImageRecord | None:
        """By ``name:tag``, by name (``latest``, else the highest tag), by digest or six or more digits of it."""
        return names.find(ref, self._db.list_images())

    def folder(self, image: ImageRecord) -> Path:
        return self.root / image.digest

    def initrd_for(self, image: ImageRecord) -> Path | None:
        """What to boot the image's kernel with: its own initrd, or one made of its modules and this posada's agent.

        Tens of microseconds once it has been made. Raises HostError, ImageError.
        """
        if not image.agent:
            return self.folder(image) / image.initrd if image.initrd else None
        return self._initrds.get(image.digest, self.folder(image) / manifests.MODULES, image.arch)

    async def verify(self, image: ImageRecord) -> None:
        """Hash every file again; about a second for each gigabyte of data. Raises ImageError naming what is damaged."""
        await in_thread(lambda stop: manifests.verify(self.folder(image), image.digest, stop))

    # making

    async def ensure(self, ref: str, progress: Progress = quiet) -> ImageRecord:
        """The image; built first if it is one posada can build and is not there. Raises NotFound, and as `build`."""
        found = self.resolve(ref)
        if found is not None:
            return found
        name, tag = names.parse(ref)
        if name != "debian":
            raise NotFound("image", ref, hint="posada image ls lists them; posada image import makes one of a disk")
        ref = f"debian:{tag or DEFAULT_DEBIAN}"
        async with self._building(ref, progress):
            # Another process may have built it while this one waited.
            return self.resolve(ref) or await self._build(ref, (), None, "x86_64", ref, progress)

    async def build(
        self,
        ref: str,
        *,
        packages: Sequence[str] = (),
        size: int | None = None,
        arch: str = "x86_64",
        name: str | None = None,
        progress: Progress = quiet,
    ) -> ImageRecord:
        """Build ``debian:RELEASE`` from the mirror this machine uses, with extra packages.

        It is called ``name`` (default: ``ref``); an image that was called so keeps its digest and loses the name.
        ``size`` of the root disk in bytes (default 10 GiB, sparse). Raises SpecError, HostError (a tool is missing, no
        space, the mirror does not answer), ImageError. On failure nothing is left.
        """
        distribution, tag = names.parse(ref)
        if distribution != "debian":
            raise SpecError("image", f"posada cannot build {ref}", hint="it builds debian:12 and other Debian releases")
        if arch not in ARCHES:
            raise SpecError("arch", f"{arch!r} is not known", hint=f"use {' or '.join(ARCHES)}")
        check_packages(packages)
        ref = f"debian:{tag or DEFAULT_DEBIAN}"
        suite_of(tag or DEFAULT_DEBIAN)
        async with self._building(ref, progress):
            return await self._build(ref, packages, size, arch, names.full_name(name) if name else ref, progress)

    async def _build(
        self, ref: str, packages: Sequence[str], size: int | None, arch: str, name: str, progress: Progress
    ) -> ImageRecord:
        suite = suite_of(ref.partition(":")[2])
        source = " + ".join([ref, *packages])

        async def fill(made: partial.Partial) -> manifests.Manifest:
            return await fill_debian(made, suite, packages=packages, size=size, arch=arch, progress=progress)

        image = await self._make(name, source, fill)
        with suppress(PosadaError):  # the first start will say what is wrong with the agent
            self.initrd_for(image)
        return image

    async def import_disk(
        self,
        disk: Path | None,
        *,
        kernel: Path | None = None,
        initrd: Path | None = None,
        append: str = "",
        name: str,
        progress: Progress = quiet,
    ) -> ImageRecord:
        """An image from a qcow2 or raw disk, from a kernel with or without initrd, or from all three.

        Raises ImageError (refused, and why), SpecError, HostError. On failure nothing is left.
        """
        full = names.full_name(name)
        source = ", ".join(str(path) for path in (disk, kernel, initrd) if path is not None)

        async def fill(made: partial.Partial) -> manifests.Manifest:
            return await fill_imported(made, disk=disk, kernel=kernel, initrd=initrd, append=append, progress=progress)

        return await self._make(full, source, fill)

    async def _make(
        self, name: str, source: str, fill: Callable[[partial.Partial], Awaitable[manifests.Manifest]]
    ) -> ImageRecord:
        """Fill a directory, publish it, put its record in the database under ``name``."""
        with disk_errors(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = partial.Partial(self.root)
        try:
            encoded = (await fill(made)).encode()
            digest = manifests.digest_of(encoded)
            info = manifests.Info(names=(name,), created=time.time(), source=source)

            def publish(_: object) -> None:
                with disk_errors(made.path):
                    (made.path / manifests.MANIFEST).write_bytes(encoded)
                    (made.path / manifests.INFO).write_bytes(msgspec.json.encode(info))
                made.publish(digest)

            await in_thread(publish)
            return self._enter(digest, info)
        finally:
            await in_thread(lambda _: made.close())

    def _enter(self, digest: str, info: manifests.Info) -> ImageRecord:
        """Put a published image into the database; its names are taken from whatever had them."""
        before = self._db.list_images()
        same = next((image for image in before if image.digest == digest), None)
        folder = self.root / digest
        record = manifests.record(
            folder, f"{self.root.name}/{digest}", digest, manifests.load(folder, digest), info
        )  # fmt: skip
        if same is not None:
            record = msgspec.structs.replace(record, names=tuple(dict.fromkeys((*same.names, *info.names))))
        # The new one first: a name two images have for a moment means the newer one; a name that none has is lost.
        self._db.put_image(record)
        for image in before:
            if image.digest != digest and set(image.names) & set(info.names):
                left = tuple(name for name in image.names if name not in info.names)
                self._db.put_image(msgspec.structs.replace(image, names=left))
        return record

    @asynccontextmanager
    async def _building(self, ref: str, progress: Progress) -> AsyncIterator[None]:
        """One build of a release at a time, whichever process does it."""
        with disk_errors(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.root / f".build-{ref.replace(':', '-')}.lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # flock cannot be waited for and cancelled; a build takes 20 s, so a look now and then will do.
                    progress(None, "waiting for another build of it")
                    await asyncio.sleep(0.2)
            yield
        finally:
            os.close(fd)

    # taking away, giving out

    async def remove(self, ref: str, *, users: Callable[[str], Sequence[str]] | None = None) -> None:
        """Remove an image; by one name of several, only that name. Raises NotFound; InUse, if ``users`` names any."""
        image = self.resolve(ref)
        if image is None:
            raise NotFound("image", ref, hint="posada image ls lists them")
        if len(image.names) > 1 and ref in image.names:
            left = tuple(name for name in image.names if name != ref)
            self._db.put_image(msgspec.structs.replace(image, names=left))
            return
        in_use = users(image.digest) if users is not None else ()
        if in_use:
            raise InUse("image", ref, in_use, hint="delete those machines first")
        # Out of sight first: the collector drops a record without a directory, but brings back one without a record.
        trash = partial.move_to_trash(self.root, image.digest) if self.folder(image).is_dir() else None
        self._db.drop_image(image.digest)
        if trash is not None:
            await in_thread(lambda _: partial.remove_tree(trash))
        self._initrds.collect([image.digest for image in self._db.list_images()])

    async def export(self, ref: str, target: Path, format: str = "qcow2", *, progress: Progress = quiet) -> None:
        """Write an image's disk to a new file. Raises NotFound, AlreadyExists, ImageError (no disk), HostError."""
        image = self.resolve(ref)
        if image is None:
            raise NotFound("image", ref, hint="posada image ls lists them")
        if image.disk is None:
            raise ImageError(f"image {ref} has no disk to export")
        await export_disk(self.folder(image) / image.disk, target, format=format, progress=progress)

    def collect_garbage(self) -> Sequence[str]:
        """Put right what crashes left; returns what was done, in words. Milliseconds when there is nothing to do.

        Half-made directories whose maker is dead go; a published image without a record gets it back, unless it is
        damaged (then it stays, and is named: a machine may stand on it); a record without a directory goes. Raises
        HostError when something cannot be removed.
        """
        if not self.root.is_dir():
            return []
        done = []
        for path in partial.abandoned(self.root):
            partial.remove_tree(path)
            done.append(f"removed an unfinished image ({path.name})")
        records = {image.digest: image for image in self._db.list_images()}
        with partial.store_lock(self.root):
            present = {entry.name for entry in os.scandir(self.root) if len(entry.name) == 64 and entry.is_dir()}
        for digest in present - records.keys():
            try:
                self._enter(digest, manifests.load_info(self.root / digest))
                done.append(f"found image {digest[:12]} again")
            except ImageError as error:
                done.append(f"left an image alone: {error.message}")
        for digest in records.keys() - present:
            self._db.drop_image(digest)
            done.append(f"dropped the record of image {digest[:12]}, whose files are gone")
        return [*done, *(f"removed initramfs {name}" for name in self._initrds.collect(list(present)))]


#: What ``debian`` without a tag means when none has been built.
DEFAULT_DEBIAN = "12"
