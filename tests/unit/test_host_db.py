"""state.db: migrations, damage, several processes, and what is bounded."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from posada.errors import AlreadyExists, HostError, StateError
from posada.host.db import Database, database, migrations
from posada.host.process import me
from posada.model.machine import make_spec
from posada.model.records import OperationRecord, OperationState, SnapshotKind, SnapshotRecord, VmRecord
from posada.model.states import State


def vm(number: int = 1, **fields: object) -> VmRecord:
    plain = {"uuid": f"{number:08x}-0000", "name": f"vm-{number}", "spec": make_spec(image="debian:12")}
    return VmRecord(**{**plain, "state": State.CREATED, "engine": "fake", **fields})  # type: ignore[arg-type]


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "state.db")


def test_a_record_comes_back_as_it_was(db: Database) -> None:
    one = vm(1, macs=("52:54:00:00:00:01",), owner=me(), created=1.5)
    db.put_vm(one)
    assert db.vm(one.uuid) == db.vm_named("vm-1") == one
    assert db.vms() == db.ephemeral_vms() == [one]
    assert db.vms_with_prefix("00000001") == [one]
    assert db.vms_with_prefix("00000002") == []
    assert db.vm("none") is None


def test_names_are_unique(db: Database) -> None:
    db.put_vm(vm(1))
    with pytest.raises(AlreadyExists):
        db.put_vm(vm(2, name="vm-1"))
    db.put_vm(vm(1, state=State.STARTING))
    snapshot = SnapshotRecord(
        id="a", vm=vm(1).uuid, name="s", kind=SnapshotKind.FULL, spec=vm().spec, disks=(), created=1.0
    )
    db.put_snapshot(snapshot)
    with pytest.raises(AlreadyExists):
        db.put_snapshot(SnapshotRecord(id="b", vm=snapshot.vm, name="s", kind=snapshot.kind, spec=vm().spec, disks=()))
    db.drop_vm(snapshot.vm)
    assert db.snapshot("a") is None


def test_a_transaction_is_all_or_nothing(db: Database) -> None:
    def two() -> None:
        with db.transaction(durable=True):
            db.put_vm(vm(1))
            with db.transaction():
                db.put_vm(vm(2))
            raise KeyError

    with pytest.raises(KeyError):
        two()
    assert db.vms() == []


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    Database(tmp_path / "state.db").close()
    raw = sqlite3.connect(tmp_path / "state.db")
    raw.execute(f"PRAGMA user_version = {len(migrations.MIGRATIONS) + 1}")
    raw.close()
    with pytest.raises(StateError, match="newer"):
        Database(tmp_path / "state.db")


def test_an_older_database_is_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Database(tmp_path / "state.db")
    old.put_vm(vm(1))
    old.close()
    step = ("CREATE TABLE more (x)",)
    monkeypatch.setattr(database, "MIGRATIONS", (*migrations.MIGRATIONS, step))
    new = Database(tmp_path / "state.db")
    assert new.vms() == [vm(1)]
    assert new._rows("PRAGMA user_version") == [(len(migrations.MIGRATIONS) + 1,)]
    new.close()


def test_a_failed_upgrade_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database(tmp_path / "state.db").close()
    monkeypatch.setattr(database, "MIGRATIONS", (*migrations.MIGRATIONS, ("CREATE TABLE more (x)", "NONSENSE")))
    with pytest.raises(StateError):
        Database(tmp_path / "state.db")
    monkeypatch.undo()
    kept = Database(tmp_path / "state.db")
    assert kept._rows("SELECT name FROM sqlite_master WHERE name = 'more'") == []
    kept.close()


@pytest.mark.parametrize(
    "junk", [b"not a database at all, but quite long" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "state.db").write_bytes(junk)
    with pytest.raises(StateError, match="rebuild"):
        Database(tmp_path / "state.db")
    Database.set_aside(tmp_path / "state.db")
    Database(tmp_path / "state.db").close()
    assert [p.read_bytes() for p in tmp_path.glob("state.db.damaged-*")] == [junk], "nothing is thrown away"


def test_a_row_that_is_no_record(db: Database) -> None:
    db.put_vm(vm(1))
    db._run("UPDATE vms SET data = '{\"uuid\": 3}'")
    with pytest.raises(StateError, match="damaged"):
        db.vms()


def test_no_place(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        Database(tmp_path / "missing/state.db")


def test_locked_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
    db, other = Database(tmp_path / "state.db"), Database(tmp_path / "state.db")
    with other.transaction():
        assert db.vms() == [], "readers never wait"
        with pytest.raises(StateError, match="locked"):
            db.put_vm(vm(1))
    db.put_vm(vm(1))
    assert other.vms() == [vm(1)]


def test_events_are_bounded(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MAX_EVENTS", 100)
    with db.transaction():
        for number in range(1000):
            db.add_event("test", None, None, {"n": number})
    assert len(db.events(limit=10_000)) <= 100 + 256
    last = db.events(after=998)
    assert [event.data["n"] for event in last] == [998, 999]
    assert db.last_event() == 1000


def test_finished_operations_are_bounded(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MAX_OPERATIONS", 10)

    def operation(number: int, state: OperationState) -> OperationRecord:
        return OperationRecord(
            id=str(number), kind="k", target="t", state=state, owner=me(), created=float(number), updated=0.0
        )

    with db.transaction():
        db.put_operation(operation(0, OperationState.RUNNING), new=True)
        for number in range(1, 50):
            db.put_operation(operation(number, OperationState.DONE), new=True)
    assert len(db.operations(1000)) <= 12
    assert [op.id for op in db.open_operations()] == ["0"], "what is not finished is never forgotten"
    assert not db.cancel_requested("0")
    db.request_cancel("0")
    assert db.cancel_requested("0")


def test_it_is_quick(tmp_path: Path) -> None:
    """The budgets of docs/ARCHITECTURE.md with room for a busy machine: open ≤ 5 ms, list of 1,000 ≤ 15 ms."""
    db = Database(tmp_path / "state.db")
    with db.transaction():
        for number in range(1000):
            db.put_vm(vm(number))
    db.close()
    opened, listed = [], []
    for _ in range(5):
        began = time.perf_counter()
        db = Database(tmp_path / "state.db")
        opened.append(time.perf_counter() - began)
        began = time.perf_counter()
        assert len(db.vms()) == 1000
        listed.append(time.perf_counter() - began)
        db.close()
    assert min(opened) < 0.005
    assert min(listed) < 0.015
