"""Where the guest agent's program is: in the wheel, or built on demand in a checkout."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from posada.errors import HostError

_BIN = Path(__file__).parent / "bin"
_ROOT = Path(__file__).parents[3]
_BUILDER = _ROOT / "scripts" / "build_agent.py"


@functools.cache
def agent_binary(arch: str) -> Path:
    """The agent for guests of ``arch`` (``x86_64``, ``aarch64``), a static ELF executable.

    In a checkout it is built when the sources changed (seconds; half a minute the first time). Raises HostError when it
    is missing and cannot be built: never is an agent used that is older than its sources.
    """
    if (_ROOT / "agent").is_dir() and _BUILDER.exists():
        return _built(arch)
    binary = _BIN / f"posada-agent-{arch}"
    if not binary.exists():
        raise HostError(f"this posada carries no guest agent for {arch}", hint="install the wheel, or use a checkout")
    return binary


def _built(arch: str) -> Path:
    builder = _load_builder()
    if arch not in builder.ARCHES:
        raise HostError(f"there is no guest agent for {arch}", hint=f"there is one for {', '.join(builder.ARCHES)}")
    try:
        binary: Path = builder.build(arch, _BIN)
    except (builder.BuildError, OSError) as error:
        raise HostError(
            f"cannot build the guest agent for {arch}: {str(error)[-800:]}", hint="pip install 'ziglang>=0.13,<1'"
        ) from error
    return binary


def _load_builder() -> ModuleType:
    """The script is no part of the package: it must run before anything is installed."""
    spec = importlib.util.spec_from_file_location("posada_build_agent", _BUILDER)
    if spec is None or spec.loader is None:
        raise HostError(f"{_BUILDER} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
