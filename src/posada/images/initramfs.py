"""The initramfs of posada's guests: the agent as ``/init``, the modules it loads first, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from posada.images.cpio import CpioWriter
from posada.images.modules import conditions

#: Where the agent finds the modules to load: one path a line, in order, each with the devices it is for
#: (docs/AGENT-PROTOCOL.md, *As /init*).
ORDER = "modules/order"


def build_initramfs(agent: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """A newc archive, the same for the same input. ``modules`` are (file name, ELF bytes) in the order they load."""
    cpio = CpioWriter()
    for name in ("dev", "proc", "sys", "run", "root", "modules"):
        cpio.directory(name)
    # The kernel opens it for init's stdin, stdout and stderr before init can mount devtmpfs.
    cpio.char_device("dev/console", 5, 1)
    cpio.file("init", agent, 0o755)
    lines = [
        " ".join([f"/modules/{name}", *when]) for (name, _), when in zip(modules, conditions(modules), strict=True)
    ]
    cpio.file(ORDER, "".join(f"{line}\n" for line in lines).encode())
    for name, data in modules:
        if "/" in name or "\n" in name:
            raise ValueError(f"{name!r} is not the file name of a module")
        cpio.file(f"modules/{name}", data)
    return cpio.finish()
