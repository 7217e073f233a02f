"""Files in a guest."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from posada.client._core import Core
from posada.client._exec import as_async
from posada.client._runtime import AsyncRuntime
from posada.errors import GuestError

if TYPE_CHECKING:
    from posada.guest.client import GuestClient
    from posada.model.files import DirEntry, FileInfo, Transfer


class Files:
    """``vm.files``. Paths in the guest are absolute text; all of it runs as root there.

    Everything raises GuestError (its ``errno_name`` such as ``"ENOENT"``), GuestGone, and InvalidState unless the
    machine runs.
    """

    def __init__(self, rt: AsyncRuntime, core: Core, uuid: str) -> None:
        self._rt = rt
        self._vms = core.host.vms
        self._uuid = uuid

    async def _guest(self) -> GuestClient:
        return await self._rt.run(self._vms.guest(self._uuid))

    async def read_bytes(
        self, path: str, *, offset: int = 0, length: int | None = None, max_size: int = 64 << 20
    ) -> bytes:
        """A file, or ``length`` bytes of it from ``offset``. More than ``max_size`` bytes are refused (``EFBIG``)."""
        guest = await self._guest()
        return await self._rt.run(guest.read_file(path, offset=offset, length=length, max_size=max_size))

    async def read_text(self, path: str, *, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole file as text."""
        return (await self.read_bytes(path)).decode(encoding, errors)

    async def write(self, path: str, data: str | bytes, *, mode: int | None = None, parents: bool = False) -> None:
        """Write the whole file, atomically. ``mode`` such as 0o600; ``parents`` makes missing directories."""
        content = data.encode() if isinstance(data, str) else data
        await self._rt.run((await self._guest()).write_file(path, content, mode=mode, mkdir=parents))

    async def upload(self, local: Path | str, remote: str) -> Transfer:
        """Copy a file or a whole directory into the guest.

        ``remote`` is the path of the copy; if it is a directory there (or ends in ``/``), the copy goes into it.
        """
        return await self._rt.run((await self._guest()).upload(Path(local), remote))

    async def download(self, remote: str, local: Path | str) -> Transfer:
        """Copy a file or a whole directory out of the guest.

        ``local`` is the path of the copy; if it is a directory (or ends in ``/``), the copy goes into it. What a
        hostile guest could do harm with (devices, links that point out of the tree) is left out and named.
        """
        return await self._rt.run((await self._guest()).download(remote, local))

    async def list(self, path: str) -> builtins.list[DirEntry]:
        """What is in a directory, by name."""
        return await self._rt.run((await self._guest()).list_dir(path))

    async def stat(self, path: str) -> FileInfo:
        """Type, size, mode, owner and time of a file."""
        return await self._rt.run((await self._guest()).stat(path))

    async def exists(self, path: str) -> bool:
        """Whether there is something of that name."""
        try:
            await self.stat(path)
        except GuestError as error:
            if error.errno_name in ("ENOENT", "ENOTDIR"):
                return False
            raise
        return True

    async def mkdir(self, path: str, *, mode: int = 0o755, parents: bool = False) -> None:
        """Make a directory; with ``parents`` also what is missing above it, and it may be there already."""
        await self._rt.run((await self._guest()).mkdir(path, mode=mode, parents=parents))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or with ``recursive`` a directory and all that is in it."""
        await self._rt.run((await self._guest()).remove(path, recursive=recursive))

    async def read_tar(self, path: str) -> AsyncIterator[bytes]:
        """A file or a directory as a tar archive, in pieces. It is the guest's work: do not trust what is in it."""
        async for data in self._rt.iterate((await self._guest()).tar_out(path)):
            yield data

    async def write_tar(self, path: str, archive: Iterable[bytes] | AsyncIterable[bytes]) -> int:
        """Unpack a tar archive, given in pieces, into a directory (made if it is missing). Returns the bytes read."""
        return await self._rt.run((await self._guest()).tar_in(path, as_async(archive)))

    async def rename(self, old: str, new: str) -> None:
        """Move within the guest."""
        await self._rt.run((await self._guest()).rename(old, new))
