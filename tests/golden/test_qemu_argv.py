"""Launch + Layout → QEMU's exact command line, reviewed as text in golden/qemu/. ``POSADA_GOLDEN=write`` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posada.engine.base import DiskFile, Launch
from posada.engine.qemu.argv import Invocation, build
from posada.engine.qemu.layout import Layout, new_layout
from posada.errors import EngineError
from posada.model.machine import make_spec

FILES = Path(__file__).parent / "qemu"
UUID = "11111111-2222-3333-4444-555555555555"
ROOT = DiskFile(name="root", size=1 << 30, chain=((Path("/i/disk"), "raw"), (Path("/v/root"), "qcow2")))
DATA = DiskFile(name="data", size=1 << 20, chain=((Path("/v/data"), "qcow2"),))
SEED = DiskFile(name="seed", size=1 << 20, chain=((Path("/v/seed"), "raw"),), readonly=True)


def launch(*disks: DiskFile, **fields: object) -> Launch:
    known = {
        "uuid": UUID, "name": "web,1", "runtime": Path("/run/x"), "log": Path("/v/log"), "disks": disks,
        "macs": ("52:54:00:aa:bb:cc",), "spec": make_spec(image="debian:12"), "generation_id": UUID,
    }  # fmt: skip
    return Launch(**{**known, **fields})  # type: ignore[arg-type]


def layout(*disks: str, **fields: object) -> Layout:
    known = {
        "machine": "pc-i440fx-7.2", "accelerator": "tcg", "cpus": 1, "memory": 512 << 20, "nics": 1, "vsock": False,
        "agent": True,
    }  # fmt: skip
    return new_layout(**{**known, **fields}, disks=disks)  # type: ignore[arg-type]


def direct() -> Invocation:
    machine = launch(
        ROOT,
        kernel=Path("/i/vmlinux"),
        initrd=Path("/i/initrd"),
        append="console=ttyS0 quiet",
        agent=True,
        spec=make_spec(image="debian:12", ports=["80", "127.0.0.1:5353:53/udp"]),
    )
    return build(machine, layout("root"), binary="qemu")


def kvm_bios_without_agent() -> Invocation:
    spec = make_spec(image="x", firmware="bios", cpus=4, memory="2GiB", nics=[{}, {}])
    devices = layout("root", "data", "seed", accelerator="kvm", cpus=4, memory=2 << 30, nics=2, vsock=True, agent=False)
    return build(launch(ROOT, DATA, SEED, spec=spec), devices, binary="qemu", cid=77)


def child_of_a_machine_with_a_gap() -> Invocation:
    """A disk was unplugged and another plugged in: the child's devices sit where the source's do."""
    devices = layout("root", "old", "data").without_disk("old")
    return build(launch(ROOT, DATA), devices, binary="qemu", incoming=True)


def bare() -> Invocation:
    """No disk, no network, no generation id."""
    machine = launch(spec=make_spec(image="x", nics=[]), macs=(), kernel=Path("/k"), generation_id="")
    return build(machine, layout(nics=0, agent=False), binary="qemu")


def nested() -> Invocation:
    """A machine that may have guests; `direct` and its kin may not."""
    return build(launch(ROOT, kernel=Path("/i/vmlinux")), layout("root", nested=True), binary="qemu")


CASES = [direct, nested, kvm_bios_without_agent, child_of_a_machine_with_a_gap, bare]


def render(invocation: Invocation) -> str:
    lines = [invocation.argv[0]]
    for word in invocation.argv[1:]:
        if word.startswith("-") and not word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    lines += ["", *(f"fd {number} = {role}" for role, number in invocation.fds.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_command_line_is_exactly_this(case) -> None:
    path = FILES / f"{case.__name__}.txt"
    text = render(case())
    if os.environ.get("POSADA_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_descriptor_is_used_once_and_no_path_of_the_host_is_named(case) -> None:
    invocation = case()
    assert sorted(invocation.fds.values()) == list(range(3, 3 + len(invocation.fds)))
    words = " ".join(invocation.argv)
    for path in ("/i/", "/v/", "/run/x"):
        assert path not in words
    for role, number in invocation.fds.items():
        spelled = (f"fd={number},", f"fd={number} ", f"/proc/self/fd/{number}", f"vhostfd={number}")
        assert role == "state" or any(s in words + " " for s in spelled), role


def test_every_qcow2_node_states_what_is_below_it() -> None:
    """Else QEMU would follow the name in the header, which a guest's image could choose."""
    for case in CASES:
        nodes = [word for word in case().argv if '"driver": "qcow2"' in word]
        assert all('"backing": ' in node for node in nodes)


def test_disks_that_are_not_the_layouts_are_refused() -> None:
    with pytest.raises(EngineError, match="disks root, and it was given data"):
        build(launch(DATA), layout("root"), binary="qemu")
