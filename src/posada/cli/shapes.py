"""What verbs print of records: the JSON that scripts rely on (documented in docs/cli.md) and the words people read.

A field that is here stays here, with its meaning, until the next major version. New ones may be added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posada.model.records import (
        Event,
        ImageRecord,
        OperationRecord,
        PortRecord,
        SnapshotRecord,
        VmRecord,
    )


def port(record: PortRecord) -> dict[str, Any]:
    return {"guest": record.guest, "host": record.host, "address": record.address, "protocol": record.protocol}


def vm(record: VmRecord) -> dict[str, Any]:
    """One machine in brief. Sizes in bytes, times in seconds since the epoch."""
    running = record.running
    return {
        "name": record.name,
        "uuid": record.uuid,
        "state": record.state.value,
        "image": record.spec.image,
        "engine": record.engine,
        "cpus": record.spec.cpus,
        "memory": record.spec.memory,
        "ports": [port(p) for p in running.ports] if running else [],
        "labels": dict(record.spec.labels),
        "created": record.created,
        "started": running.started if running else None,
        "parent": record.parent,
        "generation": record.generation,
        "ephemeral": record.spec.ephemeral,
        "exit": record.exit,
    }


def vm_in_full(record: VmRecord) -> dict[str, Any]:
    """One machine with all there is to know."""
    import msgspec

    running = record.running
    return {
        **vm(record),
        "digest": record.image,
        "accelerator": running.accelerator if running else None,
        "pid": running.process.pid if running else None,
        "macs": list(record.macs),
        "disks": [
            {"name": d.name, "size": d.size, "readonly": d.readonly, "layers": len(d.chain)} for d in record.disks
        ],
        "snapshot": record.head,
        "spec": msgspec.to_builtins(record.spec),
    }


def snapshot(record: SnapshotRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "id": record.id,
        "vm": record.vm,
        "kind": record.kind.value,
        "parent": record.parent,
        "created": record.created,
        "pause": record.pause,
        "memory_bytes": record.memory_bytes,
    }


def image(record: ImageRecord) -> dict[str, Any]:
    return {
        "digest": record.digest,
        "names": list(record.names),
        "arch": record.arch,
        "created": record.created,
        "size": record.size,
        "disk_size": record.disk_size,
        "agent": record.agent,
        "source": record.source,
    }


def operation(record: OperationRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "kind": record.kind,
        "target": record.target,
        "state": record.state.value,
        "progress": record.progress,
        "message": record.message,
        "error": record.error,
        "created": record.created,
        "updated": record.updated,
    }


def event(record: Event) -> dict[str, Any]:
    return {
        "id": record.id,
        "time": record.time,
        "kind": record.kind,
        "vm": record.vm,
        "name": record.name,
        "data": record.data,
    }


def ports_text(record: VmRecord) -> str:
    """``8080->80, 5353->53/udp``."""
    ports = record.running.ports if record.running else ()
    return ", ".join(f"{p.host}->{p.guest}" + ("/udp" if p.protocol == "udp" else "") for p in ports)
