"""Compressed clusters: read only. What is written to one goes to a new, plain cluster."""

from __future__ import annotations

import importlib
import zlib
from typing import Any

from posada.errors import ImageError
from posada.vmm.block.qcow2.image import Image

_ZSTD = 1


class Compressed:
    """Decompresses clusters; remembers the last one, as readers come back for its other parts."""

    def __init__(self, image: Image) -> None:
        """Raises ImageError: this Python cannot decompress it."""
        self._image = image
        self._zstd: Any = None
        if image.info.compression == _ZSTD:
            try:
                self._zstd = importlib.import_module("compression.zstd")  # now: later the jail has no files
            except ImportError:
                hint = "qemu-img convert can rewrite it; Python 3.14 can read it"
                raise ImageError("it is compressed with zstd", hint=hint) from None
        self._last: tuple[int, bytes] = (0, b"")

    def place(self, entry: int) -> tuple[int, int]:
        """Where the data is, and how long at most: offset in bytes (not aligned), bytes up to the end of a sector."""
        bits = 62 - (self._image.cluster_bits - 8)
        at = entry & (1 << bits) - 1
        sectors = (entry & (1 << 62) - 1) >> bits
        return at, (sectors + 1) * 512 - at % 512

    def read(self, entry: int) -> bytes:
        """The content of a cluster. Raises ImageError for data that is not that of one whole cluster."""
        if self._last[0] == entry:
            return self._last[1]
        at, length = self.place(entry)
        if at >= self._image.end:
            self._image.corrupt(f"compressed data at {at:#x} lies outside the file")
        out = self._decompress(bytes(self._image.file.read(at, length)))
        if len(out) != self._image.cluster:
            raise ImageError(f"the compressed data at {at:#x} is damaged")
        self._last = (entry, out)
        return out

    def _decompress(self, data: bytes) -> bytes:
        """At most a cluster, whatever the data claims; less if it is damaged."""
        try:
            if self._zstd is not None:
                return bytes(self._zstd.ZstdDecompressor().decompress(data, self._image.cluster))
            return zlib.decompressobj(-15).decompress(data, self._image.cluster)
        except (zlib.error, ValueError, EOFError, OSError):
            return b""
        except Exception as error:  # ZstdError has no common base with the others
            if self._zstd is None:
                raise
            raise ImageError(f"compressed data is damaged: {error}") from error
