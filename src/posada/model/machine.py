"""``MachineSpec``: what a user asks for. Versioned, frozen, validated; JSON and YAML in and out.

A spec says nothing of the host (no path but those the user named, no pid, no port that was not asked for). What posada
made of it is a `posada.model.records.VmRecord`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from posada.errors import SpecError
from posada.model.units import GIB, MIB, TIB, format_size, parse_duration, parse_size

#: The version this posada writes. Older ones are upgraded when read; newer ones are refused.
SPEC_VERSION = 1

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_TARGET = re.compile(r"(/[A-Za-z0-9._+@-]+)+")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")

MAX_CPUS = 255
MIN_MEMORY, MAX_MEMORY = 64 * MIB, 4 * TIB
MIN_DISK, MAX_DISK = 1 * MIB, 64 * TIB
MAX_FOLDERS = 8


class DiskSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk. The first is the root disk.

    ``size`` in bytes; None keeps the image's size (root) or is refused (data disks without ``source``).
    ``source`` is a qcow2 or raw file that is copied in when the vm is created; None on the root disk means the image's
    disk, and on any other an empty disk.
    """

    name: str = "root"
    size: int | None = None
    source: str | None = None
    readonly: bool = False


class FolderSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A directory of the host that the guest sees, and with it whoever else it is shared with.

    ``source`` is its absolute path on the host; ``target`` is where the agent mounts it in the guest. A guest without
    posada's agent mounts it itself: ``mount -t virtiofs folder0 DIR`` (the second is folder1, and so on).
    """

    source: str
    target: str
    readonly: bool = False


class NicSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network interface. ``user`` is user-mode networking: no privileges, outgoing NAT, ports by forwarding."""

    network: Literal["user"] = "user"
    mac: str | None = None


class PortSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host port forwarded to a guest port. ``host`` None: posada picks a free one, each fork gets its own."""

    guest: int
    host: int | None = None
    address: str = "127.0.0.1"
    protocol: Literal["tcp", "udp"] = "tcp"


class CloudInit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """cloud-init NoCloud documents, as text."""

    user_data: str | None = None
    meta_data: str | None = None
    network_config: str | None = None
    vendor_data: str | None = None


class DirectKernel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kernel of the user's own instead of the image's: host paths, and text appended to the command line."""

    kernel: str | None = None
    initrd: str | None = None
    append: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the vm may live, in seconds, and what happens then.

    ``lifetime`` counts from the start; ``idle`` from the last exec, copy, console or port use.
    """

    lifetime: float | None = None
    idle: float | None = None
    action: Literal["kill", "pause"] = "kill"


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user asks for. Build it with `make_spec`, which validates; a bare constructor does not."""

    version: int = SPEC_VERSION
    name: str | None = None
    image: str | None = None
    engine: Literal["auto", "kvm", "qemu", "xen", "fake"] = "auto"
    arch: Literal["x86_64", "aarch64"] = "x86_64"
    cpus: int = 1
    memory: int = 512 * MIB
    nested: bool = False
    """The guest may run guests: it is shown a processor with svm or vmx."""
    firmware: Literal["direct", "bios", "uefi"] = "direct"
    boot: DirectKernel = DirectKernel()
    disks: tuple[DiskSpec, ...] = ()
    folders: tuple[FolderSpec, ...] = ()
    nics: tuple[NicSpec, ...] = (NicSpec(),)
    ports: tuple[PortSpec, ...] = ()
    cloud_init: CloudInit | None = None
    labels: dict[str, str] = {}
    limits: Limits = Limits()
    hostname: str | None = None
    ephemeral: bool = False
    """Deleted when it stops, and when the process that made it dies."""


#: Fields whose values may be written as text with a unit, and how each is read.
_SIZES = {"memory", "size"}
_DURATIONS = {"lifetime", "idle"}


