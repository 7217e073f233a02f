"""Which mirror a guest is built from: the one this machine uses, as apt's own files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from posada.errors import SpecError
from posada.images.debian import check_packages, suite_of
from posada.images.sources import (
    FALLBACK,
    KEYRING,
    Source,
    apt_options,
    for_guest,
    is_debian,
    parse_deb822,
    parse_one_line,
    read_sources,
    sources_for,
    to_one_line,
)

DEB822 = """\
Types: deb
# a comment in the middle
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://third.example/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
"""
KEY = str(KEYRING)
MAIN = Source("http://mirror.example/debian", "bookworm", ("main", "contrib"), KEY)
UPDATES = Source("http://mirror.example/debian", "bookworm-updates", ("main", "contrib"), KEY)
SECURITY = Source("http://mirror.example/debian-security", "bookworm-security", ("main",), KEY)


def test_deb822() -> None:
    *found, third = parse_deb822(DEB822)
    assert found == [MAIN, UPDATES, SECURITY]
    assert "BEGIN PGP" in third.signed_by
    assert not is_debian(third)


def test_one_line() -> None:
    text = """\
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib # trailing
deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm-updates main
deb-src http://mirror.example/debian bookworm main
nonsense
"""
    assert parse_one_line(text) == [
        Source("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("http://mirror.example/debian", "bookworm-updates", ("main",), KEY),
    ]


def test_what_is_written_is_read_again() -> None:
    assert tuple(parse_one_line(to_one_line([MAIN, UPDATES, SECURITY]))) == (MAIN, UPDATES, SECURITY)


@pytest.mark.parametrize(
    "source",
    [
        Source("https://download.docker.com/linux/debian", "bookworm", ("stable",)),
        Source("https://packages.example/grafana", "stable", ("main",)),
        Source("http://apt.postgresql.org/pub/repos/apt", "bookworm-pgdg", ("main",)),
        Source("https://deb.nodesource.com/node_20.x", "nodistro", ("main",), "/usr/share/keyrings/nodesource.gpg"),
        Source("https://third.example/debian", "bookworm", ("main",), "/etc/apt/keyrings/third.gpg"),
        Source("http://archive.ubuntu.com/ubuntu", "jammy", ("main",)),
        Source("file:/srv/debian", "bookworm", ("main",)),
        Source("cdrom:[Debian]/", "bookworm", ("main",)),
    ],
)
def test_others_repositories_are_not_debian(source: Source) -> None:
    assert not is_debian(source)


def test_the_hosts_own_suite_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "old.list.save").write_text("deb http://saved.example/debian bookworm main\n")
    (tmp_path / "sources.list").write_text("deb http://apt.example/debian sid main\n")
    assert sources_for("bookworm", read_sources(tmp_path)) == (MAIN, UPDATES, SECURITY)


def test_another_suite_comes_from_the_same_mirror() -> None:
    assert sources_for("trixie", [MAIN, UPDATES, SECURITY]) == (
        Source("http://mirror.example/debian", "trixie", ("main",), KEY),
        Source("http://mirror.example/debian", "trixie-updates", ("main",), KEY),
        Source("http://mirror.example/debian-security", "trixie-security", ("main",), KEY),
    )
    assert sources_for("sid", [MAIN, SECURITY]) == (Source("http://mirror.example/debian", "sid", ("main",), KEY),)
    assert [s.suite for s in sources_for("trixie", [MAIN])] == ["trixie", "trixie-updates"], "no security mirror known"


def test_debians_mirror_is_used_only_where_none_is_configured(tmp_path: Path) -> None:
    assert {s.uri for s in sources_for("bookworm", read_sources(tmp_path))} == {FALLBACK, f"{FALLBACK}-security"}


def test_proxies_reach_the_build_and_those_of_the_network_the_guest() -> None:
    dump = """\
Acquire "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Proxy "http://127.0.0.1:8080";
Acquire::http::Proxy::mirror.example "DIRECT";
Acquire::https::Proxy::other.example "http://localhost:1";
Acquire::Check-Valid-Until "false";
Acquire::http::Proxy-Auto-Detect "/usr/bin/evil";
Dir::Etc "etc/apt";
"""
    options = apt_options(dump)
    assert options == (
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::https::Proxy "http://127.0.0.1:8080";',
        'Acquire::http::Proxy::mirror.example "DIRECT";',
        'Acquire::https::Proxy::other.example "http://localhost:1";',
        'Acquire::Check-Valid-Until "false";',
    )
    assert for_guest(options).splitlines() == [options[0], options[2], options[4]]


@pytest.mark.parametrize(
    ("tag", "suite"), [("12", "bookworm"), ("trixie", "trixie"), ("unstable", "sid"), ("11", "bullseye")]
)
def test_tags(tag: str, suite: str) -> None:
    assert suite_of(tag) == suite


@pytest.mark.parametrize("tag", ["9", "", "--help", "bookworm; rm"])
def test_unknown_tags_are_refused(tag: str) -> None:
    with pytest.raises(SpecError, match="not a release"):
        suite_of(tag)


def test_package_names_cannot_be_options() -> None:
    good = ("python3", "g++", "libc6:i386", "vim=2:9.0.1378-2")
    assert check_packages(list(good)) == good
    for name in ("-oDir=/", "a b", "a,b", "", "A", "?all", "../x", "x\ny"):
        with pytest.raises(SpecError, match=r"packages\[1\]"):
            check_packages(["vim", name])
