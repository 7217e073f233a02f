# Generated from _async/host.py by scripts/unasync.py: edit that file, then run `python scripts/unasync.py`.
"""The host: where everything begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from posada.client._sync.images import Images
from posada.client._sync.operations import Events, Operations
from posada.client._sync.vm import VM
from posada.client._sync.vms import Vms
from posada.client._core import Core, engine_capabilities, open_core, shared_core
from posada.client._fields import SpecFields, build_spec
from posada.client._runtime import SyncRuntime
from posada.model.machine import MachineSpec

if TYPE_CHECKING:
    from posada.host.doctor import Check
    from posada.host.recovery import RecoverReport
    from posada.model.capabilities import Capabilities
    from posada.model.progress import Progress


class Host:
    """One computer that runs machines. Made by `posada.connect`; ``with`` closes it at the end.

    Closing it leaves every machine running, except the ephemeral ones made through it.
    """

    def __init__(self, rt: SyncRuntime, core: Core) -> None:
        self._rt = rt
        self._core = core
        self.vms = Vms(rt, core)
        self.images = Images(rt, core)
        self.operations = Operations(rt, core)
        self.events = Events(rt, core)

    def __repr__(self) -> str:
        return f"<posada.Host {str(self.home)!r}>"

    @property
    def home(self) -> Path:
        """The state directory."""
        return self._core.host.paths.home

    def run(
        self,
        image: str | None = None,
        *,
        spec: MachineSpec | Mapping[str, Any] | None = None,
        keep: bool = False,
        timeout: float | None = 60,
        progress: Progress | None = None,
        **fields: Unpack[SpecFields],
    ) -> VM:
        """As `posada.run`, on this host."""
        return self.vms.run(image, spec=spec, keep=keep, timeout=timeout, progress=progress, **fields)

    def capabilities(self, engine: str | None = None) -> Capabilities:
        """What an engine can do on this host; None: the one that posada chooses. Raises HostError, SpecError."""
        return self._rt.now(engine_capabilities, engine)

    def doctor(self) -> list[Check]:
        """What this host can do, measured: engines, tools, permissions, space. Each check with what would help."""
        return self._rt.now(self._core.host.doctor)

    def recover(self, *, rebuild: bool = False) -> RecoverReport:
        """Finish or roll back what was interrupted. ``rebuild`` makes the database anew from the ``vm.json`` files."""
        return self._rt.run(self._core.host.recover(rebuild=rebuild))

    def close(self) -> None:
        """Close the connection. Ephemeral machines made through it are deleted; all others live on."""
        self._rt.run(self._core.close())

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    url: str | None = None,
    *,
    token: str | None = None,
    home: Path | str | None = None,
    runtime: Path | str | None = None,
) -> Host:
    """Connect to this host (no ``url``), with its state in ``home`` and its sockets in ``runtime`` if they are given.

    Remote hosts (``url``, ``token``) are not there yet: Unsupported. Raises StateError if the state cannot be opened, and
    HostError.
    """
    rt = SyncRuntime()
    core = rt.run(
        open_core(url, home=Path(home) if home else None, runtime=Path(runtime) if runtime else None)
    )
    return Host(rt, core)


def run(
    image: str | None = None,
    *,
    spec: MachineSpec | Mapping[str, Any] | None = None,
    keep: bool = False,
    timeout: float | None = 60,
    progress: Progress | None = None,
    **fields: Unpack[SpecFields],
) -> VM:
    """Create a machine, start it, and return when it is ready.

    ``image`` such as ``"debian:12"`` is built if it is not there yet. ``spec`` is a whole spec, which the keyword
    fields (`SpecFields`) overrule. Unless ``keep``, the machine is ephemeral: deleted at the end of ``with``,
    when it stops, and with this process at the latest; `VM.keep` changes that later. ``timeout`` bounds the boot, in
    seconds. ``progress`` is called with a fraction (or None) and a message.

    Raises SpecError, Timeout, GuestGone, EngineError, HostError, ImageError; then nothing is left behind.
    """
    rt = SyncRuntime()
    core = rt.run(shared_core())
    wanted = build_spec(image, spec, {"ephemeral": not keep, **fields})
    record = rt.run(core.launch(wanted, progress=progress, timeout=timeout))
    return VM(rt, core, record, owned=True)


def create(
    image: str | None = None,
    *,
    spec: MachineSpec | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **fields: Unpack[SpecFields],
) -> VM:
    """Create a machine and leave it off. It lives until it is deleted (``with`` does that at its end).

    Raises SpecError, AlreadyExists, ImageError, HostError; then nothing is left behind.
    """
    rt = SyncRuntime()
    core = rt.run(shared_core())
    record = rt.run(core.create(build_spec(image, spec, fields), progress=progress))
    return VM(rt, core, record, owned=True)
