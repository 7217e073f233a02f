"""What is put into a lab: Python packages, kernels, images of guests, and this checkout. Each is made once, by content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import posada
from posada.images import initrd, modules, sources
from posada.storage.tools import find_tool

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("POSADA_LAB_CACHE", ROOT / ".cache/lab"))

#: What making a lab takes of this computer, and the Debian packages it comes in.
TOOLS = {"mmdebstrap": "mmdebstrap", "apt-get": "apt", "dpkg-deb": "dpkg", "mke2fs": "e2fsprogs"}
#: The Python of the lab's Debian, whatever runs this.
PYTHON = "3.11"
#: Debian 12 has glibc 2.36: wheels for an older one will do.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "any")
#: Modules that tests load into guests: the power button's driver, and what shows its key to programs.
EXTRA = ("button", "evdev")
#: Of the ``dev`` extra, what running tests takes; the linters stay outside.
NOT_NEEDED = ("import-linter", "mypy", "ruff", "types-pyyaml")
#: Of the checkout, what the inner suites take. Tests of the repository itself run outside.
TREE = ("src", "tests", "bench", "scripts", "pyproject.toml")


def digest(*parts: object) -> str:
    """A short name for what is made of ``parts``."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def alone(say: Callable[[str], None]) -> Iterator[None]:
    """Nobody else makes or removes anything in the cache meanwhile. What somebody who was killed left half made goes first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "preparing.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("somebody else prepares a lab: waiting for that …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in CACHE.glob(".*"):
            shutil.rmtree(partial)
        yield


def sweep(*used: Path) -> None:
    """Remove what was made for earlier labs. ``used``: what this one's is."""
    for kind in ("python", "kernels", "data"):
        for path in CACHE.glob(f"{kind}-*"):
            if path not in used:
                shutil.rmtree(path)


