"""Keyword arguments of the Python API, as types: what editors complete and type checkers verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, TypedDict

import msgspec

from posada.errors import SpecError
from posada.model.machine import (
    CloudInit,
    DirectKernel,
    DiskSpec,
    FolderSpec,
    Limits,
    MachineSpec,
    NicSpec,
    PortSpec,
    make_spec,
)


class SpecFields(TypedDict, total=False):
    """The fields of a machine, as `posada.run` and `posada.create` take them. Sizes, times: numbers or ``"1GiB"``."""

    name: str | None
    """1–63 of a–z, 0–9 and -; made up when left out."""
    engine: str
    """``auto`` (measured choice), ``qemu``, ``kvm``, ``xen`` or ``fake``."""
    arch: str
    cpus: int
    memory: int | str
    """Bytes, or text such as ``"1GiB"``."""
    nested: bool
    """The guest may run guests: it is shown a processor with svm or vmx."""
    disk: int | str
    """Size of the root disk; at least the image's. Shorthand for ``disks=[DiskSpec(size=…)]``."""
    disks: Sequence[DiskSpec | Mapping[str, Any]]
    folders: Sequence[FolderSpec | Mapping[str, Any] | str]
    """Directories of this host that the guest sees: ``"/host/path:/guest/path"``, with ``:ro`` read-only."""
    firmware: str
    boot: DirectKernel | Mapping[str, Any]
    nics: Sequence[NicSpec | Mapping[str, Any]]
    ports: Sequence[PortSpec | Mapping[str, Any] | int | str]
    """Guest ports to forward: ``8080``, ``"80:8080"`` (host:guest), ``"127.0.0.1:80:8080"``."""
    cloud_init: CloudInit | Mapping[str, Any] | None
    labels: Mapping[str, str]
    limits: Limits | Mapping[str, Any]
    lifetime: float | str
    """How long it may run, in seconds or text such as ``"10m"``. Shorthand for ``limits``."""
    idle: float | str
    """How long it may be idle. Shorthand for ``limits``."""
    hostname: str | None
    ephemeral: bool
    """Deleted when it stops, and when this process ends."""


class ExecOptions(TypedDict, total=False):
    """What `VM.exec` and `VM.shell` take beside the command."""

    cwd: str | None
    """Directory in the guest; the user's home when left out."""
    env: Mapping[str, str] | None
    """Added to the command's environment."""
    user: str | None
    """Name or uid, with an optional ``:group``; root when left out."""
    input: str | bytes | None
    """All of the command's standard input."""
    stdin: bool | BinaryIO | None
    """A binary file that is fed to the command, or True with ``stream``: `Process.write` will feed it."""
    timeout: float | None
    """Seconds until the command is killed and `posada.Timeout` raised; none by default."""
    check: bool
    """Raise `posada.CommandError` if the command ends with anything but status 0."""
    pty: bool | tuple[int, int]
    """Give the command a terminal, of that many (rows, columns)."""


def build_spec(
    image: str | None, base: MachineSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]
) -> MachineSpec:
    """One validated spec from ``spec=``, the keyword fields (they win) and their shorthands. Raises SpecError."""
    merged: dict[str, Any] = {}
    if base is not None:
        merged.update(msgspec.to_builtins(base) if isinstance(base, MachineSpec) else base)
    merged.update({key: value for key, value in fields.items() if value is not None})
    if image is not None:
        merged["image"] = image
    disk = merged.pop("disk", None)
    if disk is not None:
        disks = [msgspec.to_builtins(d) if isinstance(d, DiskSpec) else d for d in merged.get("disks") or [{}]]
        if not isinstance(disks[0], Mapping):
            raise SpecError("disks[0]", "is not a disk")
        merged["disks"] = [{**disks[0], "size": disk}, *disks[1:]]
    limits = {key: merged.pop(key) for key in ("lifetime", "idle") if merged.get(key) is not None}
    if limits:
        old = merged.get("limits")
        if isinstance(old, Limits):
            old = msgspec.to_builtins(old)
        merged["limits"] = {**(old or {}), **limits}
    return make_spec(merged)
