"""Which engine runs a machine. Engines are imported when first asked for: the needs of one are not everybody's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable

from posada.engine.base import Engine, Probe, registry
from posada.errors import HostError, SpecError
from posada.model.capabilities import Feature
from posada.model.machine import MachineSpec

#: The order of preference of ``engine: auto``. The fake engine is never chosen.
AUTOMATIC = ("qemu", "kvm", "xen")

_FIRMWARE = {"direct": Feature.DIRECT_BOOT, "bios": Feature.BIOS, "uefi": Feature.UEFI}


def names() -> tuple[str, ...]:
    """The engines this posada has."""
    return tuple(registry())


@functools.cache
def load(name: str) -> Engine:
    """The engine of that name, one instance per process. Raises SpecError for a name that is none."""
    target = registry().get(name)
    if target is None:
        raise SpecError("engine", f"{name!r} is not an engine of this posada", hint=f"use {', '.join(names())}")
    module, _, attribute = target.partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)()
    return engine


@functools.cache
def probe(name: str) -> Probe:
    """What `Runner.probe` measured, once per process."""
    return load(name).probe()


def needs(spec: MachineSpec) -> list[Feature]:
    """What an engine must be able to do to run a machine of that spec."""
    asked = {
        _FIRMWARE[spec.firmware]: True,
        Feature.AARCH64: spec.arch == "aarch64",
        Feature.CLOUD_INIT: spec.cloud_init is not None,
        Feature.NESTED: spec.nested,
        Feature.FOLDERS: bool(spec.folders),
        Feature.USER_NETWORK: bool(spec.nics),
        Feature.PORTS: bool(spec.ports),
    }
    return [feature for feature, wanted in asked.items() if wanted]


def choose(spec: MachineSpec) -> Engine:
    """The engine for a spec: the one it names, or the first that was measured to work here and can do what is asked.

    If none can do all of it, the first that works: what it lacks is said when it is tried. Raises HostError that tells what
    each engine lacks when none works.
    """
    if spec.engine != "auto":
        return load(spec.engine)
    probes = [probe(name) for name in AUTOMATIC if name in registry()]
    working = [load(each.engine) for each in probes if each.ok]
    for engine in working:
        if all(map(engine.capabilities().has, needs(spec))):
            return engine
    if working:
        return working[0]
    raise HostError(f"no engine works on this host: {_reasons(probes)}", hint="posada doctor tells more")


def _reasons(probes: Iterable[Probe]) -> str:
    return "; ".join(f"{p.engine}: {p.detail}" + (f" ({p.hint})" if p.hint else "") for p in probes)
