"""YAML as people mean it: YAML 1.1, which PyYAML reads, takes the port ``22:22`` for a number in base 60 (1342)."""

from __future__ import annotations

import re
from typing import Any

import yaml

_INT, _FLOAT, _TIME = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """The safe loader, less numbers with colons in them, and less dates: a label may look like one.

    The one in Python, which is slow; the one in C crashes on deep nesting.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIME)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F_]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?$"), [*"-+0123456789"])


def decode(text: str | bytes) -> Any:
    """Plain data from YAML. Raises ValueError, in words."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (it is a safe loader)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
