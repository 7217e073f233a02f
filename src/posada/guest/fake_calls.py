"""Calls of the fake agent."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from posada.errors import GuestError
from posada.model.exec import IdentityReset
from posada.model.files import FileType

if TYPE_CHECKING:
    from posada.guest.fake_agent import FakeGuest

_PAGE = 500
_TYPES = (
    (stat.S_ISREG, FileType.FILE), (stat.S_ISDIR, FileType.DIRECTORY), (stat.S_ISLNK, FileType.LINK),
    (stat.S_ISCHR, FileType.CHARACTER_DEVICE), (stat.S_ISBLK, FileType.BLOCK_DEVICE), (stat.S_ISFIFO, FileType.FIFO),
    (stat.S_ISSOCK, FileType.SOCKET),
)  # fmt: skip


async def answer(guest: FakeGuest, op: str, args: dict[str, Any]) -> dict[str, Any]:
    """Raises GuestError, OSError; LookupError, TypeError, ValueError for arguments that are wrong."""
    function = _OPS.get(op)
    if function is None:
        raise GuestError(f"no call {op!r}", errno_name="ENOSYS")
    return function(guest, args) or {}


def _describe(path: Path, info: os.stat_result) -> dict[str, Any]:
    kind = next(kind for test, kind in _TYPES if test(info.st_mode))
    return {
        "type": str(kind),
        "mode": stat.S_IMODE(info.st_mode),
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        **({"target": str(path.readlink())} if kind is FileType.LINK else {}),
    }


def _stat(guest: FakeGuest, args: dict[str, Any]) -> dict[str, Any]:
    path = guest.path(args["path"])
    info = path.stat() if args.get("follow") else path.lstat()
    return {**_describe(path, info), "uid": info.st_uid, "gid": info.st_gid}


def _list(guest: FakeGuest, args: dict[str, Any]) -> dict[str, Any]:
    path, after = guest.path(args["path"]), args.get("after", "")
    names = sorted(name for name in os.listdir(path) if name > after)
    entries = [{"name": name, **_describe(path / name, (path / name).lstat())} for name in names[:_PAGE]]
    return {"entries": entries, "more": len(names) > _PAGE}


def _mkdir(guest: FakeGuest, args: dict[str, Any]) -> None:
    parents = bool(args.get("parents"))
    guest.path(args["path"]).mkdir(args.get("mode", 0o755), parents=parents, exist_ok=parents)


def _remove(guest: FakeGuest, args: dict[str, Any]) -> None:
    path = guest.path(args["path"])
    if not path.is_dir() or path.is_symlink():
        path.unlink()
    elif args.get("recursive"):
        shutil.rmtree(path)
    else:
        path.rmdir()


def _identity_reset(guest: FakeGuest, args: dict[str, Any]) -> dict[str, Any]:
    identity = msgspec.convert(args, IdentityReset)
    if len(identity.entropy) != 64:
        raise GuestError("entropy is not 64 bytes", errno_name="EINVAL")
    return {"steps": guest.identity_reset(identity)}


def _metrics(guest: FakeGuest, args: dict[str, Any]) -> dict[str, Any]:
    pages = os.sysconf("SC_PAGE_SIZE")
    disk = shutil.disk_usage(guest.root)
    return {
        "uptime_ms": int(1000 * time.monotonic()),
        "load1": os.getloadavg()[0],
        "mem_total": pages * os.sysconf("SC_PHYS_PAGES"),
        "mem_available": pages * os.sysconf("SC_AVPHYS_PAGES"),
        "processes": len(guest.execs),
        "cpu_user_ms": int(1000 * os.times().user),
        "cpu_system_ms": int(1000 * os.times().system),
        "disk_total": disk.total,
        "disk_free": disk.free,
    }


def _execs(guest: FakeGuest, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "execs": [
            {"exec": number, "pid": job.process.pid, "argv0": job.argv0, "running": job.running}
            for number, job in guest.execs.items()
        ]
    }


def _time_set(guest: FakeGuest, args: dict[str, Any]) -> None:
    guest.clock_offset_ns = int(args["ns"]) - time.time_ns()


def _power(guest: FakeGuest, how: str) -> None:
    if guest.on_power is not None:
        guest.on_power(how)


_OPS: dict[str, Callable[[FakeGuest, dict[str, Any]], dict[str, Any] | None]] = {
    "ping": lambda guest, args: None,
    "stat": _stat,
    "list": _list,
    "mkdir": _mkdir,
    "remove": _remove,
    "rename": lambda guest, args: os.rename(guest.path(args["old"]), guest.path(args["new"])),
    "chmod": lambda guest, args: os.chmod(guest.path(args["path"]), args["mode"]),
    "chown": lambda guest, args: os.chown(guest.path(args["path"]), args["uid"], args["gid"]),
    "symlink": lambda guest, args: os.symlink(args["target"], guest.path(args["path"])),
    "execs": _execs,
    "metrics": _metrics,
    "time.set": _time_set,
    "sync": lambda guest, args: None,
    "freeze": lambda guest, args: None,
    "thaw": lambda guest, args: None,
    "fork.prepare": lambda guest, args: guest.fork_prepare(args["token"]),
    "fork.done": lambda guest, args: guest.fork_done(args["token"]),
    "identity.reset": _identity_reset,
    "disk.grow": lambda guest, args: None,
    "poweroff": lambda guest, args: _power(guest, "poweroff"),
    "reboot": lambda guest, args: _power(guest, "reboot"),
}
