"""Where the guest agent's program is: in the wheel, or built on demand in a checkout."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

from posada.errors import HostError

_BIN = Path(__file__).parent / "bin"
_BUILDER = Path(__file__).parents[3] / "scripts" / "build_agent.py"


@functools.cache
def agent_binary(arch: str) -> Path:
    """The agent for guests of ``arch`` (``x86_64``, ``aarch64``), a static ELF executable.

    In a checkout it is built when the sources changed (seconds). Raises HostError when it is missing and cannot be built.
    """
    binary = _BIN / f"posada-agent-{arch}"
    if _BUILDER.exists() and (_BUILDER.parents[1] / "agent").is_dir():
        command = [sys.executable, str(_BUILDER), "--arch", arch]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode and not binary.exists():
            raise HostError(
                f"cannot build the guest agent for {arch}: {done.stdout.strip()[-800:]}",
                hint="pip install 'ziglang>=0.13,<1'",
            )
    if not binary.exists():
        raise HostError(f"this posada carries no guest agent for {arch}", hint="install the wheel, or use a checkout")
    return binary
