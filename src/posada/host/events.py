"""What happened, in order: a bounded table that any process can follow."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from posada.errors import HostError
from posada.host.db import Database
from posada.host.wakeup import Wakeups
from posada.model.records import Event, VmRecord

log = logging.getLogger(__name__)


class Events:
    """The events of one house. Readers resume after the last id they saw."""

    def __init__(self, db: Database, wakeups: Wakeups) -> None:
        self._db = db
        self._wakeups = wakeups

    def emit(self, kind: str, vm: VmRecord | None = None, /, **data: Any) -> None:
        """Record one and wake the followers. ``kind`` is what happened, such as ``vm.running``.

        It has happened: that it cannot be recorded (a full disk) is no reason to fail.
        """
        try:
            self._db.add_event(kind, vm.uuid if vm else None, vm.name if vm else None, data)
        except HostError as error:
            log.warning("event %s: %s", kind, error)
        self._wakeups.ring()

    def list(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """Oldest first, those after id ``after``."""
        return self._db.events(after, limit)

    async def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Every event after id ``after`` (None: from now on), as it happens, without end."""
        last = self._db.last_event() if after is None else after
        with self._wakeups.listen() as listener:
            while True:
                for event in self._db.events(last):
                    last = event.id
                    yield event
                if not self._db.events(last, 1):
                    await listener.changed()
