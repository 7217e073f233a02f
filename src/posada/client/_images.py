"""Who stands on an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posada.host.host import Host


def image_users(host: Host) -> Callable[[str], list[str]]:
    """What `ImageStore.remove` asks before it removes: the names of the machines made from a digest."""

    def users(digest: str) -> list[str]:
        return [record.name for record in host.vms.list() if record.image == digest]

    return users
