"""Merging a disk's upper layers into its top one while the machine runs: QEMU's stream job."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from posada.engine.base import DiskFile
from posada.engine.qemu.disks import close_unused, current_node, remove_chain, remove_strays
from posada.engine.qemu.qmp import Session
from posada.errors import EngineError

#: Seconds for copying a chain's upper layers; a terabyte takes less on a slow disk, and what hangs must not hang us.
TIMEOUT = 4 * 3600.0


async def merge(session: Session, disk: DiskFile, keep: int) -> int:
    """See `posada.engine.base.Capturer.merge`."""
    nodes = await _chain(session, disk.name)
    if len(nodes) > len(disk.chain):
        raise EngineError(f"disk {disk.name!r} has {len(nodes)} layers, not {len(disk.chain)}")
    if keep < len(nodes) - 1 == len(disk.chain) - 1:
        before = nodes
        await _stream(session, nodes, keep, str(disk.chain[keep - 1][0]))
        nodes = await _chain(session, disk.name)
        await remove_chain(session, [node for node in before if node not in nodes])
    # What the job wrote is in QEMU's caches, and the layers it was read from are about to be deleted.
    answer = await session.human(f"qemu-io {nodes[-1]} flush")
    if answer.strip():
        raise EngineError(f"disk {disk.name!r} could not be flushed", detail=answer.strip())
    await remove_strays(session)
    await close_unused(session)
    return len(nodes) - 1


async def _stream(session: Session, nodes: list[str], keep: int, base: str) -> None:
    job = f"merge-{secrets.token_hex(4)}"
    # backing_file is the name in the image's header: nobody here follows it, people's tools do.
    await session.execute(
        "block-stream", job_id=job, device=nodes[-1], base_node=nodes[keep - 1], backing_file=base
    )
    try:
        while True:
            event = await session.next_event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", timeout=TIMEOUT)
            if event["data"].get("device") == job:
                break
    except BaseException as error:
        with contextlib.suppress(EngineError):
            await asyncio.shield(session.execute("block-job-cancel", device=job, force=True))
        if isinstance(error, TimeoutError):
            raise EngineError(f"merging layers took longer than {TIMEOUT:g} s") from None
        raise
    if event["event"] != "BLOCK_JOB_COMPLETED" or "error" in event["data"]:
        raise EngineError("QEMU could not merge the layers", detail=str(event["data"].get("error", "cancelled")))


async def _chain(session: Session, name: str) -> list[str]:
    """The nodes of a disk's chain, lowest first."""
    graph = await session.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    ids = {node["name"]: node["id"] for node in graph["nodes"]}
    below = {edge["parent"]: edge["child"] for edge in graph["edges"] if edge["name"] == "backing"}
    at: int | None = ids[await current_node(session, name)]
    chain: list[str] = []
    while at is not None:
        chain.append(names[at])
        at = below.get(at)
    return chain[::-1]
