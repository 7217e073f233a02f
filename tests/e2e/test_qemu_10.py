"""QEMU 10 (Debian 12's backports) beside 7.2: the same engine, and snapshots from one version to the next."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from backports import newer_qemu
from qemu_kit import Kit

from posada.engine.qemu.engine import QemuEngine
from posada.errors import Unsupported

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def newer(image: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="posada-qemu10-") as target:
        Path(target).chmod(0o755)
        yield newer_qemu(ROOT / ".cache/qemu-backports", Path(target))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kit(places: tuple[Path, Path], newer: Path) -> AsyncIterator[Kit]:
    found = await Kit.open(*places, "debian:12")
    yield found
    await found.close()


def engine(kit: Kit, monkeypatch: pytest.MonkeyPatch, program: Path | None) -> tuple[int, ...]:
    """From now on ``kit`` uses that QEMU (None: the system's). Returns its version."""
    if program is None:
        monkeypatch.delenv("POSADA_QEMU", raising=False)
    else:
        monkeypatch.setenv("POSADA_QEMU", str(program))
    kit.engine = QemuEngine(kit.folder)
    probe = kit.engine.probe()
    assert probe.ok, probe.detail
    return tuple(int(part) for part in probe.facts["version"].split("."))


async def test_start_exec_fork_of_a_fork_capture_restore(
    kit: Kit, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine(kit, monkeypatch, newer) >= (10,)
    source = await kit.boot()
    nonce = secrets.token_hex(16)
    await kit.sh(source, f"echo {nonce} > /run/nonce; echo {nonce} > /nonce")
    (child,) = await kit.fork(source)
    assert await kit.sh(child, "cat /run/nonce; echo child > /run/nonce; sync") == f"{nonce}\n"
    (grandchild,) = await kit.fork(child)
    assert await kit.sh(grandchild, "cat /run/nonce /nonce") == f"child\n{nonce}\n"
    snapshot, chain = await kit.capture(source, "ten")
    await kit.sh(source, "echo later > /run/nonce")
    restored = await kit.restore(snapshot, chain)
    assert await kit.sh(restored, "cat /run/nonce") == f"{nonce}\n"
    assert await kit.sh(source, "cat /run/nonce") == "later\n"
    for box in (grandchild, child, restored, source):
        await kit.end(box)


async def test_a_snapshot_goes_to_a_newer_qemu_and_not_to_an_older(
    kit: Kit, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a host's QEMU is upgraded below the snapshots that it keeps; and a snapshot that is taken to an older host."""
    old = engine(kit, monkeypatch, None)
    source = await kit.boot()
    nonce = secrets.token_hex(16)
    await kit.sh(source, f"echo {nonce} > /run/nonce")
    snapshot, chain = await kit.capture(source, "old")
    await kit.end(source)

    assert engine(kit, monkeypatch, newer) > old
    upgraded = await kit.restore(snapshot, chain)
    assert await kit.sh(upgraded, "cat /run/nonce; echo more > /run/nonce") == f"{nonce}\n"
    again, below = await kit.capture(upgraded, "again")
    await kit.end(upgraded)
    native = await kit.boot()
    snapshot, chain = await kit.capture(native, "native")
    await kit.end(native)

    engine(kit, monkeypatch, None)
    back = await kit.restore(again, below)
    assert await kit.sh(back, "cat /run/nonce") == "more\n"
    await kit.end(back)
    with pytest.raises(Unsupported, match="newer QEMU"):
        await kit.restore(snapshot, chain)
