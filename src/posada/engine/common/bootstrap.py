"""Starting a program of posada's own in a bare interpreter: no site-packages, no environment, no SDK.

`posada/__init__.py` is not run: a package of that name with nothing but its path stands in for it, so that what is
imported below costs only itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[2])


def python(module: str, call: str = "main()") -> list[str]:
    """The words that run ``main`` of a module, as ``call`` says; what follows them is in ``sys.argv``."""
    code = (
        "import sys; p = type(sys)('posada'); "
        f"p.__path__ = [{_PACKAGE!r}]; sys.modules['posada'] = p; "
        f"from {module} import main; {call}"
    )
    return [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", code]
