"""Where things are: the state directory (kept) and the runtime directory (gone after a reboot).

::

    <home>/state.db
    <home>/vms/<uuid>/vm.json, console.log, disks/, snapshots/<id>/
    <home>/layers/<id>.<format>         frozen disk layers
    <home>/images/<digest>/
    <runtime>/vms/<uuid>/               the engine's: sockets, pid records; ``activity``
    <runtime>/locks/, listeners/
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posada.errors import HostError, StateError

#: unix(7): a socket's path has at most 107 bytes; ours are ``<runtime>/vms/<uuid>/<at most 14>``.
MAX_RUNTIME = 107 - len("/vms/") - 36 - len("/") - 14


@dataclass(frozen=True)
class Paths:
    """All paths of one house. Nothing is made before `make`."""

    home: Path
    runtime: Path

    @classmethod
    def default(cls, home: Path | None = None, runtime: Path | None = None) -> Paths:
        """The arguments, else POSADA_HOME and POSADA_RUNTIME, else the system's (root) or the user's directories."""
        root = os.geteuid() == 0
        env = os.environ
        if home is None:
            if "POSADA_HOME" in env:
                home = Path(env["POSADA_HOME"])
            elif root:
                home = Path("/var/lib/posada")
            else:
                home = Path(env.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "posada"
        if runtime is None:
            if "POSADA_RUNTIME" in env:
                runtime = Path(env["POSADA_RUNTIME"])
            elif root:
                runtime = Path("/run/posada")
            elif "XDG_RUNTIME_DIR" in env:
                runtime = Path(env["XDG_RUNTIME_DIR"]) / "posada"
            else:
                runtime = Path(tempfile.gettempdir()) / f"posada-{os.geteuid()}"
        return cls(Path(os.path.abspath(home)), Path(os.path.abspath(runtime)))

    def make(self) -> None:
        """Make the directories that every process needs, private to the owner.

        Raises HostError where that is not permitted, StateError when the runtime directory belongs to somebody else
        (a directory below /tmp can be made by anyone).
        """
        if len(os.fsencode(self.runtime)) > MAX_RUNTIME:
            raise HostError(
                f"the path {self.runtime} is too long: sockets below it would have more than 107 bytes",
                hint=f"set POSADA_RUNTIME to a directory of at most {MAX_RUNTIME} bytes",
            )
        try:
            for path in (self.home, self.vms, self.layers, self.runtime, self.machines, self.locks, self.listeners):
                if not path.is_dir():
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = os.lstat(self.runtime)
        except OSError as error:
            raise HostError(
                f"cannot make {error.filename}: {error.strerror}",
                hint="set POSADA_HOME and POSADA_RUNTIME to directories of your own",
            ) from error
        if info.st_uid != os.geteuid() or not stat.S_ISDIR(info.st_mode) or info.st_mode & 0o022:
            raise StateError(
                f"{self.runtime} is not a private directory of uid {os.geteuid()}",
                hint="remove it, or set POSADA_RUNTIME to another place",
            )

    @property
    def database(self) -> Path:
        return self.home / "state.db"

    @property
    def vms(self) -> Path:
        return self.home / "vms"

    @property
    def layers(self) -> Path:
        return self.home / "layers"

    @property
    def images(self) -> Path:
        return self.home / "images"

    @property
    def machines(self) -> Path:
        return self.runtime / "vms"

    @property
    def locks(self) -> Path:
        return self.runtime / "locks"

    @property
    def listeners(self) -> Path:
        return self.runtime / "listeners"

    def vm(self, uuid: str) -> Path:
        return self.vms / uuid

    def vm_json(self, uuid: str) -> Path:
        return self.vms / uuid / "vm.json"

    def log(self, uuid: str) -> Path:
        return self.vms / uuid / "console.log"

    def disks(self, uuid: str) -> Path:
        return self.vms / uuid / "disks"

    def snapshot(self, uuid: str, snapshot: str) -> Path:
        return self.vms / uuid / "snapshots" / snapshot

    def machine(self, uuid: str) -> Path:
        """The engine's private directory of one vm."""
        return self.machines / uuid

    def activity(self, uuid: str) -> Path:
        """Its mtime is the last use of the vm (idle timeouts)."""
        return self.machines / uuid / "activity"

    def relative(self, path: Path) -> str:
        """As records hold it: relative to the state directory, so that it can be moved."""
        return str(path.relative_to(self.home))

    def absolute(self, recorded: str) -> Path:
        """The path a record holds. Raises StateError for one that leaves the state directory."""
        path = Path(os.path.normpath(self.home / recorded))
        if not path.is_relative_to(self.home):
            raise StateError(f"recorded path {recorded!r} leaves the state directory")
        return path
