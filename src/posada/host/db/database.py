"""The connection, and one method per question. Short transactions; records in, records out."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from posada.errors import AlreadyExists, HostError, PosadaError, StateError
from posada.host.db.migrations import MIGRATIONS
from posada.model.records import (
    Event,
    ImageRecord,
    LayerRecord,
    OperationRecord,
    SnapshotRecord,
    VmRecord,
)

#: Seconds SQLite waits for another writer. Writers hold it for well below a millisecond.
BUSY_TIMEOUT = 10.0
#: How much history is kept.
MAX_EVENTS = 10_000
MAX_OPERATIONS = 1_000

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_vm = msgspec.json.Decoder(VmRecord)
_snapshot = msgspec.json.Decoder(SnapshotRecord)
_layer = msgspec.json.Decoder(LayerRecord)
_image = msgspec.json.Decoder(ImageRecord)
_operation = msgspec.json.Decoder(OperationRecord)
_mapping = msgspec.json.Decoder(dict[str, Any])


class Database:
    """One connection. Not for several threads at once.

    Every method raises StateError when the file is damaged, locked for longer than BUSY_TIMEOUT, or newer than this
    posada.
    """

    def __init__(self, path: Path) -> None:
        """Open, create or upgrade it. Raises StateError, HostError."""
        self.path = path
        self._depth = 0
        try:
            self._sql = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, cached_statements=64)
        except sqlite3.Error as error:
            raise HostError(f"cannot open {path}: {error}", hint="is the state directory yours?") from error
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._sql.close()
            raise

    @staticmethod
    def set_aside(path: Path) -> None:
        """Rename a damaged database, so that nothing is lost and a new one can be made."""
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.rename(path.with_name(f"{path.name}.damaged-{int(time.time())}{suffix}"))

    def close(self) -> None:
        self._sql.close()

    def _prepare(self) -> None:
        # WAL: readers never wait. NORMAL: a commit survives kill -9; only a power cut can lose the last ones, never
        # the file (sqlite.org/wal.html, "Performance Considerations").
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        self._sql.execute("PRAGMA synchronous = NORMAL")
        if version == len(MIGRATIONS):
            return
        self._sql.execute("PRAGMA journal_mode = WAL")
        with self.transaction():
            (version,) = self._sql.execute("PRAGMA user_version").fetchone()  # another process may have been faster
            if version > len(MIGRATIONS):
                raise StateError(
                    f"{self.path} was written by a newer posada (version {version}, this one knows {len(MIGRATIONS)})",
                    hint="upgrade posada",
                )
            for step in MIGRATIONS[version:]:
                for statement in step:
                    self._sql.execute(statement)
            self._sql.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                hint = "another process holds it: find it with fuser, and end it"
            elif "full" in text:
                raise HostError(f"cannot write {self.path}: {text}", hint="free some disk space") from error
            else:
                hint = "see the file's permissions; posada recover --rebuild makes it anew"
            raise StateError(f"state database {self.path}: {text}", hint=hint) from error
        except (sqlite3.DatabaseError, msgspec.DecodeError) as error:
            raise StateError(
                f"state database {self.path} is damaged: {error}",
                hint="posada recover --rebuild makes it anew from the vm.json files",
            ) from error

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[None]:
        """Everything inside is committed together, or not at all. Nests (the outermost commits). Never await inside.

        ``durable``: it survives a power cut as well, for a few milliseconds more: for what names a guest's data.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        with self._errors():
            if durable:
                self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0
                if durable:
                    self._sql.execute("PRAGMA synchronous = NORMAL")

    def _rows(self, query: str, *args: Any) -> list[Any]:
        with self._errors():
            return self._sql.execute(query, args).fetchall()

    def _run(self, query: str, *args: Any) -> sqlite3.Cursor:
        with self._errors():
            return self._sql.execute(query, args)

    def _insert(self, taken: PosadaError, query: str, *args: Any) -> None:
        with self._errors():
            try:
                self._sql.execute(query, args)
            except sqlite3.IntegrityError:
                raise taken from None

    def _all(self, decoder: msgspec.json.Decoder[T], query: str, *args: Any) -> list[T]:
        with self._errors():
            decode = decoder.decode
            return [decode(row[0]) for row in self._sql.execute(query, args)]

    def _one(self, decoder: msgspec.json.Decoder[T], query: str, *args: Any) -> T | None:
        found = self._all(decoder, query, *args)
        return found[0] if found else None

    # meta

    def meta(self, key: str) -> str | None:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        self._run("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)

    # vms

    def vms(self) -> list[VmRecord]:
        """All, by name."""
        return self._all(_vm, "SELECT data FROM vms ORDER BY name")

    def ephemeral_vms(self) -> list[VmRecord]:
        return self._all(_vm, "SELECT data FROM vms WHERE ephemeral")

    def vm(self, uuid: str) -> VmRecord | None:
        return self._one(_vm, "SELECT data FROM vms WHERE uuid = ?", uuid)

    def vm_named(self, name: str) -> VmRecord | None:
        return self._one(_vm, "SELECT data FROM vms WHERE name = ?", name)

    def vms_with_prefix(self, prefix: str) -> list[VmRecord]:
        """By the beginning of the uuid (hex digits and dashes only); at most two."""
        return self._all(_vm, "SELECT data FROM vms WHERE uuid >= ? AND uuid < ? LIMIT 2", prefix, prefix + "g")

    def has_vm_named(self, name: str) -> bool:
        return bool(self._rows("SELECT 1 FROM vms WHERE name = ?", name))

    def put_vm(self, vm: VmRecord) -> None:
        """Raises AlreadyExists when another vm has the name."""
        self._insert(
            AlreadyExists("vm", vm.name, hint="choose another name, or none to get a generated one"),
            """INSERT INTO vms VALUES (?, ?, ?, ?, ?) ON CONFLICT (uuid) DO UPDATE SET
               name = excluded.name, state = excluded.state, ephemeral = excluded.ephemeral, data = excluded.data""",
            vm.uuid,
            vm.name,
            vm.state.value,
            vm.owner is not None,
            _encode(vm),
        )

    def drop_vm(self, uuid: str) -> None:
        """The vm and its snapshots."""
        with self.transaction():
            self._run("DELETE FROM snapshots WHERE vm = ?", uuid)
            self._run("DELETE FROM vms WHERE uuid = ?", uuid)

    # snapshots

    def snapshots(self, vm: str | None = None) -> list[SnapshotRecord]:
        """Of one vm, or all; oldest first."""
        if vm is None:
            return self._all(_snapshot, "SELECT data FROM snapshots ORDER BY created")
        return self._all(_snapshot, "SELECT data FROM snapshots WHERE vm = ? ORDER BY created", vm)

    def snapshot(self, id: str) -> SnapshotRecord | None:
        return self._one(_snapshot, "SELECT data FROM snapshots WHERE id = ?", id)

    def put_snapshot(self, snapshot: SnapshotRecord) -> None:
        """Raises AlreadyExists when the vm has another one of that name."""
        self._insert(
            AlreadyExists("snapshot", snapshot.name, hint="choose another name"),
            """INSERT INTO snapshots VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
               name = excluded.name, data = excluded.data""",
            snapshot.id,
            snapshot.vm,
            snapshot.name,
            snapshot.created,
            _encode(snapshot),
        )

    def drop_snapshot(self, id: str) -> None:
        self._run("DELETE FROM snapshots WHERE id = ?", id)

    # layers

    def layers(self) -> list[LayerRecord]:
        return self._all(_layer, "SELECT data FROM layers")

    def layer(self, id: str) -> LayerRecord | None:
        return self._one(_layer, "SELECT data FROM layers WHERE id = ?", id)

    def put_layer(self, layer: LayerRecord) -> None:
        self._run("INSERT OR REPLACE INTO layers VALUES (?, ?)", layer.id, _encode(layer))

    def drop_layer(self, id: str) -> None:
        self._run("DELETE FROM layers WHERE id = ?", id)

    # images (the ImageDb protocol of posada.images)

    def list_images(self) -> list[ImageRecord]:
        return self._all(_image, "SELECT data FROM images ORDER BY created")

    def image(self, digest: str) -> ImageRecord | None:
        return self._one(_image, "SELECT data FROM images WHERE digest = ?", digest)

    def put_image(self, image: ImageRecord) -> None:
        self._run("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", image.digest, image.created, _encode(image))

    def drop_image(self, digest: str) -> None:
        self._run("DELETE FROM images WHERE digest = ?", digest)

    # operations

    def operations(self, limit: int = 100) -> list[OperationRecord]:
        """Newest first."""
        return self._all(_operation, "SELECT data FROM operations ORDER BY created DESC LIMIT ?", limit)

    def open_operations(self) -> list[OperationRecord]:
        """Those that are pending or running, oldest first."""
        return self._all(
            _operation, "SELECT data FROM operations WHERE state IN ('pending', 'running') ORDER BY created"
        )

    def operation(self, id: str) -> OperationRecord | None:
        return self._one(_operation, "SELECT data FROM operations WHERE id = ?", id)

    def put_operation(self, operation: OperationRecord, *, new: bool = False) -> None:
        self._run(
            """INSERT INTO operations (id, state, target, created, data) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id)
               DO UPDATE SET state = excluded.state, data = excluded.data""",
            operation.id,
            operation.state.value,
            operation.target,
            operation.created,
            _encode(operation),
        )
        if new:
            self._run(
                """DELETE FROM operations WHERE state NOT IN ('pending', 'running') AND created <
                   (SELECT created FROM operations ORDER BY created DESC LIMIT 1 OFFSET ?)""",
                MAX_OPERATIONS,
            )

    def request_cancel(self, id: str) -> None:
        self._run("UPDATE operations SET cancel = 1 WHERE id = ?", id)

    def cancel_requested(self, id: str) -> bool:
        rows = self._rows("SELECT cancel FROM operations WHERE id = ?", id)
        return bool(rows and rows[0][0])

    # events

    def add_event(self, kind: str, vm: str | None, name: str | None, data: dict[str, Any]) -> int:
        cursor = self._run(
            "INSERT INTO events (time, kind, vm, name, data) VALUES (?, ?, ?, ?, ?)",
            time.time(), kind, vm, name, _encode(data),
        )  # fmt: skip
        id = cursor.lastrowid or 0
        if id % 256 == 0:
            self._run("DELETE FROM events WHERE id <= ?", id - MAX_EVENTS)
        return id

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        rows = self._rows(
            "SELECT id, time, kind, vm, name, data FROM events WHERE id > ? ORDER BY id LIMIT ?", after, limit
        )
        with self._errors():
            return [Event(id=i, time=t, kind=k, vm=v, name=n, data=_mapping.decode(d)) for i, t, k, v, n, d in rows]

    def last_event(self) -> int:
        rows = self._rows("SELECT max(id) FROM events")
        return int(rows[0][0] or 0)

    def forget_all(self) -> None:
        """Forget what `posada.host.rebuild` finds again: vms, snapshots, layers."""
        with self.transaction():
            self._run("DELETE FROM vms")
            self._run("DELETE FROM snapshots")
            self._run("DELETE FROM layers")
