"""Which Debian mirror this machine is configured for: apt's sources, deb822 and one-line, and its proxy settings.

Formats: sources.list(5). Only what Debian itself publishes is taken over; third parties' repositories on the host are
not the guest's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: Used only where no Debian mirror is configured at all.
FALLBACK = "http://deb.debian.org/debian"
FALLBACK_SECURITY = "http://deb.debian.org/debian-security"

#: What people write after ``debian:`` → the suite's code name.
SUITES = {
    "11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky",
    "bullseye": "bullseye", "bookworm": "bookworm", "trixie": "trixie", "forky": "forky",
    "testing": "forky", "sid": "sid", "unstable": "sid",
}  # fmt: skip
#: Suites without updates and security archives of their own.
_ROLLING = {"sid"}
_ALIASES = {"stable", "oldstable", "testing", "unstable"}


class Source(msgspec.Struct, frozen=True):
    """One ``deb`` line's worth of apt source."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


class Archive(NamedTuple):
    """What apt is configured with, as far as a Debian guest is concerned."""

    sources: tuple[Source, ...]
    options: tuple[str, ...] = ()
    """Lines of apt configuration: proxies, and what a mirror of old snapshots needs."""


def parse_one_line(text: str) -> list[Source]:
    """``deb [option=value …] uri suite component…``. Lines that are not understood are skipped; apt warns of them."""
    out = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match is None:
            continue
        options = dict(item.split("=", 1) for item in (match[1] or "").split() if "=" in item)
        out.append(Source(match[2], match[3], tuple(match[4].split()), options.get("signed-by", "")))
    return out


def parse_deb822(text: str) -> list[Source]:
    """Stanzas of ``Types: URIs: Suites: Components: Signed-By: Enabled:``; each URI × suite is a source."""
    out = []
    for stanza in re.split(r"\n[ \t]*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[key] = fields.get(key, "") + "\n" + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        signed_by = fields.get("signed-by", "").strip()
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                out.append(Source(uri, suite, tuple(fields.get("components", "").split()), signed_by))
    return out


def read_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every enabled source below ``etc``, in apt's order. What cannot be read is as if it were not there."""
    out: list[Source] = []
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    for path in files:
        parse = {".list": parse_one_line, ".sources": parse_deb822}.get(path.suffix)
        if parse is None:
            continue
        try:
            out += parse(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
    return out


def is_debian(source: Source) -> bool:
    """It is Debian's own archive: its suites, ``main``, and Debian's key (or no key, and a URI that says so)."""
    base = re.sub(r"[-/](updates|security|backports|proposed-updates)$", "", source.suite)
    if base.removesuffix("/updates") not in {*SUITES.values(), *_ALIASES} or "main" not in source.components:
        return False
    if urlsplit(source.uri).scheme not in ("http", "https", "mirror+http", "mirror+https", "tor+http", "tor+https"):
        return False
    if "BEGIN PGP" in source.signed_by:
        return False
    if source.signed_by:
        return "debian-archive" in source.signed_by
    return "debian" in source.uri


def sources_for(suite: str, configured: Sequence[Source]) -> tuple[Source, ...]:
    """The sources of a guest of ``suite`` (a code name), from what the host has.

    The host's own lines where the host has that suite; else its mirror with this suite put in; else Debian's.
    """
    debian = [s for s in configured if is_debian(s)]
    own = [s for s in debian if s.suite in (suite, f"{suite}-updates", f"{suite}-security")]
    if any(s.suite == suite for s in own):
        return tuple(own)
    main = next((s.uri for s in debian if "security" not in s.suite and "security" not in s.uri), "")
    security = next((s.uri for s in debian if "security" in s.suite), "")
    if not main:
        main, security = FALLBACK, FALLBACK_SECURITY
    key = str(KEYRING)
    out = [Source(main, suite, ("main",), key)]
    if suite not in _ROLLING:
        out.append(Source(main, f"{suite}-updates", ("main",), key))
        if security:
            out.append(Source(security, f"{suite}-security", ("main",), key))
    return tuple(out)


def to_one_line(sources: Iterable[Source]) -> str:
    """The text of a sources.list."""
    lines = []
    for source in sources:
        option = f" [signed-by={source.signed_by}]" if source.signed_by else ""
        lines.append(f"deb{option} {source.uri} {source.suite} {' '.join(source.components)}\n")
    return "".join(lines)


_OPTION = re.compile(
    r'(Acquire::(?:https?::Proxy(?:::[\w.-]+)?|https?::CaInfo|Check-Valid-Until|Check-Date)) "([^"\n]*)";',
    re.IGNORECASE,
)


def apt_options(dump: str) -> tuple[str, ...]:
    """Of ``apt-config dump``: how the mirror is reached (proxies, validity dates), as lines of apt configuration."""
    return tuple(f'{m[1]} "{m[2]}";' for m in _OPTION.finditer(dump) if m[2])


def for_guest(options: Sequence[str]) -> str:
    """Those options that also make sense inside a guest: a proxy on the host's loopback does not."""
    keep = []
    for line in options:
        value = line.split('"')[1]
        local = (urlsplit(value).hostname or "") in ("localhost", "::1") or "//127." in value
        if ("Proxy" in line and not local) or "Check-" in line:
            keep.append(line + "\n")
    return "".join(keep)
