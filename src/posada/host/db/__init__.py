"""state.db: what the house remembers. SQLite in WAL mode, opened by any number of processes at once."""

from posada.host.db.database import Database

__all__ = ["Database"]
