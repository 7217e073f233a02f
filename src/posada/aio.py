"""The async API: the twins of what `posada` exports, to be awaited.

::

    from posada import aio

    async with aio.run("debian:12") as vm:
        print((await vm.exec("uname", "-a")).stdout)

Values (specs, records, results) and errors are those of `posada` itself.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from posada.client._async.console import Console
    from posada.client._async.files import Files
    from posada.client._async.host import Host, connect, create, run
    from posada.client._async.images import Image, Images
    from posada.client._async.operations import Events, Operation, Operations
    from posada.client._async.process import Process
    from posada.client._async.snapshot import Snapshot
    from posada.client._async.vm import VM
    from posada.client._async.vms import Vms
    from posada.client._async.waiting import Waiter

#: Where each public name lives.
_HOMES = {
    "posada.client._async.console": "Console",
    "posada.client._async.files": "Files",
    "posada.client._async.host": "Host connect create run",
    "posada.client._async.images": "Image Images",
    "posada.client._async.operations": "Events Operation Operations",
    "posada.client._async.process": "Process",
    "posada.client._async.snapshot": "Snapshot",
    "posada.client._async.vm": "VM",
    "posada.client._async.vms": "Vms",
    "posada.client._async.waiting": "Waiter",
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "VM", "Console", "Events", "Files", "Host", "Image", "Images", "Operation", "Operations", "Process", "Snapshot",
    "Vms", "Waiter", "connect", "create", "run",
]


def __getattr__(name: str) -> _Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'posada.aio' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
