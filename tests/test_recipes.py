"""The recipes' code does what they say."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).resolve().parents[1] / "docs/recipes"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (RECIPES / name).read_text(), re.MULTILINE | re.DOTALL)


def test_reseed_after_fork(tmp_path: Path) -> None:
    (code,) = python_blocks("reseed-after-fork.md")
    hook = ModuleType("posada_generation")
    exec(compile(code, "posada_generation.py", "exec"), hook.__dict__)  # noqa: S102  # it is ours
    watched = tmp_path / "generation"
    hook.PATH = str(watched)  # type: ignore[attr-defined]

    def replace(number: int) -> None:
        (tmp_path / "new").write_text(f"{number}\n")
        (tmp_path / "new").rename(watched)

    random.seed(1)
    expected = random.Random(1)
    assert hook.check() is False  # not forked, or not in a posada machine at all
    assert random.random() == expected.random()
    for number in (1, 2):  # as the agent does it in a fork, and in a fork of that
        replace(number)
        assert hook.check() is True
        assert random.random() != expected.random()
        random.seed(1)
        expected = random.Random(1)
        assert hook.check() is False
        assert random.random() == expected.random()
