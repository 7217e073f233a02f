"""`posada.engine.common.uncut`, under the name that this engine's modules use."""

from __future__ import annotations

from posada.engine.common.uncut import beside, in_thread, uncut

__all__ = ["beside", "in_thread", "uncut"]
