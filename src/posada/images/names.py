"""What images are called: ``name:tag``, a bare name, or a digest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from posada.errors import SpecError
from posada.images.sources import SUITES
from posada.model.records import ImageRecord

_NAME = r"[a-z0-9]+(?:[._/-][a-z0-9]+)*"
_REF = re.compile(rf"({_NAME})(?::([A-Za-z0-9_][A-Za-z0-9._-]{{0,63}}))?")
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})")

DEFAULT_TAG = "latest"


def parse(ref: str) -> tuple[str, str | None]:
    """(name, tag or None). Debian's code names are read as numbers: ``bookworm`` is ``12``. Raises SpecError."""
    match = _REF.fullmatch(ref) if len(ref) <= 128 else None
    if match is None:
        raise SpecError("image", f"{ref!r} is not the name of an image", hint="write it like debian:12")
    name, tag = match[1], match[2]
    if name == "debian" and tag is not None and not tag.isdigit():
        suite = SUITES.get(tag, tag)
        tag = next((number for number, known in SUITES.items() if number.isdigit() and known == suite), suite)
    return name, tag


def full_name(ref: str) -> str:
    """``name:tag``, with ``latest`` for a tag that is missing. Raises SpecError."""
    name, tag = parse(ref)
    return f"{name}:{tag or DEFAULT_TAG}"


def find(ref: str, images: Sequence[ImageRecord]) -> ImageRecord | None:
    """The image a reference means: by its name and tag; by name alone (``latest``, else the highest tag); by digest or
    at least six digits of it, if no other begins so. Of two with one name, the newer.
    """
    newest_first = sorted(images, key=lambda image: image.created, reverse=True)
    try:
        name, tag = parse(ref)
    except SpecError:
        name, tag = "", None
    named = [(full, image) for image in newest_first for full in image.names if full.rpartition(":")[0] == name]
    if tag is None and named:
        return max(named, key=lambda item: _rank(item[0].rpartition(":")[2]))[1]
    for full, image in named:
        if full == f"{name}:{tag}":
            return image
    digest = _DIGEST.fullmatch(ref)
    if digest is None:
        return None
    found = [image for image in images if image.digest.startswith(digest[1])]
    return found[0] if len(found) == 1 else None


def _rank(tag: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    """Sorts tags as versions: 9 before 12, numbers above words, ``latest`` above all."""
    parts = re.findall(r"\d+|[^\d]+", tag)
    return tag == DEFAULT_TAG, [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
