# Generated from _async/vm.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""One virtual machine as an object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Unpack, overload

from posada.client._sync.console import Console
from posada.client._sync.files import Files
from posada.client._sync.process import Process
from posada.client._sync.snapshot import Snapshot
from posada.client._sync.waiting import Waiter
from posada.client._console import ConsoleStream, follow_log, read_log
from posada.client._core import Core
from posada.client._exec import (
    background_argv,
    open_command,
    parse_command,
    run_command,
    shell_argv,
    spawn_command,
)
from posada.client._fields import ExecOptions
from posada.client._ports import Port, listen_tcp, port_table
from posada.client._runtime import SyncRuntime
from posada.errors import ForkError, NotFound
from posada.model.machine import DiskSpec, MachineSpec, PortSpec, parse_port
from posada.model.progress import quiet
from posada.model.records import SnapshotKind, VmRecord
from posada.model.states import State
from posada.model.units import parse_size

if TYPE_CHECKING:
    from posada.engine.base import Inspection, Usage
    from posada.model.exec import ExecResult
    from posada.model.progress import Progress


class VM:
    """A virtual machine. Made by `posada.run` and its kin, or found by ``host.vms.get``.

    ``with`` deletes a machine that was made here (run, create, fork, clone) at its end, unless it was kept; one
    that was found is left alone. Properties read the state as it is now.
    """

    def __init__(self, rt: SyncRuntime, core: Core, record: VmRecord, *, owned: bool = False) -> None:
        self._rt = rt
        self._core = core
        self._vms = core.host.vms
        self._owned = owned
        self.record = record
        """The whole record as it was last read; `refresh` reads it again."""
        self.uuid = record.uuid
        self.files = Files(rt, core, record.uuid)
        self.wait_for = Waiter(rt, core, record.uuid)

    def __repr__(self) -> str:
        return f"<posada.VM {self.record.name!r} {self.uuid[:8]} {self.record.state}>"

    def refresh(self) -> VmRecord:
        """Read the record again. Raises NotFound when the machine is deleted."""
        self.record = self._rt.now(self._vms.get, self.uuid)
        return self.record

    @property
    def name(self) -> str:
        """Its name, unique on the host."""
        return self.refresh().name

    @property
    def state(self) -> State:
        """What it is doing: created, starting, running, paused, stopping, stopped, crashed or deleting."""
        return self.refresh().state

    @property
    def spec(self) -> MachineSpec:
        """What was asked for."""
        return self.refresh().spec

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels of its spec."""
        return self.refresh().spec.labels

    @property
    def ports(self) -> Mapping[int, Port]:
        """Forwarded ports by guest port: ``vm.ports[8080].url``."""
        return port_table(self._rt.now(self._vms.ports, self.uuid))

    @property
    def snapshots(self) -> list[Snapshot]:
        """Its snapshots, oldest first."""
        records = self._rt.now(self._vms.snapshots, self.uuid)
        return [Snapshot(self._rt, self._core, record) for record in records]

    @property
    def has_agent(self) -> bool:
        """Whether posada's agent is in the guest, so that exec, files and fork's new identities work."""
        return self._rt.now(self._core.host.house.has_agent, self.record)

    # ------------------------------------------------------------------ commands

    @overload
    def exec(self, *argv: str, stream: Literal[False] = ..., **options: Unpack[ExecOptions]) -> ExecResult: ...

    @overload
    def exec(self, *argv: str, stream: Literal[True], **options: Unpack[ExecOptions]) -> Process: ...

    def exec(self, *argv: str, stream: bool = False, **options: Unpack[ExecOptions]) -> ExecResult | Process:
        """Run a command in the guest; no shell is involved. The options are those of `ExecOptions`.

        Without ``stream`` it returns when the command has ended, with its output. With ``stream`` it returns at once,
        with a `Process` to iterate over.

        Raises CommandError (``check`` and a status that is not 0), Timeout (the command is killed), GuestGone as soon
        as the guest is dead, GuestError if the command cannot be started, InvalidState unless the machine runs.
        """
        command = parse_command(argv, stream=stream, **options)
        if stream:
            return Process(self._rt, self._rt.run(open_command(self._vms, self.uuid, command)))
        return self._rt.run(run_command(self._vms, self.uuid, command))

    @overload
    def shell(
        self, script: str, *, stream: Literal[False] = ..., **options: Unpack[ExecOptions]
    ) -> ExecResult: ...

    @overload
    def shell(self, script: str, *, stream: Literal[True], **options: Unpack[ExecOptions]) -> Process: ...

    def shell(self, script: str, *, stream: bool = False, **options: Unpack[ExecOptions]) -> ExecResult | Process:
        """Run a script with the guest's ``/bin/sh``. Otherwise as `exec`."""
        command = parse_command(shell_argv(script), stream=stream, **options)
        if stream:
            return Process(self._rt, self._rt.run(open_command(self._vms, self.uuid, command)))
        return self._rt.run(run_command(self._vms, self.uuid, command))

    def spawn(
        self, *argv: str, cwd: str | None = None, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> int:
        """Start a command that goes on by itself, and return its process id in the guest.

        It outlives this connection. What it prints goes to the console, and so to `logs`; it reads /dev/null.
        """
        command = parse_command(background_argv(argv), stream=True, cwd=cwd, env=env, user=user)
        return self._rt.run(spawn_command(self._vms, self.uuid, command))

    # ------------------------------------------------------------------ life

    def start(self, *, wait: bool = True, timeout: float | None = 60, progress: Progress | None = None) -> None:
        """Start it; with ``wait`` (and posada's agent in the guest) return when it is ready, in ``timeout`` seconds."""
        self.record = self._rt.run(self._vms.start(self.uuid, progress=progress or quiet))
        if wait and self.has_agent:
            self.wait_ready(timeout=timeout)

    def wait_ready(self, *, timeout: float | None = 60) -> None:
        """Return when the guest's agent answers. Raises Timeout, and GuestGone if the guest died instead."""
        self._rt.run(self._vms.wait_ready(self.uuid, timeout=timeout))

    def stop(self, *, timeout: float = 30, force: bool = True) -> None:
        """Ask the guest to power off; after ``timeout`` seconds kill it (``force``) or raise Timeout."""
        self.record = self._rt.run(self._vms.stop(self.uuid, timeout=timeout, force=force))

    def kill(self) -> None:
        """End it at once, as if its power was cut."""
        self.record = self._rt.run(self._vms.kill(self.uuid))

    def pause(self) -> None:
        """Stop its processors."""
        self._rt.run(self._vms.pause(self.uuid))
        self.refresh()

    def resume(self) -> None:
        """Let its processors go on."""
        self._rt.run(self._vms.resume(self.uuid))
        self.refresh()

    def restart(self, *, wait: bool = True, timeout: float | None = 60) -> None:
        """Stop it and start it again."""
        self._rt.run(self._vms.restart(self.uuid))
        self.refresh()
        if wait and self.has_agent:
            self.wait_ready(timeout=timeout)

    def wait(self, *, timeout: float | None = None) -> State:
        """Wait until it does not run any more, and return the state it is in then. Raises Timeout."""
        self.record = self._rt.run(self._vms.wait(self.uuid, timeout=timeout))
        return self.record.state

    def delete(self, *, force: bool = True) -> None:
        """Delete it, its disks and its snapshots. Without ``force`` a machine that runs is refused (InvalidState)."""
        self._owned = False
        self._rt.run(self._vms.delete(self.uuid, force=force))
        self._core.ephemeral.discard(self.uuid)

    def keep(self) -> VM:
        """Let it live on after ``with`` and after this process. Returns the machine itself."""
        self._owned = False
        if self.refresh().spec.ephemeral:
            self.record = self._rt.run(self._core.keep(self.uuid))
        return self

    def close(self) -> None:
        """Let go of this object and leave the machine as it is: it lives on, as after `keep`."""
        try:
            self.keep()
        except NotFound:
            pass

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            self._owned = False
            self._rt.run(self._core.delete(self.uuid))

    # ------------------------------------------------------------------ branches

    def snapshot(
        self, name: str | None = None, *, kind: SnapshotKind | str | None = None, progress: Progress | None = None
    ) -> Snapshot:
        """Take a point to return to.

        ``kind``: ``full`` is memory, devices and disks; ``disks`` is the disks only. None is what the state allows:
        full for a running machine. Raises AlreadyExists, Unsupported, HostError (no space).
        """
        wanted = None if kind is None else SnapshotKind(kind)
        record = self._rt.run(self._vms.snapshot(self.uuid, name, kind=wanted, progress=progress or quiet))
        return Snapshot(self._rt, self._core, record)

    def restore(self, snapshot: Snapshot | str, *, progress: Progress | None = None) -> None:
        """Return to a snapshot, in place: same machine, same identity. What came after it is lost."""
        ref = snapshot if isinstance(snapshot, str) else snapshot.id
        self.record = self._rt.run(self._vms.restore(self.uuid, ref, progress=progress or quiet))

    def delete_snapshot(self, snapshot: Snapshot | str, *, recursive: bool = False) -> None:
        """Delete a snapshot; with ``recursive`` also all that descend from it. Raises InUse otherwise, naming them."""
        ref = snapshot if isinstance(snapshot, str) else snapshot.id
        self._rt.run(self._vms.delete_snapshot(self.uuid, ref, recursive=recursive))

    def fork(
        self,
        n: int = 1,
        *,
        snapshot: Snapshot | str | None = None,
        names: Sequence[str] | None = None,
        ephemeral: bool | None = None,
        same_identity: bool = False,
        progress: Progress | None = None,
    ) -> list[VM]:
        """``n`` new machines from this running one (or from a snapshot of it), ready, in order.

        Memory and disks are shared copy-on-write; each child has a new identity, and this machine goes on. Forks of an
        ephemeral machine are ephemeral unless ``ephemeral`` says otherwise. ``same_identity``: nothing is changed inside
        the guest, so all copies have the same random numbers to come, hostname, machine-id, addresses, connections and
        time; for guests without posada's agent there is no other way. Raises ForkError when some children failed:
        its ``.vms`` holds the survivors.
        """
        ref = snapshot if isinstance(snapshot, str) or snapshot is None else snapshot.id
        try:
            records = self._rt.run(
                self._vms.fork(
                    self.uuid,
                    n,
                    snapshot=ref,
                    names=names,
                    ephemeral=ephemeral,
                    same_identity=same_identity,
                    progress=progress or quiet,
                )
            )
        except ForkError as error:
            self._core.adopt(error.vms)
            survivors = [VM(self._rt, self._core, record, owned=True) for record in error.vms]
            what = f"{len(error.failures)} of {n} forks of {self.record.name!r} failed"
            raise ForkError(what, vms=survivors, failures=error.failures) from error
        self._core.adopt(records)
        return [VM(self._rt, self._core, record, owned=True) for record in records]

    def clone(self, name: str | None = None, *, snapshot: Snapshot | str | None = None) -> VM:
        """A new machine, off, with the disks of this one (which must be off) or of a snapshot of it."""
        ref = snapshot if isinstance(snapshot, str) or snapshot is None else snapshot.id
        record = self._rt.run(self._vms.clone(self.uuid, name=name, snapshot=ref))
        self._core.adopt([record])
        return VM(self._rt, self._core, record, owned=True)

    # ------------------------------------------------------------------ changes

    def resize(
        self, *, cpus: int | None = None, memory: int | str | None = None, disk: tuple[str, int | str] | None = None
    ) -> None:
        """Change processors, memory, or the size of a disk: ``disk=("root", "20GiB")``; disks only grow."""
        size = None if memory is None else parse_size(memory, field="memory")
        grown = None if disk is None else (disk[0], parse_size(disk[1], field="disk"))
        self.record = self._rt.run(self._vms.resize(self.uuid, cpus=cpus, memory=size, disk=grown))

    def attach_disk(
        self, name: str, *, size: int | str | None = None, source: str | None = None, readonly: bool = False
    ) -> None:
        """Add a disk: an empty one of ``size``, or a copy of the qcow2 or raw file ``source``."""
        length = None if size is None else parse_size(size)
        disk = DiskSpec(name=name, size=length, source=source, readonly=readonly)
        self.record = self._rt.run(self._vms.attach_disk(self.uuid, disk))

    def detach_disk(self, name: str) -> None:
        """Take a disk away and delete it (snapshots keep theirs). Raises NotFound."""
        self.record = self._rt.run(self._vms.detach_disk(self.uuid, name))

    def add_port(self, port: int | str | PortSpec) -> Port:
        """Forward a host port: ``8080`` (any free host port), ``"80:8080"`` (host:guest)."""
        import msgspec

        spec = msgspec.convert(parse_port(port), PortSpec)
        return Port(self._rt.run(self._vms.add_port(self.uuid, spec)))

    def remove_port(self, guest: int) -> None:
        """Stop forwarding to that guest port. Raises NotFound."""
        self._rt.run(self._vms.remove_port(self.uuid, guest))

    def rename(self, name: str) -> None:
        """Give it another name. The guest keeps its host name until it starts again."""
        self.record = self._rt.run(self._vms.rename(self.uuid, name))

    # ------------------------------------------------------------------ looking at it

    def console(self) -> Console:
        """Open its serial console."""
        return Console(self._rt, self._rt.run(ConsoleStream.open(self._vms, self.uuid)))

    def logs(self) -> str:
        """What the console has said so far (its last MiB or two)."""
        return read_log(self._rt.now(self._vms.log, self.uuid)).decode(errors="replace")

    def follow_logs(self) -> Iterator[bytes]:
        """What the console has said so far, then what it says, until the machine does not run any more."""
        for data in self._rt.iterate(follow_log(self._vms, self.uuid)):
            yield data

    def inspect(self, *, registers: bool = False) -> Inspection:
        """What is inside it: exit counters, its devices' counters, its jail; ``registers``: what its processors do now.

        Raises InvalidState unless it runs, Unsupported.
        """
        return self._rt.run(self._vms.inspect(self.uuid, registers=registers))

    def debug(self, port: int = 0, *, address: str = "127.0.0.1") -> int:
        """Let gdb attach: ``target remote :PORT``. Returns the port; 0 takes any free one. One gdb at a time.

        Whoever reaches that port owns the guest. Raises InvalidState unless it runs, Unsupported, HostError.
        """
        with listen_tcp(address, port) as listener:
            self._rt.run(self._vms.debug(self.uuid, listener.fileno()))
            return int(listener.getsockname()[1])

    def usage(self) -> Usage:
        """What it uses of the host now: processor seconds and bytes of memory."""
        return self._rt.now(self._vms.usage, self.uuid)