def _normalise(value: Any, path: str) -> Any:
    """Turn what people write (``"1GiB"``, ``"10m"``, a bare port, ``8080:80``) into what the structs hold."""
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, item in value.items():
            where = f"{path}.{key}" if path else str(key)
            if key in _SIZES and isinstance(item, (str, int)):
                out[key] = parse_size(item, field=where)
            elif key in _DURATIONS and isinstance(item, (str, int, float)):
                out[key] = parse_duration(item, field=where)
            elif key == "ports" and isinstance(item, (list, tuple)):
                out[key] = [parse_port(p, field=f"{where}[{i}]") for i, p in enumerate(item)]
            elif key == "folders" and isinstance(item, (list, tuple)):
                out[key] = [parse_folder(f, field=f"{where}[{i}]") for i, f in enumerate(item)]
            elif key == "labels":
                out[key] = item
            else:
                out[key] = _normalise(item, where)
        return out
    if isinstance(value, (list, tuple)):
        return [_normalise(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    return value


def parse_port(value: Any, *, field: str = "port") -> Any:
    """A port as people write it: ``80``, ``8080:80``, ``127.0.0.1:8080:80``, each with an optional ``/udp``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"guest": value}
    if not isinstance(value, str):
        return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
    rest, _, protocol = value.partition("/")
    parts = rest.rsplit(":", 2)
    bad = SpecError(field, f"{value!r} is not a port", hint="write it as GUEST, HOST:GUEST or ADDRESS:HOST:GUEST")
    try:
        numbers = [int(p) if p else None for p in parts[-2:]]
    except ValueError:
        raise bad from None
    if numbers[-1] is None:
        raise bad
    out: dict[str, Any] = {"guest": numbers[-1]}
    if len(numbers) == 2:
        out["host"] = numbers[0]
    if len(parts) == 3:
        out["address"] = parts[0].strip("[]")
    if protocol:
        out["protocol"] = protocol
    return out


def parse_folder(value: Any, *, field: str = "folder") -> Any:
    """A folder as people write it: ``/host/path:/guest/path``, with an optional ``:ro``."""
    if not isinstance(value, str):
        return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
    text, readonly = value.removesuffix(":ro"), value.endswith(":ro")
    source, colon, target = text.rpartition(":")
    if not (source and colon and target):
        raise SpecError(field, f"{value!r} is not a folder", hint="write it as HOST:GUEST or HOST:GUEST:ro")
    return {"source": source, "target": target, "readonly": readonly}


def make_spec(data: Mapping[str, Any] | MachineSpec | None = None, /, **fields: Any) -> MachineSpec:
    """A validated spec from a mapping, keyword fields (they win), or both.

    Raises SpecError that names the field and the fix. Nothing is read from the host.
    """
    merged: dict[str, Any] = {}
    if data is not None:
        merged.update(msgspec.to_builtins(data) if isinstance(data, MachineSpec) else data)
    merged.update({k: v for k, v in fields.items() if v is not None})
    version = merged.get("version", SPEC_VERSION)
    if isinstance(version, int) and version > SPEC_VERSION:
        raise SpecError("version", f"{version} is newer than this posada reads", hint="upgrade posada")
    try:
        spec = msgspec.convert(_normalise(merged, ""), MachineSpec, strict=True)
    except msgspec.ValidationError as error:
        raise _spec_error(error) from None
    validate(spec)
    return spec


def _spec_error(error: msgspec.ValidationError) -> SpecError:
    problem, _, where = str(error).partition(" - at `$")
    field = where.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", problem)
    if unknown:
        field = f"{field}.{unknown[1]}" if field else unknown[1]
        return SpecError(field, "is not a field of a machine spec", hint="posada help spec lists the fields")
    return SpecError(field or "spec", problem[:1].lower() + problem[1:])


def validate(spec: MachineSpec) -> None:
    """Raise SpecError for the first field that is out of range or contradicts another."""
    if spec.version < 1:
        raise SpecError("version", f"{spec.version} is not a version", hint=f"use {SPEC_VERSION}")
    for field in ("name", "hostname"):
        value = getattr(spec, field)
        if value is not None and not _NAME.fullmatch(value):
            raise SpecError(field, f"{value!r} is not a host name", hint="1–63 of a–z, 0–9 and -, not at the ends")
    if not 1 <= spec.cpus <= MAX_CPUS:
        raise SpecError("cpus", f"{spec.cpus} is out of range", hint=f"use 1 to {MAX_CPUS}")
    if not MIN_MEMORY <= spec.memory <= MAX_MEMORY:
        raise SpecError(
            "memory", f"{format_size(spec.memory)} is out of range", hint=f"use 64MiB to {MAX_MEMORY // GIB}GiB"
        )
    if spec.memory % MIB:
        raise SpecError("memory", f"{spec.memory} bytes is not a whole number of MiB", hint="round it to MiB")
    if spec.image is None and spec.boot.kernel is None and not any(d.source for d in spec.disks):
        raise SpecError("image", "is missing", hint="name an image, a kernel (boot.kernel) or a disk (disks[0].source)")
    _validate_disks(spec)
    _validate_folders(spec)
    for i, nic in enumerate(spec.nics):
        if nic.mac is not None:
            if not _MAC.fullmatch(nic.mac):
                raise SpecError(f"nics[{i}].mac", f"{nic.mac!r} is not a MAC address", hint="six lower-case hex pairs")
            if int(nic.mac[:2], 16) & 1:
                raise SpecError(f"nics[{i}].mac", f"{nic.mac} is a multicast address", hint="make the first byte even")
    _validate_ports(spec)
    for key, value in spec.labels.items():
        if not _LABEL.fullmatch(key):
            raise SpecError(f"labels.{key}", "is not a label name", hint="1–63 of letters, digits, '.', '_', '/', '-'")
        if len(value) > 1024:
            raise SpecError(f"labels.{key}", "is longer than 1024 characters")
    for field, seconds in (("lifetime", spec.limits.lifetime), ("idle", spec.limits.idle)):
        if seconds is not None and not 0 < seconds < 1e9:
            raise SpecError(f"limits.{field}", f"{seconds} is out of range", hint="write it like 90s, 10m or 2h")
    if "\n" in spec.boot.append or "\0" in spec.boot.append or len(spec.boot.append) > 2048:
        raise SpecError("boot.append", "is not a kernel command line", hint="one line of at most 2048 characters")


def _validate_disks(spec: MachineSpec) -> None:
    seen: set[str] = set()
    for i, disk in enumerate(spec.disks):
        where = f"disks[{i}]"
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,19}", disk.name):
            raise SpecError(f"{where}.name", f"{disk.name!r} is not a disk name", hint="a–z, 0–9 and -, at most 20")
        if disk.name in seen:
            raise SpecError(f"{where}.name", f"{disk.name!r} is used twice")
        seen.add(disk.name)
        if disk.size is not None:
            if not MIN_DISK <= disk.size <= MAX_DISK:
                raise SpecError(f"{where}.size", f"{format_size(disk.size)} is out of range", hint="use 1MiB to 64TiB")
            if disk.size % 512:
                raise SpecError(f"{where}.size", f"{disk.size} bytes is not a multiple of 512")
        elif disk.source is None and (i > 0 or spec.image is None):
            raise SpecError(f"{where}.size", "is missing", hint="an empty disk needs a size, like 10GiB")


def _validate_folders(spec: MachineSpec) -> None:
    if len(spec.folders) > MAX_FOLDERS:
        raise SpecError("folders", f"{len(spec.folders)} are too many", hint=f"use at most {MAX_FOLDERS}")
    seen: list[str] = []
    for i, folder in enumerate(spec.folders):
        where = f"folders[{i}]"
        if not folder.source.startswith("/") or "\0" in folder.source:
            raise SpecError(f"{where}.source", f"{folder.source!r} is not an absolute path", hint="begin it with /")
        target = folder.target
        plain = _TARGET.fullmatch(target) and len(target) <= 128 and not {".", ".."} & set(target.split("/"))
        if not plain:
            hint = "an absolute path of at most 128 letters, digits and . _ + @ -"
            raise SpecError(f"{where}.target", f"{target!r} cannot be mounted at", hint=hint)
        if target.split("/")[1] in ("dev", "proc", "sys"):
            raise SpecError(f"{where}.target", f"{target} is the guest kernel's", hint="mount it elsewhere, like /srv")
        if target in seen:
            raise SpecError(f"{where}.target", f"{target} is used twice")
        hidden = [other for other in seen if other.startswith(target + "/")]
        if hidden:
            raise SpecError(f"{where}.target", f"{target} would hide {hidden[0]}", hint="name the outer one first")
        seen.append(target)


def _validate_ports(spec: MachineSpec) -> None:
    taken: set[tuple[str, str, int]] = set()
    for i, port in enumerate(spec.ports):
        where = f"ports[{i}]"
        for field, number in (("guest", port.guest), ("host", port.host)):
            if number is not None and not 1 <= number <= 65535:
                raise SpecError(f"{where}.{field}", f"{number} is not a port", hint="use 1 to 65535")
        try:
            ipaddress.IPv4Address(port.address)
        except ValueError:
            raise SpecError(f"{where}.address", f"{port.address!r} is not an IPv4 address") from None
        if port.host is not None:
            key = (port.address, port.protocol, port.host)
            if key in taken:
                raise SpecError(f"{where}.host", f"{port.host} is used twice")
            taken.add(key)
    if spec.ports and not spec.nics:
        raise SpecError("ports", "need a network interface", hint="leave nics out, or drop the ports")


def spec_from_json(text: str | bytes) -> MachineSpec:
    """Raises SpecError."""
    try:
        data = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise SpecError("", f"the spec is not JSON: {error}") from None
    return make_spec(_mapping(data))


def spec_from_yaml(text: str | bytes) -> MachineSpec:
    """Raises SpecError."""
    from posada.model import yaml  # needed here alone, and slow to load

    try:
        data = yaml.decode(text)
    except ValueError as error:
        raise SpecError("", f"the spec is not YAML: {error}") from None
    return make_spec(_mapping(data))


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
        raise SpecError("", "the spec is not a mapping of fields", hint="start from: posada info VM --spec")
    return data


def spec_to_json(spec: MachineSpec) -> bytes:
    return msgspec.json.format(msgspec.json.encode(spec), indent=2)


def spec_to_yaml(spec: MachineSpec) -> bytes:
    return msgspec.yaml.encode(spec)


def json_schema() -> dict[str, Any]:
    """The published JSON schema (2020-12) of `MachineSpec`, in canonical form (sizes in bytes, times in seconds)."""
    return msgspec.json.schema(MachineSpec)
