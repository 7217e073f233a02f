"""A real Debian root disk, from the real mirror: what is on it, that it boots and works, and that a killed build is undone."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import posada
from posada.errors import HostError, SpecError
from posada.images.store import ImageStore
from posada.model.records import ImageRecord

pytestmark = pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed")


class Records(dict[str, ImageRecord]):
    """The database's part, in memory."""

    def list_images(self) -> list[ImageRecord]:
        return list(self.values())

    def put_image(self, image: ImageRecord) -> None:
        self[image.digest] = image

    def drop_image(self, digest: str) -> None:
        self.pop(digest, None)


def debugfs(disk: Path, command: str) -> str:
    tool = shutil.which("debugfs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("debugfs is not installed")
    return subprocess.run([tool, "-R", command, disk], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def image_disk(image: str, host: posada.Host) -> Path:
    record = host.images.get(image).record
    home = Path(os.environ["POSADA_HOME"])
    return home / record.path / (record.disk or "")


def test_the_file_system_is_sound_anonymous_and_owned_rightly(image_disk: Path) -> None:
    e2fsck = shutil.which("e2fsck", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if e2fsck is not None:
        subprocess.run([e2fsck, "-f", "-n", image_disk], capture_output=True, check=True)
    assert debugfs(image_disk, "cat /etc/machine-id") == ""
    assert debugfs(image_disk, "cat /etc/hostname") == "posada\n"
    assert "resolv.conf" not in debugfs(image_disk, "ls /etc")
    assert debugfs(image_disk, "cat /etc/shadow").startswith("root:*:")
    # -rw-r----- root shadow: the owners of the namespace it was made in did not get onto the disk.
    assert re.search(r"User:\s+0\s+Group:\s+42\b", debugfs(image_disk, "stat /etc/shadow"))
    assert re.search(r"Mode:\s+04755", debugfs(image_disk, "stat /usr/bin/passwd"))
    for empty in ("/proc", "/sys", "/tmp", "/var/lib/apt/lists", "/mnt"):
        # Lines like /INODE/MODE/UID/GID/NAME/SIZE/.
        names = {line.split("/")[5] for line in debugfs(image_disk, f"ls -p {empty}").splitlines() if "/" in line}
        assert names == {".", ".."}, empty
    # Of this host nothing but its mirror.
    assert os.uname().nodename not in debugfs(image_disk, "cat /etc/hosts").split()


def test_the_file_system_has_its_features_and_no_inode_tables_to_zero(image_disk: Path) -> None:
    dumpe2fs = shutil.which("dumpe2fs", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if dumpe2fs is None:
        pytest.skip("dumpe2fs is not installed")
    told = subprocess.run([dumpe2fs, image_disk], capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"^Filesystem features: +has_journal ext_attr resize_inode dir_index filetype extent 64bit flex_bg", told, re.M
    )
    groups = re.findall(r"^Group \d+: .*$", told, re.MULTILINE)
    assert len(groups) == 80
    assert [group for group in groups if "ITABLE_ZEROED" not in group] == []


def test_it_boots_and_works(host: posada.Host, image: str) -> None:
    with host.run(image, name="image-build") as vm:
        assert vm.shell(". /etc/os-release; echo $ID $VERSION_ID", check=True).stdout == "debian 12\n"
        vm.exec("modprobe", "overlay", check=True)
        assert "overlay" in vm.exec("cat", "/proc/filesystems", check=True).stdout
        assert vm.exec("apt-get", "--version", check=True).exit_code == 0
        assert vm.exec("dpkg", "--audit", check=True).stdout == ""
        assert vm.shell("ls /usr/sbin/policy-rc.d /sbin/start-stop-daemon.REAL").exit_code != 0


BUILD = """
import asyncio, sys
from pathlib import Path
from posada.images.store import ImageStore
class Records(dict):
    list_images = lambda self: list(self.values())
    put_image = lambda self, image: self.__setitem__(image.digest, image)
def progress(fraction, message):
    print(message, flush=True)
asyncio.run(ImageStore(Path(sys.argv[1]), Records()).build("debian:12", progress=progress))
"""


def children(pid: int) -> list[int]:
    """All living descendants."""
    out = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            out += [child, *children(child)]
    return out


@pytest.mark.parametrize(
    "stage", ["reading the package lists", "unpacking the base system", "installing the base system"]
)
def test_a_killed_build_leaves_no_process_no_mount_and_no_file(tmp_path: Path, stage: str) -> None:
    root = tmp_path / "images"
    maker = subprocess.Popen([sys.executable, "-c", BUILD, root], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    with maker.stdout:
        while (line := maker.stdout.readline()) and line.strip() != stage:
            pass
        assert line, "the build ended early"
        fds = [os.pidfd_open(pid) for pid in children(maker.pid)]
        assert len(fds) >= 2
        maker.send_signal(signal.SIGKILL)
        maker.wait()
    for fd in fds:
        assert select.select([fd], [], [], 30)[0], "a process of the build lives on"
        os.close(fd)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    store = ImageStore(root, Records())
    assert len(store.collect_garbage()) == 1
    assert {p.name for p in root.iterdir()} == {".lock", ".build-debian-12.lock"}


async def test_cancelling_a_build_leaves_nothing(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", Records())
    unpacking = asyncio.Event()
    task = asyncio.create_task(
        store.build("debian:12", progress=lambda _, message: unpacking.set() if "unpacking" in message else None)
    )
    await unpacking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {p.name for p in store.root.iterdir()} == {".lock", ".build-debian-12.lock"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"packages": ["no-such-package-anywhere"]}, SpecError, "no package no-such-package-anywhere"),
        ({"size": 4096}, SpecError, "not a size for a root disk"),
    ],
)
async def test_what_cannot_be_built_says_why(
    tmp_path: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    store = ImageStore(tmp_path / "images", Records())
    with pytest.raises(error, match=words):
        await store.build("debian:12", **options)  # type: ignore[arg-type]
    assert {p.name for p in store.root.iterdir()} <= {".lock", ".build-debian-12.lock"}


async def test_a_mirror_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posada.images import debian, sources

    nowhere = sources.Source("http://127.0.0.1:9/debian", "bookworm", ("main",), str(sources.KEYRING))
    monkeypatch.setattr(debian.sources, "read_sources", lambda etc: [nowhere])
    store = ImageStore(tmp_path / "images", Records())
    with pytest.raises(HostError, match="mirror does not answer"):
        await store.build("debian:12")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_kernel_an_initrd_and_a_disk_of_somebodys_boot(
    host: posada.Host, image: str, places: tuple[Path, Path], tmp_path: Path, format: str
) -> None:
    """The parts of the Debian image, taken apart and imported as a triple: without posada's knowledge of an agent."""
    source = host.images.get(image)
    folder = places[0] / source.record.path
    disk = source.export(tmp_path / "disk", format=format)
    initrd = next((places[0] / "images/.initrd").glob(f"{source.digest[:32]}-*"))
    triple = host.images.import_disk(
        disk,
        kernel=folder / (source.record.kernel or ""),
        initrd=initrd,
        append="posada.root=/dev/vda posada.rootfs=ext4 posada.rw=1",
        name="triple:1",
    )
    try:
        assert (triple.agent, triple.record.disk_size) == (False, source.record.disk_size)
        with host.vms.create("triple:1", name="triple") as vm:
            vm.start(wait=False)
            vm.wait_for.text("posada-agent: ready", timeout=60)
            vm.kill()
    finally:
        triple.remove()
