"""The image store: whole or not there, found again after a crash, never changed, never taken from under somebody."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from posada.errors import AlreadyExists, HostError, ImageError, InUse, NotFound, SpecError
from posada.images import store as stores
from posada.images.contents import KERNEL
from posada.images.debian import DebianFiles
from posada.images.initrd import pack_modules
from posada.images.manifest import MANIFEST, MODULES, Manifest, measure
from posada.images.partial import Partial, abandoned
from posada.images.store import ImageStore
from posada.model.progress import Progress
from posada.model.records import ImageRecord
from posada.model.units import GIB, MIB
from posada.storage import qcow2

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


class Records(dict[str, ImageRecord]):
    """The database's part, in memory."""

    def list_images(self) -> list[ImageRecord]:
        return list(self.values())

    def put_image(self, image: ImageRecord) -> None:
        self[image.digest] = image

    def drop_image(self, digest: str) -> None:
        self.pop(digest, None)


@pytest.fixture
def db() -> Records:
    return Records()


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF agent")
    return path


@pytest.fixture
def store(tmp_path: Path, db: Records, agent: Path) -> ImageStore:
    return ImageStore(tmp_path / "home" / "images", db, agent=lambda arch: agent)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(GIB)
        file.seek(MIB)
        file.write(os.urandom(100_000))
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def bzimage() -> bytes:
    image = bytearray(2048)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    return bytes(image)


def published(store: ImageStore) -> set[str]:
    """Everything in the store but locks and the initramfs cache."""
    return {p.name for p in store.root.iterdir() if not p.name.endswith("lock") and p.name != ".initrd"}


async def test_an_imported_disk_is_an_image(store: ImageStore, db: Records, disk: Path) -> None:
    image = await store.import_disk(disk, name="mine:1")
    assert image.names == ("mine:1",)
    assert (image.disk_format, image.disk_size, image.kernel, image.agent) == ("raw", GIB, None, False)
    assert image.size < 2 * MIB
    assert image.path == f"images/{image.digest}"
    assert store.resolve("mine") == store.resolve(image.digest[:6]) == db[image.digest] == image
    assert published(store) == {image.digest}
    await store.verify(image)
    assert store.initrd_for(image) is None


async def test_nothing_published_can_be_written(store: ImageStore, disk: Path) -> None:
    image = await store.import_disk(disk, name="mine")
    folder = store.folder(image)
    assert folder.stat().st_mode & 0o222 == 0
    assert [p.name for p in folder.iterdir() if p.stat().st_mode & 0o777 != 0o444] == []


