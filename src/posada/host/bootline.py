"""The kernel command line of a directly booted guest (docs/AGENT-PROTOCOL.md, "As /init")."""

from __future__ import annotations

from collections.abc import Sequence

from posada.model.machine import FolderSpec

#: What user-mode networking gives every guest (QEMU's slirp defaults).
USER_ADDRESS, USER_GATEWAY, USER_DNS = "10.0.2.15/24", "10.0.2.2", "10.0.2.3"


def command_line(
    *,
    agent: bool,
    root: bool,
    hostname: str,
    network: bool,
    emulated: bool,
    image_append: str,
    user_append: str,
    folders: Sequence[FolderSpec] = (),
) -> str:
    """One line of text.

    ``agent``: posada's agent is /init. ``root``: the first disk holds the root file system. ``emulated``: the guest's
    kernel runs under emulation, where it protects nobody by its mitigations and pays dearly for them. ``folders``: what
    the agent mounts.
    """
    words = ["console=ttyS0", "quiet"]
    if emulated:
        # QEMU before 8.0 translates code anew for each virtual address it runs at, so that address space randomisation
        # in the guest doubles the time of every exec (`true`: 20 ms against 9 ms). A guest that wants it sets the
        # sysctl kernel.randomize_va_space.
        words += ["mitigations=off", "norandmaps"]
    if agent:
        if root:
            words += ["posada.root=/dev/vda", "posada.rootfs=ext4", "posada.rw=1"]
        words.append(f"posada.hostname={hostname}")
        if network:
            words += [f"posada.net={USER_ADDRESS}", f"posada.gw={USER_GATEWAY}", f"posada.dns={USER_DNS}"]
        for index, folder in enumerate(folders):
            words.append(f"posada.folder{index}={folder.target}{':ro' if folder.readonly else ''}")
    return " ".join([*words, *image_append.split(), *user_append.split()])
