"""Every exception posada raises, as one tree.

::

    PosadaError
     ├─ SpecError (ValueError)            a field of a spec is wrong; nothing was changed
     ├─ NotFound (LookupError)            no such vm, image, snapshot, operation …
     ├─ AlreadyExists (ValueError)        the name is taken
     ├─ InvalidState                      the verb is not possible in the vm's state
     ├─ Busy                              another process holds the vm
     ├─ InUse                             something else depends on it; it is named
     ├─ Unsupported (NotImplementedError) the engine cannot do this here, and what would help
     ├─ Timeout (TimeoutError)            a deadline passed
     ├─ Cancelled                         the operation was cancelled
     ├─ HostError (OSError)               the host lacks something: a tool, space, a permission
     ├─ StateError                        the state directory is damaged, locked or newer than this posada
     ├─ EngineError                       the engine failed
     │   ├─ EngineGone                    its process has died or does not answer
     │   └─ KvmError                      an ioctl on /dev/kvm failed; it is named
     ├─ ImageError (ValueError)           an image or disk is corrupt, refused or lying
     ├─ GuestError                        the guest's agent refused or failed
     │   ├─ GuestGone (ConnectionError)   the guest or its agent is gone
     │   ├─ StreamClosed (BrokenPipeError) written to what reads no more
     │   ├─ CommandError                  a command ended with a non-zero status (check=True)
     │   └─ ProtocolError                 the guest sent what the protocol forbids
     └─ ForkError                         some children failed; ``.vms`` holds the survivors

Each message says what was tried, in which state, and what to do. ``hint`` holds the last part on its own, so that the
command line can print it on a line of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from errno import errorcode
from typing import Any


class PosadaError(Exception):
    """The root. ``hint`` is what the user can do about it, or None.

    ``exit_status`` is what the command line exits with.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SpecError(PosadaError, ValueError):
    """A field of a spec is wrong. ``field`` is its path, such as ``disks[0].size``."""

    exit_status = 2

    def __init__(self, field: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{field}: {problem}" if field else problem, hint=hint)
        self.field = field
        self.problem = problem


class NotFound(PosadaError, LookupError):
    """There is no such thing on this host."""

    def __init__(self, kind: str, name: str, *, hint: str | None = None) -> None:
        super().__init__(f"no {kind} named {name!r}", hint=hint)
        self.kind = kind
        self.name = name


class AlreadyExists(PosadaError, ValueError):
    """The name is taken."""

    def __init__(self, kind: str, name: str, *, hint: str | None = None) -> None:
        super().__init__(f"{kind} {name!r} exists already", hint=hint)
        self.kind = kind
        self.name = name


class InvalidState(PosadaError):
    """The verb is not possible in the state the vm is in."""

    def __init__(
        self, vm: str, verb: str, actual: str, required: Sequence[str], *, hint: str | None = None
    ) -> None:
        super().__init__(f"cannot {verb} vm {vm!r}: it is {actual}, and must be {' or '.join(required)}", hint=hint)
        self.vm = vm
        self.verb = verb
        self.actual = actual
        self.required = tuple(required)


class Busy(PosadaError):
    """Another process is working on the vm and did not finish in time."""


class InUse(PosadaError):
    """Something depends on it. ``users`` names what."""

    def __init__(self, kind: str, name: str, users: Sequence[str], *, hint: str | None = None) -> None:
        super().__init__(f"{kind} {name!r} is in use by {', '.join(users)}", hint=hint)
        self.kind = kind
        self.name = name
        self.users = tuple(users)


class Unsupported(PosadaError, NotImplementedError):
    """The engine cannot do this here. ``hint`` says what would make it work."""

    def __init__(self, engine: str, feature: str, *, hint: str | None = None) -> None:
        super().__init__(f"the {engine} engine does not support {feature}", hint=hint)
        self.engine = engine
        self.feature = feature


class Timeout(PosadaError, TimeoutError):
    """A deadline passed."""

    exit_status = 124


class Cancelled(PosadaError):
    """The operation was cancelled."""

    exit_status = 130


class HostError(PosadaError, OSError):
    """The host lacks something: a tool, space, a permission."""


class StateError(PosadaError):
    """The state directory is damaged, locked, or written by a newer posada."""


class EngineError(PosadaError):
    """The engine failed. ``detail`` is what it said itself (its log's tail, its reply)."""

    def __init__(self, message: str, *, detail: str = "", hint: str | None = None) -> None:
        super().__init__(f"{message}: {detail.strip()}" if detail.strip() else message, hint=hint)
        self.detail = detail


class EngineGone(EngineError):
    """The engine's process has died or does not answer."""


class KvmError(EngineError):
    """A request to the kernel's KVM failed. ``ioctl`` is its name, ``errno`` the number or 0; ``hint`` what to do."""

    def __init__(self, ioctl: str, errno: int, *, detail: str = "", hint: str | None = None) -> None:
        super().__init__(f"{ioctl} failed ({errorcode.get(errno, 'no errno')})", detail=detail, hint=hint)
        self.ioctl = ioctl
        self.errno = errno


class ImageError(PosadaError, ValueError):
    """An image or a disk is corrupt, refused or lying about itself."""


class GuestError(PosadaError):
    """The guest's agent refused or failed. ``errno_name`` is the guest's errno where there is one (``ENOENT``)."""

    def __init__(self, message: str, *, errno_name: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno_name = errno_name


class GuestGone(GuestError, ConnectionError):
    """The guest, or the agent in it, is gone."""


class StreamClosed(GuestError, BrokenPipeError):
    """Written to a command, file or connection in a guest that has ended, and reads no more."""


class ProtocolError(GuestError):
    """The guest sent what the agent protocol forbids. The connection is closed; the guest harms only itself."""


class CommandError(GuestError):
    """A command ended with a non-zero status or by a signal, and ``check=True`` asked for an error.

    ``result`` is the whole result (stdout, stderr, exit_code, signal, duration).
    """

    def __init__(self, argv: Sequence[str], result: Any) -> None:
        ended = f"signal {result.signal}" if result.signal else f"status {result.exit_code}"
        tail = (result.stderr or result.stdout or "").strip()[-400:]
        super().__init__(f"command {' '.join(argv)!r} ended with {ended}" + (f": {tail}" if tail else ""))
        self.argv = tuple(argv)
        self.result = result


class ForkError(PosadaError):
    """Some children of a fork failed. ``vms`` holds the survivors, ``failures`` maps the child's index to its error."""

    def __init__(self, message: str, *, vms: Sequence[Any], failures: Mapping[int, BaseException]) -> None:
        reasons = "; ".join(f"child {i}: {e}" for i, e in sorted(failures.items()))
        super().__init__(f"{message}: {reasons}" if reasons else message)
        self.vms = list(vms)
        self.failures = dict(failures)
