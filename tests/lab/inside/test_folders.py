"""A folder of the host in a Debian guest of the kvm engine: read and written, kept read-only, and nothing beyond it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import posada

ALICE = 1000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``work`` is alice's, ``data`` is root's; ``secret`` is nobody's business."""
    place = tmp_path_factory.mktemp("place")
    (place / "secret").write_text("not yours")
    for name in ("work", "data"):
        (place / name).mkdir()
        (place / name / "hello").write_text(f"hello from {name}\n")
        (place / name / "up").symlink_to("../secret")
        (place / name / "absolute").symlink_to(place / "secret")
    (place / "work" / "roots").write_text("only root's")
    (place / "work" / "roots").chmod(0o600)
    for path in (place / "work", place / "work/hello"):
        os.chown(path, ALICE, ALICE)
    return place


@pytest.fixture(scope="module")
def vm(place: Path) -> Iterator[posada.VM]:
    append = {"append": "mitigations=off norandmaps"}
    shared = [f"{place}/work:/srv/app", f"{place}/data:/srv/data:ro"]
    with posada.run("debian:12", engine="kvm", boot=append, nics=[], folders=shared, timeout=120) as vm:
        yield vm


def sh(vm: posada.VM, script: str) -> str:
    return vm.shell(script, check=True).stdout.strip()


def test_it_is_mounted_before_anything_else_runs(vm: posada.VM) -> None:
    mounts = sh(vm, "cat /proc/mounts").splitlines()
    assert any(line.startswith("folder0 /srv/app virtiofs rw,nosuid,nodev") for line in mounts)
    assert any(line.startswith("folder1 /srv/data virtiofs ro,nosuid,nodev") for line in mounts)
    assert sh(vm, "cat /srv/app/hello /srv/data/hello").splitlines() == ["hello from work", "hello from data"]


def test_what_the_guest_writes_is_there_and_the_other_way_round(vm: posada.VM, place: Path) -> None:
    sh(vm, "mkdir -p /srv/app/a/b && head -c 5000000 /dev/urandom > /srv/app/a/b/big && sync -f /srv/app/a/b/big")
    digest = hashlib.sha256((place / "work/a/b/big").read_bytes()).hexdigest()
    assert sh(vm, "sha256sum /srv/app/a/b/big | cut -c-64") == digest
    (place / "work/many").mkdir()
    for number in range(300):
        (place / f"work/many/{number}").write_text(str(number))
    assert sh(vm, "cd /srv/app/many && ls | wc -l && cat * | tr -d '\\n' | wc -c") == "300\n790"
    sh(vm, "cd /srv/app && mv a/b/big moved && truncate -s 10 moved && ln moved second && rm -r a")
    assert ((place / "work/moved").stat().st_size, (place / "work/second").stat().st_nlink) == (10, 2)
    assert (
        sh(vm, "cp -r /usr/share/doc/dpkg /srv/app/copy && diff -r /usr/share/doc/dpkg /srv/app/copy && echo same")
        == "same"
    )


def test_it_is_written_as_its_owner(vm: posada.VM, place: Path) -> None:
    """The host's root shares alice's folder: the guest has alice's rights in there, not root's."""
    sh(vm, "touch /srv/app/mine; install -m 4755 /bin/true /srv/app/trap 2>/dev/null || chmod 4755 /srv/app/trap")
    found = (place / "work/trap").stat()
    assert (found.st_uid, found.st_gid) == (ALICE, ALICE)
    assert not found.st_mode & (stat.S_ISUID | stat.S_ISGID)
    assert vm.shell("cat /srv/app/roots").exit_code != 0
    assert vm.shell("mknod /srv/app/null c 1 3").exit_code != 0


def test_read_only_is_kept(vm: posada.VM, place: Path) -> None:
    said = vm.shell("touch /srv/data/new; echo x >> /srv/data/hello; rm /srv/data/hello")
    assert said.exit_code != 0 and said.stderr.count("Read-only file system") == 3
    assert vm.shell("mount -o remount,rw /srv/data && mkdir -p /mnt/again && mount -t virtiofs folder1 /mnt/again").ok
    said = vm.shell("touch /srv/data/new; echo x >> /srv/data/hello; rm /srv/data/hello; chmod 0 /srv/data/hello")
    assert said.exit_code != 0 and said.stderr.count("Read-only file system") == 4
    assert sorted(os.listdir(place / "data")) == ["absolute", "hello", "up"]
    assert (place / "data/hello").read_text() == "hello from data\n"


def test_there_is_no_way_out(vm: posada.VM, place: Path) -> None:
    sh(vm, "echo of the guest | tee /secret > /srv/secret")
    assert sh(vm, "cat /srv/app/up /srv/app/../secret /srv/app/many/../../secret").splitlines() == ["of the guest"] * 3
    assert vm.shell("cat /srv/app/absolute").exit_code != 0  # there is no such file in the guest
    sh(vm, "ln -sf ../../../../../../secret /srv/app/guests; ln -sfn / /srv/app/root; ln -sfn .. /srv/app/dots")
    assert sh(vm, "cat /srv/app/guests /srv/app/root/secret /srv/app/dots/secret").splitlines() == ["of the guest"] * 3
    sh(vm, "echo overwritten > /srv/app/guests; rm -f /srv/app/dots/secret")
    assert (place / "secret").read_text() == "not yours"


def test_a_fork_goes_on_with_what_is_open(vm: posada.VM, place: Path) -> None:
    (place / "work/shared").touch()
    os.chown(place / "work/shared", ALICE, ALICE)
    waits = "exec 3<>/srv/app/shared; read line < /run/go; rm /srv/app/$(hostname); hostname >&3; touch /run/done"
    sh(vm, f"mkfifo /run/go; ({waits}) > /dev/null 2>&1 &")
    one, two = vm.fork(2)
    with one, two:
        for each in (one, two):
            name = sh(each, "hostname")
            (place / "work" / name).touch()
            (place / "work/shared").write_text("")
            sh(each, "echo go > /run/go; until [ -e /run/done ]; do sleep 0.1; done")
            assert (place / "work/shared").read_text() == f"{name}\n"
            assert not (place / "work" / name).exists()
            sh(each, f"echo of {name} > /srv/app/of-{name}")
            assert sh(vm, f"cat /srv/app/of-{name}") == f"of {name}"
        assert one.exec("touch", "/srv/data/new").exit_code != 0
    assert sh(vm, "test ! -e /run/done && cat /srv/app/hello") == "hello from work"


def test_it_survives_a_restart_and_is_not_saved(vm: posada.VM, place: Path) -> None:
    with pytest.raises(posada.Unsupported, match="shares"):
        vm.snapshot("full")
    vm.restart(timeout=60)
    vm.wait_ready(timeout=120)
    assert sh(vm, "cat /srv/app/hello") == "hello from work"
