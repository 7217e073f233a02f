"""hatchling's build hook: the guest agents are built into the wheel, so that it works without a checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AgentHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles agent/*.c for every architecture with ziglang, a build requirement."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # a checkout builds what it needs when it needs it (posada.guest.binary)
        sys.path.insert(0, str(Path(self.root) / "scripts"))
        import build_agent

        for arch in build_agent.ARCHES:
            binary = build_agent.build(arch)
            # The folder is ignored by git, and what git ignores hatchling leaves out: so it is named.
            relative = binary.relative_to(self.root).as_posix()
            build_data["force_include"][relative] = f"posada/guest/bin/{binary.name}"
