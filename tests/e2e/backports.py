"""A QEMU of a later Debian beside the system's: fetched from backports with apt's own means, unpacked, never installed."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from posada.images import sources

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


def newer_qemu(cache: Path, target: Path) -> Path:
    """The program, unpacked into ``target`` from packages in ``cache``, or fetched into it.

    ``target`` must be reachable by everyone: QEMU is started as a user of its own. Skips, with the reason, where Debian 12's
    backports cannot serve.
    """
    release = platform.freedesktop_os_release()
    if (release.get("ID"), release.get("VERSION_CODENAME")) != ("debian", "bookworm"):
        pytest.skip(f"{release.get('PRETTY_NAME')}: a QEMU built for Debian 12 is not for it")
    if not (cache / "fetched").exists():
        _fetch(cache)
        (cache / "fetched").touch()
    for archive in (cache / "archives").glob("*.deb"):
        _call(["dpkg-deb", "-x", str(archive), str(target)], cache)
    return target / "usr/bin/qemu-system-x86_64"


def _fetch(cache: Path) -> None:
    """A private apt: its own lists and sources, the machine's mirror, keys and proxies. No root, no change to the system."""
    configured = sources.sources_for("bookworm", sources.read_sources())
    main = next(s for s in configured if s.suite == "bookworm")
    for folder in ("lists/partial", "archives/partial"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    lines = [sources.Source(main.uri, s, ("main",), str(sources.KEYRING)) for s in ("bookworm", "bookworm-backports")]
    (cache / "sources.list").write_text(sources.to_one_line(lines))
    options = {
        "Dir::Etc::SourceList": cache / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": cache / "lists",
        "Dir::Cache::Archives": cache / "archives",
        "Dir::Cache::PkgCache": "",
        "Dir::Cache::SrcPkgCache": "",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _call([*apt, "update"], cache)
    _call([*apt, "download", *(f"{package}/bookworm-backports" for package in PACKAGES)], cache / "archives")


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command[0]} failed: {re.sub(chr(10) + '+', '; ', done.stderr.strip())[-800:]}"
