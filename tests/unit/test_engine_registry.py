"""The automatic choice: the first engine that works here and can do what is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from posada.engine import registry
from posada.engine.base import Probe
from posada.errors import HostError
from posada.model.capabilities import Capabilities, Feature, Verdict
from posada.model.machine import make_spec


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Engine name → the features that it has, or None where it does not work. To be changed by the test."""
    engines: dict[str, Any] = {"kvm": {Feature.DIRECT_BOOT}, "qemu": set(Feature)}
    monkeypatch.setattr(registry, "AUTOMATIC", ("kvm", "qemu"))
    monkeypatch.setattr(registry, "registry", lambda: engines)
    monkeypatch.setattr(
        registry, "probe", lambda name: Probe(engine=name, ok=engines[name] is not None, detail="as it is", hint="help")
    )

    def load(name: str) -> Any:
        features = {feature: Verdict(feature in engines[name]) for feature in Feature}
        return SimpleNamespace(name=name, capabilities=lambda: Capabilities(engine=name, features=features))

    monkeypatch.setattr(registry, "load", load)
    return engines


def test_the_first_that_can_do_it_is_taken(host: dict[str, Any]) -> None:
    assert registry.choose(make_spec(image="x", nics=[])).name == "kvm"
    assert registry.choose(make_spec(image="x")).name == "qemu", "kvm has no network here"
    assert registry.choose(make_spec(image="x", nics=[], firmware="bios")).name == "qemu"
    assert registry.choose(make_spec(image="x", nics=[], nested=True)).name == "qemu"
    assert registry.choose(make_spec(image="x", engine="kvm")).name == "kvm", "whoever names one gets it"


def test_one_that_does_not_work_is_passed_over(host: dict[str, Any]) -> None:
    host["kvm"] = None
    assert registry.choose(make_spec(image="x", nics=[])).name == "qemu"


def test_when_none_can_do_it_the_first_says_so(host: dict[str, Any]) -> None:
    host["qemu"] = {Feature.DIRECT_BOOT}
    assert registry.choose(make_spec(image="x", firmware="uefi")).name == "kvm"


def test_when_none_works_each_says_why(host: dict[str, Any]) -> None:
    host["kvm"] = host["qemu"] = None
    with pytest.raises(HostError, match=r"kvm: as it is \(help\); qemu: as it is"):
        registry.choose(make_spec(image="x"))
