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


#: What the fields are, for docs/cli.md; tests/unit/test_cli_docs.py compares them with what is printed.
FIELDS: dict[str, dict[str, str]] = {
    "vm": {
        "name": "unique on the host",
        "uuid": "its identity for good",
        "state": "created, starting, running, paused, stopping, stopped, crashed or deleting",
        "image": "as it was asked for, or null",
        "engine": "what runs it",
        "cpus": "virtual processors",
        "memory": "bytes",
        "ports": "forwarded ports of a running machine: a list of *port*",
        "labels": "a map of texts",
        "created": "time",
        "started": "time, or null when it does not run",
        "parent": "uuid of the machine it was forked or cloned from, or null",
        "generation": "0, and one more for each fork it descends from",
        "ephemeral": "whether it ends with the process that made it",
        "exit": "how the last run ended, in words, or null",
    },
    "vm in full": {
        "digest": "of its image, or null",
        "accelerator": "kvm, tcg …, or null when it does not run",
        "pid": "of the process that runs it, or null",
        "macs": "a list of texts, one for each network interface",
        "disks": "a list of {name, size, readonly, layers}",
        "snapshot": "id of the snapshot it descends from, or null",
        "spec": "the whole spec (`posada help spec`), in bytes and seconds",
    },
    "port": {
        "guest": "port in the guest",
        "host": "port of this host",
        "address": "address of this host",
        "protocol": "tcp or udp",
    },
    "snapshot": {
        "name": "unique in its machine",
        "id": "unique on the host",
        "vm": "uuid of its machine",
        "kind": "full (with memory) or disks",
        "parent": "id of the snapshot before it, or null",
        "created": "time",
        "pause": "seconds the machine stood still for it",
        "memory_bytes": "bytes of memory that were saved",
    },
    "image": {
        "digest": "its identity: SHA-256, in hex",
        "names": "a list of name:tag",
        "arch": "x86_64 or aarch64",
        "created": "time",
        "size": "bytes it takes on this host",
        "disk_size": "bytes of its disk as the guest sees it",
        "agent": "whether posada's agent is in it",
        "source": "where it came from, in words",
    },
    "operation": {
        "id": "unique on the host",
        "kind": "what is done",
        "target": "to what",
        "state": "pending, running, done, failed or cancelled",
        "progress": "0 to 1",
        "message": "what it is at",
        "error": "why it failed, or null",
        "created": "time",
        "updated": "time",
    },
    "event": {
        "id": "grows; `posada events --after ID` goes on after it",
        "time": "time",
        "kind": "such as vm.started",
        "vm": "uuid, or null",
        "name": "of the machine, or null",
        "data": "a map; what is in it depends on the kind",
    },
}


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
