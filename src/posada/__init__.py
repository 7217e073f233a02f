"""posada: the open hypervisor in Python.

::

    import posada

    with posada.run("debian:12", memory="1GiB", ports=[8080]) as vm:
        print(vm.exec("uname", "-a").stdout)
        base = vm.snapshot("ready")
        kids = vm.fork(8)
        vm.restore(base)

`run`, `create` and `connect` are where it begins; `posada.aio` holds the async twins. Errors form one tree under
`PosadaError`. Importing this module is cheap: everything is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from posada import aio
    from posada.client._fields import ExecOptions, SpecFields
    from posada.client._ports import Port
    from posada.client._sync.console import Console
    from posada.client._sync.files import Files
    from posada.client._sync.host import Host, connect, create, run
    from posada.client._sync.images import Image, Images
    from posada.client._sync.operations import Events, Operation, Operations
    from posada.client._sync.process import Process
    from posada.client._sync.snapshot import Snapshot
    from posada.client._sync.vm import VM
    from posada.client._sync.vms import Vms
    from posada.client._sync.waiting import Waiter
    from posada.engine.base import Inspection, Usage
    from posada.errors import (
        AlreadyExists,
        Busy,
        Cancelled,
        CommandError,
        EngineError,
        EngineGone,
        ForkError,
        GuestError,
        GuestGone,
        HostError,
        ImageError,
        InUse,
        InvalidState,
        KvmError,
        NotFound,
        PosadaError,
        ProtocolError,
        SpecError,
        StateError,
        StreamClosed,
        Timeout,
        Unsupported,
    )
    from posada.host.doctor import Check
    from posada.host.recovery import RecoverReport
    from posada.model.capabilities import Capabilities, Feature, Verdict
    from posada.model.exec import ExecResult, Output
    from posada.model.files import (
        DirEntry,
        FileInfo,
        FileType,
        Transfer,
    )
    from posada.model.machine import (
        CloudInit,
        DirectKernel,
        DiskSpec,
        FolderSpec,
        Limits,
        MachineSpec,
        NicSpec,
        PortSpec,
        make_spec,
        spec_from_json,
        spec_from_yaml,
        spec_to_json,
        spec_to_yaml,
    )
    from posada.model.progress import Progress
    from posada.model.records import (
        Event,
        ImageRecord,
        OperationRecord,
        OperationState,
        PortRecord,
        SnapshotKind,
        SnapshotRecord,
        VmRecord,
    )
    from posada.model.states import State

#: Where each public name lives.
_HOMES = {
    "posada.client._fields": "ExecOptions SpecFields",
    "posada.client._ports": "Port",
    "posada.client._sync.console": "Console",
    "posada.client._sync.files": "Files",
    "posada.client._sync.host": "Host connect create run",
    "posada.client._sync.images": "Image Images",
    "posada.client._sync.operations": "Events Operation Operations",
    "posada.client._sync.process": "Process",
    "posada.client._sync.snapshot": "Snapshot",
    "posada.client._sync.vm": "VM",
    "posada.client._sync.vms": "Vms",
    "posada.client._sync.waiting": "Waiter",
    "posada.engine.base": "Inspection Usage",
    "posada.errors": (
        "AlreadyExists Busy Cancelled CommandError EngineError EngineGone ForkError GuestError GuestGone "
        "HostError ImageError InUse InvalidState KvmError NotFound PosadaError ProtocolError SpecError "
        "StateError StreamClosed Timeout Unsupported"
    ),
    "posada.host.doctor": "Check",
    "posada.host.recovery": "RecoverReport",
    "posada.model.capabilities": "Capabilities Feature Verdict",
    "posada.model.exec": "ExecResult Output",
    "posada.model.files": "DirEntry FileInfo FileType Transfer",
    "posada.model.machine": (
        "CloudInit DirectKernel DiskSpec FolderSpec Limits MachineSpec NicSpec PortSpec make_spec spec_from_json "
        "spec_from_yaml spec_to_json spec_to_yaml"
    ),
    "posada.model.progress": "Progress",
    "posada.model.records": (
        "Event ImageRecord OperationRecord OperationState PortRecord SnapshotKind SnapshotRecord VmRecord"
    ),
    "posada.model.states": "State",
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "VM", "AlreadyExists", "Busy", "Cancelled", "Capabilities", "Check", "CloudInit", "CommandError", "Console",
    "DirEntry", "DirectKernel", "DiskSpec", "EngineError", "EngineGone", "Event", "Events", "ExecOptions",
    "ExecResult", "Feature", "FileInfo", "FileType", "Files", "FolderSpec", "ForkError", "GuestError", "GuestGone", "Host",
    "HostError", "Image", "ImageError", "ImageRecord", "Images", "InUse", "Inspection", "InvalidState", "KvmError", "Limits",
    "MachineSpec", "NicSpec", "NotFound", "Operation", "OperationRecord", "OperationState", "Operations", "Output",
    "Port", "PortRecord", "PortSpec", "PosadaError", "Process", "Progress", "ProtocolError", "RecoverReport",
    "Snapshot", "SnapshotKind", "SnapshotRecord", "SpecError", "SpecFields", "State", "StateError", "StreamClosed",
    "Timeout", "Transfer", "Unsupported", "Usage", "Verdict", "VmRecord", "Vms", "Waiter", "__version__", "aio",
    "connect", "create", "make_spec", "run", "spec_from_json", "spec_from_yaml", "spec_to_json", "spec_to_yaml",
]


def __getattr__(name: str) -> _Any:
    if name == "aio":
        return _import_module("posada.aio")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'posada' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