@contextlib.contextmanager
def making(target: Path) -> Iterator[Path]:
    """A directory to fill, that becomes ``target`` at the end: a half-made one is never found there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run(*argv: str, cwd: Path | None = None) -> str:
    """Standard output. Raises RuntimeError with what the command said."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:4])} …: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def requirements() -> list[str]:
    """Of posada itself and of its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    return sorted(r for r in wanted if not r.startswith(NOT_NEEDED))


def python_packages() -> Path:
    """A directory for PYTHONPATH in the lab. Five seconds the first time."""
    wanted = requirements()
    target = CACHE / f"python-{digest(PYTHON, wanted)}"
    if not target.exists():
        with making(target) as folder:
            platforms = [f"--platform={platform}" for platform in PLATFORMS]
            run(
                sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
                f"--target={folder}", f"--python-version={PYTHON}", "--implementation=cp", "--only-binary=:all:",
                *platforms, *wanted,
            )  # fmt: skip
    return target


def kernels(suites: Sequence[str]) -> Path:
    """A directory with ``SUITE/vmlinuz``, ``SUITE/modules.tar`` (those of the boot) and ``SUITE/extra.tar`` (`EXTRA`):
    Debian's cloud kernels as they are packaged. posada's images keep only the vmlinux inside. Ten seconds the first time.
    """
    target = CACHE / f"kernels-{digest(suites, modules.BOOT, EXTRA)}"
    if not target.exists():
        with making(target) as folder:
            for suite in suites:
                _kernel(suite, folder / suite)
    return target


def _kernel(suite: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="posada-apt-") as scratch:
        base = Path(scratch)
        for name in ("lists/partial", "archives/partial", "debs"):
            (base / name).mkdir(parents=True)
        os.chmod(base, 0o755)  # apt downloads as a user of its own
        (base / "status").touch()
        configured = sources.read_sources()
        (base / "sources.list").write_text(sources.to_one_line(sources.sources_for(suite, configured)))
        options = [
            f"Dir::Etc::sourcelist={base}/sources.list", "Dir::Etc::sourceparts=/dev/null", f"Dir::State={base}",
            f"Dir::State::status={base}/status", f"Dir::Cache={base}", "APT::Architecture=amd64",
            "APT::Sandbox::User=root",
        ]  # fmt: skip
        apt = ["apt-get", "--quiet", "--quiet", *(f"--option={option}" for option in options)]
        run(*apt, "update")
        cache = ["apt-cache", *(f"--option={option}" for option in options)]
        depends = run(*cache, "depends", "--important", "linux-image-cloud-amd64")
        package = re.findall(r"Depends: (linux-image-\S+)", depends)[0]  # the plain name is a meta-package
        run(*apt, "download", package, cwd=base / "debs")
        (deb,) = (base / "debs").glob("*.deb")
        tree = base / "tree"
        run("dpkg-deb", "--extract", str(deb), str(tree))
        folder.mkdir()
        (image,) = tree.glob("boot/vmlinuz-*")
        shutil.copyfile(image, folder / "vmlinuz")
        (version,) = (*tree.glob("lib/modules/*"), *tree.glob("usr/lib/modules/*"))
        files = {str(p.relative_to(version)): p.read_bytes for p in version.rglob("*.ko*")}
        (folder / "modules.tar").write_bytes(initrd.pack_modules(modules.boot_modules(files)))
        extra = io.BytesIO()
        with tarfile.open(fileobj=extra, mode="w") as tar:
            for number, (module, elf) in enumerate(modules.boot_modules(files, wanted=EXTRA)):
                member = tarfile.TarInfo(f"{number}-{module}")  # to be loaded in order of name
                member.size = len(elf)
                tar.addfile(member, io.BytesIO(elf))
        (folder / "extra.tar").write_bytes(extra.getvalue())


def data_disk(images: Sequence[Path], kernels: Path) -> Path:
    """A raw ext4 disk with those image directories in ``images/`` and the kernels in ``kernels/``."""
    target = CACHE / f"data-{digest([path.name for path in images], kernels.name)}"
    if not target.exists():
        with making(target) as folder:
            tree = folder / "tree"
            (tree / "images").mkdir(parents=True)
            for image in images:
                shutil.copytree(image, tree / "images" / image.name, copy_function=_link)
            shutil.copytree(kernels, tree / "kernels", copy_function=_link)
            used = sum(p.stat().st_blocks * 512 for p in tree.rglob("*") if p.is_file())
            disk = folder / "data.raw"
            with open(disk, "xb") as file:
                file.truncate((used * 5 // 4 + (64 << 20)) & -4096)
            options = ["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d", str(tree)]
            run(find_tool("mke2fs", "e2fsprogs"), *options, str(disk))
            shutil.rmtree(tree)
    return target / "data.raw"


def _link(source: str, target: str) -> None:
    """A hard link where the file system has it: images are large, and immutable."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def image(host: posada.Host, ref: str) -> Path:
    """The directory of an image of that host; built if it is not there, or lacks modules that are loaded at boot today."""
    stamp = host.home / f"{ref.replace(':', '-')}.modules"
    current = stamp.exists() and stamp.read_text() == " ".join(modules.BOOT)
    found = next((i for i in host.images.list() if ref in i.names), None) if current else None
    if found is None:
        found = host.images.build(ref)
        stamp.write_text(" ".join(modules.BOOT))
    return host.home / found.record.path


def checkout() -> bytes:
    """This working tree as a tar, with the byte code that the lab's Python can use: compiling it there takes longer."""
    compiled = f".cpython-{PYTHON.replace('.', '')}"

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        if any(part.startswith(".") and len(part) > 1 for part in parts):
            return None
        if member.name.endswith(".pyc") and compiled not in member.name:
            return None
        if "posada-agent-" in member.name and not member.name.endswith("x86_64"):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in TREE:
            tar.add(ROOT / name, name, filter=wanted)
    return buffer.getvalue()
