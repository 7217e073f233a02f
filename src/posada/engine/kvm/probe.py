"""Whether the kvm engine works here: measured once per boot and user, then remembered."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from posada.engine.common import facts as common
from posada.engine.common.kvm import kvm_rate
from posada.errors import HostError

DEVICE = Path("/dev/kvm")
#: Set to 1: use the engine also where the host emulates guest kernels. For tests with guests of a few instructions.
SLOW = "POSADA_KVM_SLOW"
_CACHE = "kvm-probe.json"


class Facts(common.Facts, frozen=True, kw_only=True):
    """What was measured of this host."""

    rate: float
    """Instructions per second at ring 0; 0 when nothing could be measured."""
    useful: bool
    """Hardware runs guests."""
    words: str
    """The measurement for people."""


def facts(runtime: Path | None = None) -> Facts:
    """Measured, or remembered. Never raises."""
    cache = (runtime or common.default_runtime()) / _CACHE
    key = _key()
    found = common.recall(cache, key, Facts)
    if found is None:
        rate, useful, words = kvm_rate()
        found = Facts(key=key, rate=rate, useful=useful, words=words)
        if rate or not DEVICE.exists():  # what could not be measured now can be later
            common.remember(cache, found)
    return found


def _key() -> str:
    try:
        info = os.stat(DEVICE)
        device = f"{info.st_rdev} {info.st_mode} {info.st_gid} {info.st_ctime_ns}"
    except OSError:
        device = "none"
    return f"1 {common.boot_id()} {device} {os.geteuid()} {os.access(DEVICE, os.R_OK | os.W_OK)}"


def usable(found: Facts) -> bool:
    """Hardware runs guests, or somebody wants it all the same."""
    return found.useful or (found.rate > 0 and os.environ.get(SLOW) == "1")


def require(found: Facts) -> None:
    """Raise HostError, with what to do, where the engine is of no use."""
    if not usable(found):
        raise HostError(f"the kvm engine cannot run machines here: {found.words}", hint=hint(found))


def hint(found: Facts) -> str | None:
    if usable(found):
        return None
    if not DEVICE.exists():
        return "switch on virtualisation in the firmware, modprobe kvm_intel or kvm_amd; or use the qemu engine"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "join the group that owns /dev/kvm: adduser $USER kvm"
    return "use the qemu engine"


def find_passt() -> str | None:
    """The path of passt, which does user-mode networking; None when it is not installed."""
    return shutil.which(os.environ.get("POSADA_PASST") or "passt")
