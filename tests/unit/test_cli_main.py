"""The command line itself: help, errors, JSON errors, completion, the arguments of commands in guests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from client_home import IMAGE, Posada, paths, posada_cli

from posada import __version__
from posada.cli import copy, main, output
from posada.cli.inside import exec_
from posada.cli.run import run
from posada.cli.snapshot import draw
from posada.cli.spec import EXAMPLE, FIELDS
from posada.model.machine import json_schema, make_spec, spec_from_yaml
from posada.model.records import SnapshotKind, SnapshotRecord

__all__ = ["paths", "posada_cli"]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb, with those of groups."""
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


#: The verbs that issue 2 and the design name.
DESIGNED = (
    "run ps ls create start stop kill pause resume restart rm info logs console exec shell cp fork clone resize attach "
    "detach port doctor top events recover version completion snapshot image op"
)


@pytest.mark.parametrize("path", commands(main.cli), ids=" ".join)
def test_every_verb_has_help(path: tuple[str, ...], posada_cli: Posada) -> None:
    done = posada_cli(*path, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: posada {' '.join(path)}")
    assert path == ("spec",) or posada_cli("help", *path).out == done.out


def test_the_designed_verbs_are_there() -> None:
    context = click.Context(main.cli)
    assert [verb for verb in DESIGNED.split() if main.cli.get_command(context, verb) is None] == []


def test_every_verb_that_prints_data_has_a_format() -> None:
    silent = {("exec",), ("shell",), ("console",), ("logs",), ("completion",), ("help",), ("spec",), ("spec", "schema")}
    for path in commands(main.cli):
        command: click.Command = main.cli
        for word in path:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        if not isinstance(command, click.Group) and path not in silent:
            assert any("--format" in p.opts for p in command.params), " ".join(path)


def test_help_and_version(posada_cli: Posada) -> None:
    done = posada_cli("--help")
    for section in main.SECTIONS:
        assert f"{section}:" in done.out
    assert posada_cli("version").out == posada_cli("--version").out == f"posada {__version__}\n"
    assert json.loads(posada_cli("version", "--format", "json").out)["posada"] == __version__
    assert posada_cli("help", "nonsense").status == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("strat", "x"), "hint: did you mean: posada start"),
        (("zzzzz",), "hint: posada help lists the verbs"),
        (("ps", "--nonsense"), "--nonsense"),
        (("rm",), "name the machines"),
        (("ps", "--label", "novalue"), "KEY=VALUE"),
        (("ps", "--format", "xml"), "xml"),
        (("start", "x", "--timeout", "soon"), "timeout: 'soon' is not a duration"),
        (("create", IMAGE, "--memory", "lots"), "memory: 'lots' is not a size"),
        (("create",), "image: is missing"),
        (("create", "--file", "/no/such/file"), "/no/such/file"),
    ],
)
def test_misuse(posada_cli: Posada, arguments: tuple[str, ...], said: str) -> None:
    done = posada_cli(*arguments)
    assert (done.status in (1, 2), done.out) == (True, "")
    assert done.err.startswith("posada: error: ")
    assert said in done.err
    assert "Traceback" not in done.err


def test_errors_as_json(posada_cli: Posada) -> None:
    done = posada_cli("info", "nobody", "--format", "json")
    assert (done.status, done.out) == (1, "")
    assert json.loads(done.err)["error"] == {
        "type": "NotFound",
        "message": "no vm named 'nobody'",
        "hint": json.loads(done.err)["error"]["hint"],
        "exit_status": 1,
    }
    error = json.loads(posada_cli("create", IMAGE, "--cpus", "0", "--format", "json").err)["error"]
    assert (error["type"], error["field"], error["exit_status"]) == ("SpecError", "cpus", 2)
    error = json.loads(posada_cli("ps", "--nonsense", "--format", "json").err)["error"]
    assert (error["type"], error["exit_status"]) == ("UsageError", 2)


