"""The jail: a guest that has taken over its monitor finds an empty place. The threat model: docs/SECURITY-MODEL.md.

In order, in the monitor's main: everything is imported, every descriptor is open; `enter`; `lock_main`; then threads
are started, and each vcpu's begins with `lock_vcpu`. A forked child inherits all of it and goes through no door again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from posada.runtime import confine
from posada.vmm.jail import bpf, namespaces, policy

if TYPE_CHECKING:  # what serves a folder has a jail too, and needs no machine's configuration
    from posada.vmm.config import JailConfig

#: Descriptors a monitor may have open: disks' layers, clients, connections of vsock.
NOFILE = 4096

# Assembled once, before any fork.
_MAIN, _VCPU = policy.main_thread(), policy.vcpu_thread()


def enter(config: JailConfig) -> list[str]:
    """Give up the host. Before any thread is started. Returns what was had, in words. Raises OSError.

    Where the host does not give us namespaces or an empty root, we go without; the rest is not optional.
    """
    confine.limit(NOFILE)
    confine.expendable()
    done = namespaces.enter(config.root) if config.namespaces else []
    if config.root >= 0:
        os.close(config.root)  # out of an empty root, a directory that is open would be the way back
    if config.uid >= 0:
        confine.become(config.uid, [])
        done.append(f"uid {config.uid}")
    namespaces.drop_capabilities()
    confine.no_new_privileges()
    return [*done, "no capabilities", "no new privileges"]


def lock_main(config: JailConfig) -> list[str]:
    """The main thread's filter, which every thread it starts inherits. Raises OSError."""
    if not config.seccomp or not policy.SUPPORTED:
        return []
    bpf.install(_MAIN)
    return ["seccomp"]


def lock_vcpu(config: JailConfig) -> None:
    """What a vcpu's thread gives up beyond that. Raises OSError."""
    if config.seccomp and policy.SUPPORTED:
        bpf.install(_VCPU)
