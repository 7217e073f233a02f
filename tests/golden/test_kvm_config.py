"""Launch → the monitor's exact configuration, reviewed as text in golden/kvm/. ``POSADA_GOLDEN=write`` writes them anew.

Descriptors are shown by what they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posada.engine.base import DiskFile, Launch
from posada.engine.kvm import config
from posada.engine.kvm.config import Shape
from posada.errors import EngineError, Unsupported
from posada.model.machine import make_spec
from posada.model.records import Process
from posada.vmm.config import MonitorConfig, RestoreConfig

FILES = Path(__file__).parent / "kvm"
UUID = "11111111-2222-3333-4444-555555555555"
ROOT = DiskFile(name="root", size=1 << 30, chain=((Path("/i/disk"), "raw"), (Path("/v/root"), "qcow2")))
DATA = DiskFile(name="data", size=1 << 20, chain=((Path("/v/data"), "qcow2"),))
SEED = DiskFile(name="seed", size=1 << 20, chain=((Path("/v/seed"), "raw"),), readonly=True)

Descriptor = Callable[[str], int]


def launch(*disks: DiskFile, **fields: object) -> Launch:
    known = {
        "uuid": UUID, "name": "web,1", "runtime": Path("/run/x"), "log": Path("/v/log"), "disks": disks,
        "macs": ("52:54:00:aa:bb:cc",), "spec": make_spec(image="debian:12"), "generation_id": UUID,
    }  # fmt: skip
    return Launch(**{**known, **fields})  # type: ignore[arg-type]


def bare(fd: Descriptor) -> MonitorConfig:
    spec = make_spec(image="x", nics=[], memory="64MiB")
    return config.boot(launch(macs=(), spec=spec, kernel=Path("/i/vmlinux")), fd, cid=3, uid=None)


def direct(fd: Descriptor) -> MonitorConfig:
    machine = launch(
        ROOT,
        SEED,
        kernel=Path("/i/vmlinux"),
        initrd=Path("/i/initrd"),
        append="console=ttyS0 quiet",
        agent=True,
        owner=Process(1, 2),
        spec=make_spec(image="debian:12", cpus=4, limits={"lifetime": "1h", "idle": "10m", "action": "pause"}),
    )
    return config.boot(machine, fd, cid=77, uid=1_900_000_001)


def restored_with_an_attached_disk(fd: Descriptor) -> MonitorConfig:
    shape = Shape(bays=4, inserted={"data": 1})
    restore = RestoreConfig(devices=fd("devices"), memory=(fd("memory.0"), fd("memory.1")), paused=True)
    return config.restored(launch(ROOT, DATA, agent=True), fd, cid=77, uid=1_900_000_001, shape=shape, restore=restore)


def child(fd: Descriptor) -> MonitorConfig:
    return config.forked(launch(ROOT, agent=True), fd, cid=77, uid=1_900_000_001, shape=Shape())


def with_folders(fd: Descriptor) -> MonitorConfig:
    spec = make_spec(image="x", nics=[], memory="64MiB", folders=["/src:/work", "/data:/data:ro"])
    return config.boot(launch(macs=(), spec=spec, kernel=Path("/i/vmlinux")), fd, cid=3, uid=None)


CASES = [bare, direct, with_folders, restored_with_an_attached_disk, child]


def written(case: Callable[[Descriptor], MonitorConfig]) -> str:
    """The document, with ``<role>`` for each descriptor. It has gone through the monitor's own reader."""
    roles: list[str] = []

    def fd(role: str) -> int:
        assert role not in roles, "a descriptor is one thing's"
        roles.append(role)
        return 1_000_000 + len(roles) - 1

    document = MonitorConfig.from_dict(json.loads(json.dumps(case(fd).to_dict()))).to_dict()

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shown(item) for item in value]
        return f"<{roles[value - 1_000_000]}>" if type(value) is int and 1_000_000 <= value < 1_000_100 else value

    return json.dumps(shown(document), indent=1) + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_configuration_is_what_was_reviewed(case: Callable[[Descriptor], MonitorConfig]) -> None:
    file = FILES / f"{case.__name__}.json"
    text = written(case)
    if os.environ.get("POSADA_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "POSADA_GOLDEN=write, and review the difference"


def test_bays_are_filled_from_the_lowest_and_full_some_day() -> None:
    shape = Shape(bays=2).with_disk("a").with_disk("b")
    assert shape.inserted == {"a": 0, "b": 1}
    with pytest.raises(Unsupported, match="more than 2"):
        shape.with_disk("c")
    assert shape.without_disk("a").with_disk("c").inserted == {"b": 1, "c": 0}


@pytest.mark.parametrize(
    "private",
    [{"bays": -1}, {"bays": 99}, {"bays": "4"}, {"inserted": []}, {"inserted": {"a": 4}}, {"inserted": {"a": 0, "b": 0}}],
)
def test_a_damaged_record_is_refused(private: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="damaged"):
        Shape.from_private(private)