def test_a_state_directory_that_cannot_be(posada_cli: Posada, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POSADA_HOME", str(tmp_path / "file" / "below"))
    done = posada_cli("ps")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("posada: error: cannot make ")
    assert "hint: set POSADA_HOME" in done.err


def test_a_bug_is_told_without_a_traceback(posada_cli: Posada, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("oops")

    monkeypatch.setattr(output, "columns", broken)
    done = posada_cli("ps")
    assert (done.status, "this is a bug in posada: RuntimeError: oops" in done.err) == (1, True)
    monkeypatch.setenv("POSADA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="oops"):
        posada_cli("ps")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(posada_cli: Posada, shell: str) -> None:
    assert "_POSADA_COMPLETE" in posada_cli("completion", shell).out


def test_completion_knows_verbs_and_machines(paths: object) -> None:
    def complete(*words: str) -> set[str]:
        from click.shell_completion import ShellComplete

        completer = ShellComplete(main.cli, {}, "posada", "_POSADA_COMPLETE")
        return {item.value for item in completer.get_completions(list(words[:-1]), words[-1])}

    assert {"start", "stop"} <= complete("st")
    assert complete("snapshot", "re") == {"restore"}
    subprocess.run([sys.executable, "-m", "posada", "create", "--engine", "fake", "--name", "web", IMAGE], check=True)
    assert complete("start", "w") == {"web"}
    assert complete("run", "t") == {IMAGE}


@pytest.mark.parametrize(
    ("arguments", "own", "command"),
    [
        (["vm", "ls", "-l"], ["vm"], ("ls", "-l")),
        (["vm", "--", "ls"], ["vm"], ("ls",)),
        (["-it", "vm", "ls"], ["-it", "vm"], ("ls",)),
        (["vm", "-w", "/x", "ls"], ["vm", "-w", "/x"], ("ls",)),
        (["-w/x", "vm", "ls", "--", "y"], ["-w/x", "vm"], ("ls", "--", "y")),
        (["--workdir=/x", "vm", "ls"], ["--workdir=/x", "vm"], ("ls",)),
        (["-iw", "/x", "vm", "ls"], ["-iw", "/x", "vm"], ("ls",)),
        (["vm"], ["vm"], ()),
        (["vm", "--"], ["vm"], ()),
    ],
)
def test_where_the_command_of_the_guest_begins(arguments: list[str], own: list[str], command: tuple[str, ...]) -> None:
    context = exec_.make_context("exec", list(arguments))
    assert context.params["vm"] == "vm"
    assert context.params["command"] == command
    assert exec_.make_context("exec", own).params == {**context.params, "command": ()}


def test_a_command_after_dashes_is_no_image() -> None:
    context = run.make_context("run", ["-f", "spec.yaml", "--", "uname"])
    assert (context.params["image"], context.params["command"]) == (None, ("uname",))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("vm:/etc", ("vm", "/etc")),
        ("vm:", ("vm", "/root")),
        ("./a:b", (None, "./a:b")),
        ("/a:b", (None, "/a:b")),
        (":x", (None, ":x")),
        ("plain", (None, "plain")),
    ],
)
def test_places(text: str, place: tuple[str | None, str]) -> None:
    assert copy.place(text) == place


def test_what_comes_from_outside_does_not_drive_the_terminal() -> None:
    assert "\x1b" not in output.columns(("A",), [("\x1b[2Jx",)])
    assert "\x1b" not in output.fields([("a", "\x1b]0;x\x07")])
    assert output.clean("é 漢 ok") == "é 漢 ok"


def test_a_tree_of_a_thousand_snapshots_in_a_row() -> None:
    spec = make_spec(image="a:1")
    records = [
        SnapshotRecord(id=str(i), vm="v", name=f"s{i}", kind=SnapshotKind.FULL, spec=spec, disks=(),
                       parent=str(i - 1) if i else None)
        for i in range(1500)
    ]  # fmt: skip
    assert len(draw("vm", records, None).splitlines()) == 1501


def test_the_fields_of_a_spec_are_all_explained() -> None:
    schema = json_schema()
    known: set[str] = set()

    def walk(reference: dict[str, object], prefix: str) -> None:
        name = str(reference["$ref"]).rsplit("/", 1)[1]
        for field, kind in schema["$defs"][name]["properties"].items():
            inner = [kind, *kind.get("anyOf", ())]
            nested = [k for k in inner if "$ref" in k]
            items = [k["items"] for k in inner if "$ref" in k.get("items", {})]
            if nested:
                walk(nested[0], f"{prefix}{field}.")
            elif items:
                walk(items[0], f"{prefix}{field}[].")
            else:
                known.add(prefix + field)

    walk(schema, "")
    assert known == set(FIELDS)


def test_the_specs_example_is_right(posada_cli: Posada, tmp_path: Path) -> None:
    assert [(p.host, p.guest) for p in spec_from_yaml(EXAMPLE).ports] == [(8080, 80), (2222, 22)]
    assert EXAMPLE.splitlines()[0] in posada_cli("help", "spec").out
    assert posada_cli("spec").out == posada_cli("help", "spec").out
    schema = json.loads(json.dumps(json_schema()))
    assert json.loads(posada_cli("spec", "schema").out) == json.loads(posada_cli("spec", "--schema").out) == schema
    file = tmp_path / "spec.yaml"
    file.write_text(EXAMPLE)
    assert "memory: 1073741824" in posada_cli("spec", "check", str(file)).out
    file.write_text("imagine: x")
    assert posada_cli("spec", "check", str(file)).err.startswith("posada: error: imagine: is not a field")
