"""Folders of the host in specs: how they are written, what is refused, and what the host does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from host_kit import add_image, open_host
from host_kit import place as place

from posada.cli.run import read_spec
from posada.errors import SpecError, Unsupported
from posada.host.bootline import command_line
from posada.host.launch import build_launch, refuse_folders
from posada.model.machine import FolderSpec, make_spec, spec_from_yaml
from posada.model.records import SnapshotKind


def test_as_people_write_it() -> None:
    spec = spec_from_yaml("image: x\nfolders: [/src:/work, '/a:b:/data:ro', {source: /etc, target: /srv/etc}]")
    assert spec.folders == (
        FolderSpec(source="/src", target="/work"),
        FolderSpec(source="/a:b", target="/data", readonly=True),
        FolderSpec(source="/etc", target="/srv/etc"),
    )
    assert make_spec(spec) == spec


@pytest.mark.parametrize(
    ("folders", "field", "problem"),
    [
        (["/only"], "folders[0]", "HOST:GUEST"),
        (["src:/work"], "folders[0].source", "absolute"),
        (["/a:work"], "folders[0].target", "cannot be mounted"),
        (["/a:/"], "folders[0].target", "cannot be mounted"),
        (["/a:/b/../c"], "folders[0].target", "cannot be mounted"),
        (["/a:/two words"], "folders[0].target", "cannot be mounted"),
        (["/a:/b//c"], "folders[0].target", "cannot be mounted"),
        (["/a:/" + "b" * 128], "folders[0].target", "cannot be mounted"),
        (["/a:/proc/x"], "folders[0].target", "guest kernel's"),
        (["/a:/b", "/c:/b"], "folders[1].target", "used twice"),
        (["/a:/b/c", "/c:/b"], "folders[1].target", "would hide /b/c"),
        ([f"/a:/b{i}" for i in range(9)], "folders", "too many"),
        ([{"source": "/a", "target": "/b", "tag": "c"}], "folders[0].tag", "not a field"),
    ],
)
def test_what_is_refused(folders: list[Any], field: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        make_spec(image="x", folders=folders)
    assert caught.value.field == field


def test_one_within_another() -> None:
    assert len(make_spec(image="x", folders=["/a:/b", "/c:/b/c"]).folders) == 2


def test_the_command_line_of_the_guest() -> None:
    folders = make_spec(image="x", folders=["/a:/b", "/c:/d:ro"]).folders
    fields: dict[str, Any] = {"root": True, "hostname": "h", "network": False, "emulated": False}
    words = command_line(agent=True, image_append="", user_append="", folders=folders, **fields).split()
    assert words[-2:] == ["posada.folder0=/b", "posada.folder1=/d:ro"]
    assert "folder" not in command_line(agent=False, image_append="", user_append="", folders=folders, **fields)


def test_the_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = "name cpus memory lifetime idle engine arch hostname file ports labels append nested no_network disks"
    options: dict[str, Any] = dict.fromkeys(names.split()) | {"disks": (), "folders": (".:/work", "/etc:/e:ro")}
    spec = read_spec(options, "debian:12")
    assert spec.folders == (
        FolderSpec(source=str(tmp_path), target="/work"),
        FolderSpec(source="/etc", target="/e", readonly=True),
    )


async def test_a_host_with_folders(place: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    host = await open_host(place)
    try:
        add_image(host)
        house = host.vms._house

        def spec(source: Path, name: str = "one", end: str = "") -> Any:
            return make_spec(image="debian:12", engine="fake", name=name, folders=[f"{source}:/work{end}"])

        for source in (tmp_path / "missing", tmp_path / "file"):
            with pytest.raises(SpecError, match="not a directory"):
                await host.vms.create(spec(source))
        inside = host.paths.home / "images"
        for source in (place, Path("/"), inside, host.paths.runtime):
            with pytest.raises(SpecError, match="posada's state"):
                await host.vms.create(spec(source))
        assert host.vms.list() == []
        await host.vms.create(spec(inside, "reader", ":ro"))
        await host.vms.create(spec(tmp_path / "there"))
        await host.vms.start("one")
        (child,) = await host.vms.fork("one", 1)
        assert child.spec.folders == host.vms.get("one").spec.folders
        await host.vms.kill(child.name)
        with pytest.raises(Unsupported, match="snapshot with the memory of 'one'"):
            await host.vms.snapshot("one")
        await host.vms.snapshot("one", "disks", kind=SnapshotKind.DISKS)
        await host.vms.kill("one")
        (tmp_path / "there").rmdir()
        with pytest.raises(SpecError, match="not a directory"):
            build_launch(house, host.vms.get("one"))
        with pytest.raises(Unsupported):
            refuse_folders(host.vms.get("one"), "a copy")
    finally:
        await host.close()
