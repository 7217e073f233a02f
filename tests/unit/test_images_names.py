"""What a reference to an image means."""

from __future__ import annotations

import pytest

from posada.errors import SpecError
from posada.images import names
from posada.model.records import ImageRecord


def image(digit: str, *called: str, created: float = 0.0) -> ImageRecord:
    return ImageRecord(digest=digit * 64, names=called, path="", arch="x86_64", created=created)


TWELVE = image("a", "debian:12", created=1)
NINE = image("b", "debian:9", created=2)
SID = image("c", "debian:sid", created=3)
APP = image("d", "app:1.9", "app:latest", "team/app:x", created=4)
NEWER_APP = image("e", "app:1.10", created=5)
NAMELESS = image("f", created=6)
ALL = [TWELVE, NINE, SID, APP, NEWER_APP, NAMELESS]


@pytest.mark.parametrize(
    ("ref", "meant"),
    [
        ("debian:12", TWELVE),
        ("debian:bookworm", TWELVE),
        ("debian", TWELVE),  # 12 is higher than 9, and a number than a word
        ("debian:unstable", SID),
        ("app", APP),  # latest
        ("app:1.10", NEWER_APP),
        ("team/app", APP),
        ("f" * 64, NAMELESS),
        ("f" * 6, NAMELESS),
        ("sha256:" + "f" * 12, NAMELESS),
        ("f" * 5, None),
        ("debian:13", None),
        ("nothing", None),
        ("", None),
        ("../../etc", None),
    ],
)
def test_find(ref: str, meant: ImageRecord | None) -> None:
    assert names.find(ref, ALL) == meant


def test_an_ambiguous_digest_is_none() -> None:
    one, two = image("a"), ImageRecord(digest="a" * 60 + "bbbb", names=(), path="", arch="x86_64", created=0)
    assert names.find("a" * 8, [one, two]) is None
    assert names.find("a" * 64, [one, two]) == one


def test_of_two_with_one_name_the_newer() -> None:
    newer = image("1", "debian:12", created=10)
    assert names.find("debian:12", [TWELVE, newer]) == newer
    assert names.find("debian", [newer, TWELVE]) == newer


def test_highest_version_wins_over_the_alphabet() -> None:
    older, newer = image("1", "x:1.9"), image("2", "x:1.10")
    assert names.find("x", [older, newer]) == newer


@pytest.mark.parametrize("ref", ["", "A", "a:", ":b", "a:b:c", "a b", "a/../b", "-a", "a:-b", "x" * 200, "a\n"])
def test_bad_names_are_refused(ref: str) -> None:
    with pytest.raises(SpecError, match="not the name of an image"):
        names.parse(ref)


def test_full_names() -> None:
    assert names.full_name("app") == "app:latest"
    assert names.full_name("team/app:2") == "team/app:2"
    assert names.full_name("debian:trixie") == "debian:13"
