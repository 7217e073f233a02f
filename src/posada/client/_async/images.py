"""Images: what machines are made from."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posada.client._core import Core
from posada.client._images import image_users
from posada.client._runtime import AsyncRuntime
from posada.errors import NotFound
from posada.model.progress import quiet
from posada.model.records import ImageRecord
from posada.model.units import parse_size

if TYPE_CHECKING:
    from posada.images.store import ImageStore
    from posada.model.progress import Progress


class Image:
    """A read-only source of machines, addressed by digest, named ``name:tag``."""

    def __init__(self, rt: AsyncRuntime, core: Core, record: ImageRecord) -> None:
        self._rt = rt
        self._core = core
        self.record = record
        """The whole record as it was read."""

    def __repr__(self) -> str:
        return f"<posada.Image {self.name!r} {self.digest[:12]}>"

    @property
    def digest(self) -> str:
        """Its identity: a SHA-256 over what it holds, in hex."""
        return self.record.digest

    @property
    def name(self) -> str:
        """Its first name, or its digest when it has none."""
        return self.record.names[0] if self.record.names else self.record.digest[:12]

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return self.record.names

    @property
    def size(self) -> int:
        """What it takes on this host, in bytes."""
        return self.record.size

    @property
    def agent(self) -> bool:
        """Whether posada's agent is in it, so that exec, files and fork's new identities work."""
        return self.record.agent

    async def remove(self) -> None:
        """Remove it. Raises InUse, which names the machines that stand on it."""
        users = image_users(self._core.host)
        await self._rt.run(self._core.host.images.remove(self.digest, users=users))

    async def export(self, target: Path | str, *, format: str = "qcow2") -> Path:
        """Write its disk to ``target`` as ``qcow2`` or ``raw``. Returns the path. Raises HostError, ImageError."""
        path = Path(target)
        await self._rt.run(self._core.host.images.export(self.digest, path, format))
        return path


class Images:
    """``host.images``: list, find, build and import images."""

    def __init__(self, rt: AsyncRuntime, core: Core) -> None:
        self._rt = rt
        self._core = core

    @property
    def _store(self) -> ImageStore:
        return self._core.host.images

    async def list(self) -> builtins.list[Image]:
        """All images of this host."""
        return [Image(self._rt, self._core, record) for record in self._rt.now(self._store.list)]

    async def get(self, ref: str) -> Image:
        """The image of that name (``debian:12``; ``debian`` is its highest tag) or digest (6 digits or more).

        Raises NotFound.
        """
        record = self._rt.now(self._store.resolve, ref)
        if record is None:
            raise NotFound("image", ref, hint="posada image ls lists them; posada image build debian:12 builds one")
        return Image(self._rt, self._core, record)

    async def build(
        self,
        ref: str,
        *,
        packages: Sequence[str] = (),
        size: int | str | None = None,
        arch: str = "x86_64",
        name: str | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Build an image such as ``debian:12`` from the distribution's packages, with extra ``packages``.

        It is called ``name`` (default: ``ref``); an image that was called so loses the name. ``size`` of its file
        system (text or bytes) is what it needs and some room unless given. Raises HostError (a tool is missing; no
        space), ImageError.
        """
        length = None if size is None else parse_size(size)
        record = await self._rt.run(
            self._store.build(ref, packages=tuple(packages), size=length, arch=arch, name=name, progress=progress or quiet)
        )
        return Image(self._rt, self._core, record)

    async def import_disk(
        self,
        disk: Path | str | None = None,
        *,
        name: str,
        kernel: Path | str | None = None,
        initrd: Path | str | None = None,
        append: str = "",
        progress: Progress | None = None,
    ) -> Image:
        """Make an image ``name`` (``name:tag``) from a qcow2 or raw disk, a kernel and initrd, or all three.

        Raises ImageError for a disk that is corrupt, lies about itself or names a backing file.
        """
        record = await self._rt.run(
            self._store.import_disk(
                Path(disk) if disk else None,
                kernel=Path(kernel) if kernel else None,
                initrd=Path(initrd) if initrd else None,
                append=append,
                name=name,
                progress=progress or quiet,
            )
        )
        return Image(self._rt, self._core, record)
