"""Merging a disk's upper layers into its top one while the machine runs: QEMU's stream job."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from posada.engine.base import DiskFile
from posada.engine.qemu.disks import close_unused, current_node, remove_chain, remove_strays
from posada.engine.qemu.qmp import Session
from posada.errors import EngineError
from posada.runtime.files import identity

#: Seconds for copying a chain's upper layers; a terabyte takes less on a slow disk, and what hangs must not hang us.
TIMEOUT = 4 * 3600.0


async def merge(session: Session, pid: int, disk: DiskFile, keep: int) -> tuple[int, ...]:
    """See `posada.engine.base.Capturer.merge`. ``pid``: QEMU's."""
    nodes = await _chain(session, disk.name)
    places = await _places(session, pid, disk, nodes)
    base = max((place for place in places if place < keep), default=None)
    if base is None:
        raise EngineError(f"disk {disk.name!r} does not stand on any of the layers to keep")
    if places.index(base) < len(nodes) - 2:
        before = nodes
        await _stream(session, nodes[-1], nodes[places.index(base)], str(disk.chain[base][0]))
        nodes = await _chain(session, disk.name)
        await remove_chain(session, [node for node in before if node not in nodes])
        places = [place for node, place in zip(before, places, strict=True) if node in nodes]
    # What the job wrote is in QEMU's caches, and the layers it was read from are about to be deleted.
    answer = await session.human(f"qemu-io {nodes[-1]} flush")
    if answer.strip():
        raise EngineError(f"disk {disk.name!r} could not be flushed", detail=answer.strip())
    await remove_strays(session)
    await close_unused(session)
    return tuple(places[:-1])


async def _stream(session: Session, top: str, base: str, name: str) -> None:
    job = f"merge-{secrets.token_hex(4)}"
    # backing_file is the name in the image's header: nobody here follows it, people's tools do.
    await session.execute(
        "block-stream", job_id=job, device=top, base_node=base, backing_file=name
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


async def _places(session: Session, pid: int, disk: DiskFile, nodes: list[str]) -> list[int]:
    """Where in ``disk.chain`` each node's file is: QEMU knows no names, so by what its descriptors are. Raises EngineError."""
    known = {identity(path): place for place, (path, _) in enumerate(disk.chain)}
    files = {n["node-name"]: n["file"] for n in await session.execute("query-named-block-nodes", flat=True)}
    sets = {entry["fdset-id"]: entry["fds"] for entry in await session.execute("query-fdsets")}
    places = []
    for node in nodes:
        number = files.get(f"{node}-f", "").removeprefix("/dev/fdset/")
        fds = sets.get(int(number), []) if number.isdigit() else []
        try:
            places.append(known[identity(f"/proc/{pid}/fd/{fds[0]['fd']}")])
        except (IndexError, KeyError, OSError):
            raise EngineError(f"disk {disk.name!r} has a layer that is not among the {len(known)} recorded") from None
    return places


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
