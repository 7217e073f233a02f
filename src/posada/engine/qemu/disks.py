"""Changing the block graph of a running machine: new layers, new disks."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posada.engine.base import DiskFile, NewLayer
from posada.engine.qemu.argv import blockdev
from posada.engine.qemu.files import open_file
from posada.engine.qemu.layout import Layout
from posada.engine.qemu.qmp import Session
from posada.errors import EngineError


def new_node(slot: int) -> str:
    """A node name that says whose it is, and is not used yet."""
    return f"d{slot}-{secrets.token_hex(6)}"


async def give_file(session: Session, path: Path, *, writable: bool) -> int:
    """Open a file for QEMU. Returns its fdset, which QEMU drops by itself once nothing uses it."""
    fdset: int | None = None
    for mode in (True, False) if writable else (False,):
        fd = open_file(path, writable=mode)
        try:
            fdset = await session.add_fd(fd, fdset=fdset)
        finally:
            os.close(fd)
    if fdset is None:
        raise EngineError(f"nothing was opened of {path}")
    return fdset


async def add_node(
    session: Session, path: Path, format: str, *, node: str, backing: str | None, writable: bool
) -> None:
    """Add a file and its format on top. On failure neither is there. Raises EngineError, HostError, ImageError."""
    fdset = await give_file(session, path, writable=writable)
    file, top = blockdev(node, format, fdset, backing=backing, writable=writable)
    await session.execute("blockdev-add", **file)
    try:
        await session.execute("blockdev-add", **top)
    except BaseException:
        await remove_node(session, f"{node}-f")
        raise


async def remove_node(session: Session, node: str) -> None:
    """Best effort: for undoing."""
    with contextlib.suppress(EngineError):
        await session.execute("blockdev-del", node_name=node)


async def current_node(session: Session, name: str) -> str:
    """The node a disk writes to. Raises EngineError when it has no such disk."""
    for entry in await session.execute("query-block"):
        if f"/disk-{name}/" in entry.get("qdev", "") + "/" and "inserted" in entry:
            return str(entry["inserted"]["node-name"])
    raise EngineError(f"the machine has no disk named {name!r}")


class Switch:
    """Putting new layers on disks: `prepare` while the machine runs, `commit` inside the pause.

    ``switched`` names the disks that are on their new layers.
    """

    def __init__(self, session: Session, layout: Layout, layers: Sequence[NewLayer]) -> None:
        self._session, self._layout, self._layers = session, layout, layers
        self._nodes: dict[str, str] = {}
        self._actions: list[dict[str, Any]] = []
        self.switched: tuple[str, ...] = ()

    async def prepare(self) -> None:
        """Open the new layers. On failure nothing has changed."""
        try:
            if self._layers:
                await remove_strays(self._session)
            for layer in self._layers:
                node = new_node(self._layout.slot(layer.disk))
                await add_node(self._session, layer.path, layer.format, node=node, backing=None, writable=True)
                self._nodes[layer.disk] = node
                data = {"node": await current_node(self._session, layer.disk), "overlay": node}
                self._actions.append({"type": "blockdev-snapshot", "data": data})
        except BaseException:
            await self.undo()
            raise

    async def commit(self) -> None:
        """All disks or none. Raises EngineError."""
        if self.switched or not self._actions:
            return
        await self._session.execute("transaction", timeout=60, actions=self._actions)
        self.switched = tuple(self._nodes)

    async def undo(self) -> None:
        """Close the new layers, unless they are in use already."""
        if self.switched:
            return
        for node in self._nodes.values():
            await remove_node(self._session, node)
            await remove_node(self._session, f"{node}-f")
        self._nodes.clear()


async def add_chain(session: Session, disk: DiskFile, slot: int) -> list[str]:
    """Open every file of a disk. Returns the nodes, lowest first; on failure none is left."""
    nodes: list[str] = []
    try:
        for i, (path, format) in enumerate(disk.chain):
            node = new_node(slot)
            writable = not disk.readonly and i == len(disk.chain) - 1
            backing = nodes[-1] if nodes else None
            await add_node(session, path, format, node=node, backing=backing, writable=writable)
            nodes.append(node)
    except BaseException:
        await remove_chain(session, nodes)
        raise
    return nodes


async def remove_chain(session: Session, nodes: Sequence[str]) -> None:
    """``nodes`` lowest first."""
    for node in reversed(nodes):
        await remove_node(session, node)
        await remove_node(session, f"{node}-f")


async def remove_strays(session: Session) -> None:
    """Close layers that nothing uses: a client opened them for a switch, and died before it.

    They hold a lock for writing on a file that the next fork freezes, and every child would be refused it.
    """
    graph = await session.execute("x-debug-query-block-graph")
    used = {edge["child"] for edge in graph["edges"]}
    for node in graph["nodes"]:
        if re.fullmatch(r"d\d+-[0-9a-f]{12}", node["name"]) and node["id"] not in used:
            await remove_node(session, node["name"])
            await remove_node(session, f"{node['name']}-f")


async def close_unused(session: Session) -> None:
    """Have QEMU close the files of layers that are no longer in any disk.

    It does so by itself only when no monitor is connected (monitor_fdset_cleanup), and the keeper always is.
    """
    nodes = await session.execute("query-named-block-nodes", flat=True)
    used = {int(n["file"].rpartition("/")[2]) for n in nodes if n["file"].startswith("/dev/fdset/")}
    for fdset in await session.execute("query-fdsets"):
        if fdset["fdset-id"] not in used:
            with contextlib.suppress(EngineError):
                await session.execute("remove-fd", fdset_id=fdset["fdset-id"])


async def remove_disk_nodes(session: Session, slot: int) -> None:
    """Every node of the disk that sat in ``slot``. The topmost goes first, whatever order they were made in."""
    while True:
        nodes = await session.execute("query-named-block-nodes", flat=True)
        names = [n["node-name"] for n in nodes if n["node-name"].startswith(f"d{slot}-")]
        removed = 0
        for name in names:
            with contextlib.suppress(EngineError):
                await session.execute("blockdev-del", node_name=name)
                removed += 1
        if not removed:
            return
