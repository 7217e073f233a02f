"""The public face: every name is exported once, typed, documented, and importing it costs nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import posada
from posada import aio

ROOT = Path(__file__).resolve().parents[2]
MODULES = [posada, aio]
CLASSES = [
    (module, name)
    for module in MODULES
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) and getattr(module, name).__module__.startswith("posada.client")
]


def type_checking_names(module: ModuleType) -> set[str]:
    """The names a type checker sees: those imported under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.If):
            found |= {alias.name for item in node.body if isinstance(item, ast.ImportFrom) for alias in item.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_all_agrees_with_what_is_loaded_and_what_checkers_see(module: ModuleType) -> None:
    names = set(module.__all__) - {"__version__"}
    assert len(module.__all__) == len(set(module.__all__))
    assert names == type_checking_names(module)
    assert names - {"aio"} == set(module._MODULE_OF)
    for name in names:
        assert getattr(module, name) is not None
    assert names <= set(dir(module))


@pytest.mark.parametrize("module", MODULES)
def test_a_name_that_is_none_is_an_attribute_error(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def test_the_async_api_has_the_same_objects() -> None:
    sync = {name for name, module in posada._MODULE_OF.items() if "._sync." in module}
    assert sync == set(aio.__all__)


def test_every_error_and_result_of_the_api_is_exported() -> None:
    from posada import errors

    tree = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.PosadaError) and value.__module__ == errors.__name__
    }
    assert tree <= set(posada.__all__)


@pytest.mark.parametrize(("module", "name"), CLASSES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_every_public_member_is_documented_and_typed(module: ModuleType, name: str) -> None:
    owner = getattr(module, name)
    assert inspect.getdoc(owner), f"{name} has no docstring"
    for member, value in vars(owner).items():
        if member.startswith("_"):
            continue
        function = value.fget if isinstance(value, property) else value
        if not inspect.isfunction(function):
            continue
        assert inspect.getdoc(function), f"{name}.{member} has no docstring"
        function = inspect.unwrap(function)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{member} has no return type"
        for parameter in list(signature.parameters.values())[1:]:
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}.{member}({parameter.name}) has no type"


@pytest.mark.parametrize("name", [n for n in aio.__all__ if inspect.isclass(getattr(aio, n))])
def test_sync_and_async_have_the_same_members(name: str) -> None:
    def members(owner: type) -> dict[str, list[str]]:
        return {
            member: list(inspect.signature(inspect.unwrap(value)).parameters)
            for member, value in vars(owner).items()
            if inspect.isfunction(value) and not member.startswith("_")
        }

    assert members(getattr(posada, name)) == members(getattr(aio, name))


def test_importing_it_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import posada; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"asyncio", "msgspec", "sqlite3", "click", "posada.client", "posada.errors", "posada.model"}
    assert "posada" in loaded
    assert not heavy & set(loaded)


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert posada.__version__ == project["version"]


def test_the_sync_api_is_what_unasync_makes_of_the_async_one() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/unasync.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
