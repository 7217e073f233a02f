"""Which engine runs a machine. Engines are imported when first asked for: the needs of one are not everybody's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable

from posada.engine.base import Engine, Probe, registry
from posada.errors import HostError, SpecError
from posada.model.machine import MachineSpec

#: The order of preference of ``engine: auto``. The fake engine is never chosen.
AUTOMATIC = ("qemu", "kvm", "xen")


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


def choose(spec: MachineSpec) -> Engine:
    """The engine for a spec: the one it names, or the first that was measured to work here.

    Raises HostError that tells what each engine lacks.
    """
    if spec.engine != "auto":
        return load(spec.engine)
    probes: list[Probe] = []
    for name in AUTOMATIC:
        if name in registry():
            probes.append(probe(name))
            if probes[-1].ok:
                return load(name)
    raise HostError(f"no engine works on this host: {_reasons(probes)}", hint="posada doctor tells more")


def _reasons(probes: Iterable[Probe]) -> str:
    return "; ".join(f"{p.engine}: {p.detail}" + (f" ({p.hint})" if p.hint else "") for p in probes)
