"""What the host's tests share: a house in a temporary directory, with an image for the fake engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from posada.errors import NotFound
from posada.host.host import Host
from posada.model.machine import MachineSpec, make_spec
from posada.model.progress import Progress
from posada.model.records import ImageRecord

DIGEST = "a" * 64
IMAGE = "debian:12"
DISK_SIZE = 16 << 20


class Images:
    """An image store that has what is in the database and builds nothing."""

    def __init__(self, host: Host) -> None:
        self._db = host.db

    async def ensure(self, ref: str, progress: Progress) -> ImageRecord:
        progress(1.0, "here")
        for image in self._db.list_images():
            if ref in image.names or image.digest.startswith(ref):
                return image
        raise NotFound("image", ref)


async def open_host(base: Path) -> Host:
    host = await Host.open(base / "home", base / "run")
    host.house._images = Images(host)  # type: ignore[assignment]
    return host


def add_image(host: Host, *, agent: bool = True, digest: str = DIGEST, name: str = IMAGE) -> ImageRecord:
    """An image that only the fake engine would boot."""
    folder = host.paths.images / digest
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "disk.raw", "wb") as file:
        file.truncate(DISK_SIZE)
    (folder / "vmlinux").write_bytes(b"kernel")
    image = ImageRecord(
        digest=digest,
        names=(name,),
        path=f"images/{digest}",
        arch="x86_64",
        created=time.time(),
        disk="disk.raw",
        disk_size=DISK_SIZE,
        kernel="vmlinux",
        append="root=/dev/vda",
        agent=agent,
    )
    host.db.put_image(image)
    return image


def spec(**fields: Any) -> MachineSpec:
    return make_spec({"image": IMAGE, "engine": "fake", "memory": "64MiB", **fields})