async def test_a_kernel_an_initrd_and_a_disk(store: ImageStore, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(b"cpio")
    image = await store.import_disk(
        disk, kernel=tmp_path / "vmlinuz", initrd=tmp_path / "initrd", append="root=/dev/vda ro", name="triple"
    )
    initrd = store.initrd_for(image)
    assert initrd is not None and initrd.read_bytes() == b"cpio"
    assert image.kernel is not None and (store.folder(image) / image.kernel).read_bytes() == bzimage()
    assert (image.names, image.append, image.arch) == (("triple:latest",), "root=/dev/vda ro", "x86_64")


@pytest.mark.parametrize(
    ("files", "append", "error", "words"),
    [
        ((), "", SpecError, "disk: is missing"),
        (("disk", "initrd"), "", SpecError, "kernel: is missing"),
        (("disk",), "quiet", SpecError, "kernel: is missing"),
        (("kernel",), "a\nb", SpecError, "append"),
        (("kernel",), "x" * 3000, SpecError, "append"),
        (("rubbish",), "", ImageError, "not a kernel"),
        (("empty",), "", ImageError, "is empty"),
        (("missing",), "", HostError, "No such file"),
    ],
)
async def test_what_does_not_make_an_image(
    store: ImageStore, db: Records, disk: Path, tmp_path: Path,
    files: tuple[str, ...], append: str, error: type[Exception], words: str,
) -> None:  # fmt: skip
    contents = {"kernel": bzimage(), "initrd": b"cpio", "rubbish": b"MZ" + bytes(600), "empty": b""}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    kernels = [tmp_path / f for f in files if f not in ("disk", "initrd")]
    with pytest.raises(error, match=words):
        await store.import_disk(
            disk if "disk" in files else None,
            kernel=kernels[0] if kernels else None,
            initrd=tmp_path / "initrd" if "initrd" in files else None,
            append=append,
            name="bad",
        )
    assert db == {}
    assert not store.root.exists() or published(store) == set()


async def test_a_refused_disk_leaves_nothing(store: ImageStore, db: Records, tmp_path: Path) -> None:
    evil = tmp_path / "evil.qcow2"
    qcow2.create_overlay(evil, size=MIB, backing=Path("/etc/shadow"), backing_format="raw")
    with pytest.raises(ImageError, match="backing file"):
        await store.import_disk(evil, name="evil")
    assert (published(store), db) == (set(), {})


async def test_the_same_content_is_one_image_with_two_names(store: ImageStore, db: Records, disk: Path) -> None:
    one = await store.import_disk(disk, name="one")
    two = await store.import_disk(disk, name="two")
    assert one.digest == two.digest
    assert two.names == ("one:latest", "two:latest")
    assert published(store) == {one.digest} == set(db)


async def test_a_name_moves_to_the_newer_image(store: ImageStore, disk: Path) -> None:
    old = await store.import_disk(disk, name="app:1")
    patch(disk, 0, b"changed")
    new = await store.import_disk(disk, name="app:1")
    assert store.resolve("app:1") == new
    left = store.resolve(old.digest)
    assert left is not None and left.names == ()
    assert [image.digest for image in store.list()] == [new.digest, old.digest]


async def test_remove(store: ImageStore, db: Records, disk: Path) -> None:
    image = await store.import_disk(disk, name="one")
    await store.import_disk(disk, name="two")
    await store.remove("two:latest")
    assert db[image.digest].names == ("one:latest",)
    with pytest.raises(InUse, match="vm1"):
        await store.remove("one:latest", users=lambda digest: ["vm1"] if digest == image.digest else [])
    await store.verify(image)
    await store.remove(image.digest, users=lambda digest: [])
    assert (published(store), db) == (set(), {})
    with pytest.raises(NotFound):
        await store.remove("one")


@needs_qemu_img
async def test_export_and_import_again_is_the_same_image(store: ImageStore, disk: Path, tmp_path: Path) -> None:
    image = await store.import_disk(disk, name="one")
    for format in ("raw", "qcow2"):
        out = tmp_path / f"out.{format}"
        await store.export("one", out, format)
        assert (await store.import_disk(out, name="back")).digest == image.digest
        with pytest.raises(AlreadyExists):
            await store.export("one", out, format)
    with pytest.raises(NotFound):
        await store.export("nothing", tmp_path / "x", "raw")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
async def test_verify_finds_damage(store: ImageStore, disk: Path, damage: str) -> None:
    image = await store.import_disk(disk, name="one")
    path = store.folder(image) / "disk.raw"
    store.folder(image).chmod(0o755)
    path.chmod(0o644)
    if damage == "flip":
        patch(path, MIB + 5, b"?" * 8)
    elif damage == "truncate":
        os.truncate(path, GIB - 512)
    elif damage == "remove":
        path.unlink()
    else:
        manifest = store.folder(image) / MANIFEST
        manifest.chmod(0o644)
        manifest.write_text(manifest.read_text().replace("x86_64", "aarch64"))
    with pytest.raises(ImageError, match="manifest" if damage == "manifest" else "disk.raw"):
        await store.verify(image)


# Building, with a stand-in for mmdebstrap's work.


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the build of a Debian image by writing three small files; returns what was built."""
    built: list[str] = []

    async def fill(partial: Partial, suite: str, *, size: int | None, arch: str, **_: object) -> Manifest:
        await asyncio.sleep(0)
        built.append(suite)
        folder = partial.path
        (folder / "disk.raw").write_bytes(suite.encode() * 100_000)
        (folder / KERNEL).write_bytes(bzimage())
        (folder / MODULES).write_bytes(pack_modules([("virtio.ko", b"\x7fELF")]))
        files = measure(folder, ["disk.raw", KERNEL, MODULES], stop=SimpleNamespace(is_set=bool), done=id)  # type: ignore[arg-type]
        return Manifest(arch=arch, files=files, disk="disk.raw", kernel=KERNEL, modules=MODULES, agent=True)

    monkeypatch.setattr(stores, "fill_debian", fill)
    return built


async def test_ensure_builds_what_is_not_there_once(store: ImageStore, builds: list[str]) -> None:
    first = await store.ensure("debian:12")
    assert await store.ensure("debian:bookworm") == await store.ensure("debian") == first
    assert builds == ["bookworm"]
    assert first.agent and first.names == ("debian:12",)
    initrd = store.initrd_for(first)
    assert initrd is not None and b"\x7fELF agent" in initrd.read_bytes()


async def test_two_who_want_one_image_build_it_once(
    store: ImageStore, db: Records, builds: list[str], agent: Path
) -> None:
    other = ImageStore(store.root, db, agent=lambda arch: agent)
    one, two = await asyncio.gather(store.ensure("debian:12"), other.ensure("debian:12"))
    assert one == two
    assert builds == ["bookworm"]


async def test_ensure_waits_for_another_process(store: ImageStore, builds: list[str]) -> None:
    store.root.mkdir(parents=True)
    waiting = asyncio.Event()

    def progress(fraction: float | None, message: str) -> None:
        if "waiting" in message:
            waiting.set()

    lock = os.open(store.root / ".build-debian-12.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    task = asyncio.create_task(store.ensure("debian:12", progress))
    await waiting.wait()
    assert builds == []
    os.close(lock)
    assert (await task).names == ("debian:12",)


async def test_ensure_does_not_invent_images(store: ImageStore, builds: list[str]) -> None:
    with pytest.raises(NotFound):
        await store.ensure("nothing:1")
    with pytest.raises(SpecError, match="not a release"):
        await store.ensure("debian:99")
    with pytest.raises(SpecError):
        await store.ensure("../x")
    with pytest.raises(SpecError, match="cannot build"):
        await store.build("fedora:40")
    with pytest.raises(SpecError, match="arch"):
        await store.build("debian:12", arch="mips")
    with pytest.raises(SpecError, match="packages"):
        await store.build("debian:12", packages=["-o", "x"])
    assert builds == []


async def test_a_build_with_packages_can_have_its_own_name(store: ImageStore, builds: list[str]) -> None:
    image = await store.build("debian:12", packages=["python3"], name="py")
    assert (image.names, image.source) == (("py:latest",), "debian:12 + python3")
    assert store.resolve("debian:12") is None


@pytest.mark.parametrize("error", [HostError("no"), OSError(28, "No space left on device"), asyncio.CancelledError()])
async def test_a_failed_build_leaves_nothing(
    store: ImageStore, db: Records, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    async def fill(partial: Partial, suite: str, **_: object) -> Manifest:
        (partial.path / "disk.raw").write_bytes(b"half")
        scratch = partial.scratch()
        (scratch / "tree").mkdir()
        (scratch / "tree" / "file").write_text("x")
        raise error

    monkeypatch.setattr(stores, "fill_debian", fill)
    with pytest.raises(type(error)):
        await store.build("debian:12")
    assert (published(store), db) == (set(), {})


# Crashes.

CRASH = """
import asyncio, sys
from pathlib import Path
from posada.images import store as stores
from posada.images.store import ImageStore
class Records(dict):
    list_images = lambda self: list(self.values())
    put_image = lambda self, image: self.__setitem__(image.digest, image)
async def fill(partial, suite, **_):
    (partial.path / "disk.raw").write_bytes(b"half")
    (partial.scratch() / "file").write_text("x")
    print(partial.path.name, flush=True)
    await asyncio.Event().wait()
stores.fill_debian = fill
asyncio.run(ImageStore(Path(sys.argv[1]), Records()).build("debian:12"))
"""


def test_what_a_killed_builder_left_is_removed_and_a_living_one_is_left_alone(store: ImageStore) -> None:
    maker = subprocess.Popen([sys.executable, "-c", CRASH, store.root], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    with maker.stdout:
        name = maker.stdout.readline().strip()
        assert store.collect_garbage() == []
        assert (store.root / name / "scratch" / "file").exists()
        maker.send_signal(signal.SIGKILL)
        maker.wait()
    assert len(store.collect_garbage()) == 1
    assert published(store) == set()
    assert store.collect_garbage() == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As an ordinary user, whose scratch directories lie elsewhere."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("posada.images.partial.os.geteuid", lambda: 4711)
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def test_scratch_directories_elsewhere_are_found_again(tmp_path: Path, place: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    made = Partial(root)
    (made.scratch() / "file").write_text("x")
    assert len(list(place.iterdir())) == 1
    made.drop_scratch()
    assert list(place.iterdir()) == []
    (made.scratch() / "file").write_text("x")
    made.close()
    assert list(place.iterdir()) == list(root.glob(".partial-*")) == []


def test_a_forged_scratch_link_removes_nothing(tmp_path: Path, place: Path) -> None:
    root = tmp_path / "images"
    victim = tmp_path / "victim"
    victim.mkdir()
    (root / ".partial-abc").mkdir(parents=True)
    (root / ".partial-abc" / "scratch").symlink_to(victim)
    (root / ".partial-def").mkdir()
    (place / "posada-build-4711-x").symlink_to(victim)
    (root / ".partial-def" / "scratch").symlink_to(place / "posada-build-4711-x")
    ImageStore(root, Records()).collect_garbage()
    assert victim.is_dir()
    assert list(root.glob(".[pt]*")) == []


async def test_an_image_without_a_record_comes_back(store: ImageStore, db: Records, disk: Path) -> None:
    image = await store.import_disk(disk, name="one")
    db.clear()
    assert store.collect_garbage() == [f"found image {image.digest[:12]} again"]
    assert db[image.digest] == image


async def test_a_record_without_an_image_goes(store: ImageStore, db: Records, disk: Path) -> None:
    image = await store.import_disk(disk, name="one")
    os.rename(store.folder(image), store.root / ".trash-1")  # killed between the two steps of a removal
    assert len(store.collect_garbage()) == 2
    assert (published(store), db) == (set(), {})


async def test_a_damaged_image_without_a_record_is_left_for_people(store: ImageStore, db: Records, disk: Path) -> None:
    image = await store.import_disk(disk, name="one")
    manifest = store.folder(image) / MANIFEST
    manifest.chmod(0o644)
    manifest.write_text("{}")
    db.clear()
    (said,) = store.collect_garbage()
    assert "left an image alone" in said
    assert store.folder(image).is_dir() and db == {}


async def test_a_manifest_cannot_name_files_elsewhere(store: ImageStore, disk: Path) -> None:
    from posada.images import manifest as manifests

    image = await store.import_disk(disk, name="one")
    data = json.loads((store.folder(image) / MANIFEST).read_bytes())
    data["files"]["../../../etc/passwd"] = data["files"].pop("disk.raw")
    encoded = json.dumps(data).encode()
    folder = store.root / manifests.digest_of(encoded)
    folder.mkdir()
    (folder / MANIFEST).write_bytes(encoded)
    with pytest.raises(ImageError, match="names a file"):
        manifests.load(folder, folder.name)


def test_the_collector_sees_no_half_made_lock(tmp_path: Path) -> None:
    """Under the store's lock a directory is made and locked at once; so what is unlocked is abandoned."""
    made = Partial(tmp_path)
    assert abandoned(tmp_path) == []
    path = made.path
    made.close()
    assert not path.exists()


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "posada-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def to_qcow2(raw: Path) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    path = raw.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_a_full_disk_while_importing(small_disk: Path, db: Records, tmp_path: Path, format: str) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(5 * MIB))
    if format == "qcow2":
        source = to_qcow2(source)
    store = ImageStore(small_disk / "images", db)
    with pytest.raises(HostError, match="disk is full"):
        await store.import_disk(source, name="big")
    assert (published(store), db) == (set(), {})


async def test_a_full_disk_while_building(small_disk: Path, db: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    async def build(suite: str, files: DebianFiles, *, scratch: Path, progress: Progress, **_: object) -> None:
        files.disk.write_bytes(bytes(4096))
        files.modules.write_bytes(b"")
        files.kernel.write_bytes(b"\x7fELF")
        small_disk.joinpath("filler").write_bytes(bytes(1 << 20))

    monkeypatch.setattr("posada.images.contents.build_debian", build)
    monkeypatch.setattr("posada.images.contents.bootable", lambda kernel: os.urandom(1_500_000))
    store = ImageStore(small_disk / "images", db)
    with pytest.raises(HostError, match="disk is full"):
        await store.build("debian:12")
    assert (published(store), db) == (set(), {})
