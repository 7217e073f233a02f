"""Verbs of a machine's life and its branches, on the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_home import IMAGE, Outcome, Posada, add_image, paths, posada_cli

from posada.host.paths import Paths

__all__ = ["paths", "posada_cli"]


def parsed(outcome: Outcome) -> Any:
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def up(posada_cli: Posada, name: str, *more: str) -> None:
    """A machine that runs."""
    done = posada_cli("run", "-d", "--engine", "fake", "--name", name, *more, IMAGE)
    assert (done.status, done.out) == (0, f"{name}\n"), done.err


def states(posada_cli: Posada) -> dict[str, str]:
    return {vm["name"]: vm["state"] for vm in parsed(posada_cli("ps", "--format", "json"))}


def test_run_gives_the_commands_output_and_status_and_leaves_nothing(posada_cli: Posada) -> None:
    done = posada_cli("run", "--engine", "fake", IMAGE, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.status, done.out, done.err) == (7, "out\n", "err\n")
    assert states(posada_cli) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        (IMAGE, "--engine", "fake", "--", "echo", "-n", "--cpus", "x"),
        ("--engine", "fake", IMAGE, "echo", "-n", "--cpus", "x"),
        ("--engine=fake", IMAGE, "--cpus", "2", "echo", "-n", "--cpus", "x"),
    ],
)
def test_options_belong_to_run_until_the_command_begins(posada_cli: Posada, arguments: tuple[str, ...]) -> None:
    done = posada_cli("run", *arguments)
    assert (done.status, done.out) == (0, "--cpus x"), done.err


def test_run_keep_and_detach(posada_cli: Posada) -> None:
    done = posada_cli("run", "--keep", "--engine", "fake", "--name", "kept", IMAGE, "true")
    assert (done.status, "kept is kept" in done.err) == (0, True)
    up(posada_cli, "detached")
    assert states(posada_cli) == {"detached": "running", "kept": "running"}
    assert posada_cli("rm", "-f", "--all").status == 0
    assert states(posada_cli) == {}


def test_a_command_of_a_detached_machine_goes_on_by_itself(posada_cli: Posada, tmp_path: Path) -> None:
    script = f"echo done > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/out; sleep 60"
    done = posada_cli("run", "-d", "--engine", "fake", "--name", "a", IMAGE, "--", "sh", "-c", script)
    assert (done.status, done.out) == (0, "a\n"), done.err
    assert posada_cli("shell", "a", f"until test -e {tmp_path}/out; do sleep 0.02; done; cat {tmp_path}/out").out == "done\n"


def test_a_guest_without_agent(posada_cli: Posada, paths: Paths) -> None:
    add_image(paths, "mute:1", "1" * 64, agent=False)
    done = posada_cli("run", "--engine", "fake", "mute:1", "--", "true")
    assert (done.status, "has no posada agent" in done.err, "hint:" in done.err) == (1, True, True)
    assert states(posada_cli) == {}
    assert posada_cli("run", "-d", "--engine", "fake", "--name", "a", "mute:1").status == 0
    assert states(posada_cli) == {"a": "running"}
    done = posada_cli("fork", "a", "b")
    assert (done.status, "would share one identity" in done.err, "--same-identity" in done.err) == (1, True, True)
    assert posada_cli("fork", "a", "b", "--same-identity").status == 0
    assert states(posada_cli) == {"a": "running", "b": "running"}


def test_run_passes_environment_user_directory_and_timeout(posada_cli: Posada, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "yes")
    script = "echo $A $FROM_HERE; basename $PWD"
    done = posada_cli("run", "--engine", "fake", "-e", "A=1", "-e", "FROM_HERE", "-w", "/run", IMAGE, "sh", "-c", script)
    assert (done.status, done.out) == (0, "1 yes\nrun\n"), done.err
    done = posada_cli("run", "--engine", "fake", "--timeout", "0.2", IMAGE, "sleep", "60")
    assert (done.status, done.out) == (124, "")
    assert done.err.startswith("posada: error: command 'sleep 60' ran longer")
    assert states(posada_cli) == {}


def test_a_machine_that_may_run_machines(posada_cli: Posada) -> None:
    for name, more in (("guest", ()), ("host", ("--nested",))):
        assert posada_cli("create", "--engine", "fake", "--name", name, *more, IMAGE).status == 0
    specs = {name: parsed(posada_cli("info", name, "--format", "json"))["spec"] for name in ("guest", "host")}
    assert specs["host"]["nested"] is True
    assert not specs["guest"].get("nested", False)


def test_create_from_options_and_from_a_file(posada_cli: Posada, tmp_path: Path) -> None:
    options = ("--cpus", "2", "-m", "1GiB", "--disk", "2MiB", "--disk", "data=3MiB", "-p", "8080:80", "-l", "a=b",
               "--lifetime", "10m", "--idle", "1h", "--hostname", "other", "--append", "quiet")  # fmt: skip
    assert posada_cli("create", "--engine", "fake", "--name", "one", *options, IMAGE).out == "one\n"
    info = parsed(posada_cli("info", "one", "--format", "json"))
    assert (info["cpus"], info["memory"], info["labels"]) == (2, 1 << 30, {"a": "b"})
    assert [(d["name"], d["size"]) for d in info["disks"]] == [("root", 2 << 20), ("data", 3 << 20)]
    assert info["spec"]["ports"] == [{"guest": 80, "host": 8080, "address": "127.0.0.1", "protocol": "tcp"}]
    assert info["spec"]["limits"] == {"lifetime": 600.0, "idle": 3600.0, "action": "kill"}

    file = tmp_path / "spec.yaml"
    file.write_text(posada_cli("info", "one", "--spec").out)
    assert posada_cli("create", "-f", str(file), "--name", "two", "--cpus", "3").status == 0
    two = parsed(posada_cli("info", "two", "--format", "json"))
    assert (two["cpus"], two["memory"], two["labels"]) == (3, 1 << 30, {"a": "b"})
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**two["spec"], "name": "three", "labels": {}}))
    assert posada_cli("create", "-f", str(file), "-l", "x=y").out == "three\n"
    assert parsed(posada_cli("info", "three", "--format", "json"))["labels"] == {"x": "y"}


def test_start_stop_pause_and_their_kin(posada_cli: Posada) -> None:
    for name in ("a", "b"):
        assert posada_cli("create", "--engine", "fake", "--name", name, IMAGE).status == 0
    assert posada_cli("start", "a", "b").out == "a\nb\n"
    assert posada_cli("pause", "a").out == "a\n"
    assert states(posada_cli) == {"a": "paused", "b": "running"}
    assert posada_cli("resume", "a").status == 0
    assert posada_cli("restart", "a").status == 0
    assert posada_cli("stop", "a").status == 0
    assert posada_cli("kill", "b").status == 0
    assert states(posada_cli) == {"a": "stopped", "b": "stopped"}
    assert posada_cli("wait", "a").out == "stopped\n"
    assert posada_cli("rename", "a", "z").out == "z\n"
    assert posada_cli("rm", "z", "b").out == "z\nb\n"
    assert states(posada_cli) == {}


def test_one_machine_that_fails_does_not_stop_the_rest(posada_cli: Posada) -> None:
    assert posada_cli("create", "--engine", "fake", "--name", "a", IMAGE).status == 0
    done = posada_cli("start", "nobody", "a")
    assert (done.status, done.out) == (1, "a\n")
    assert done.err.startswith("posada: error: no vm named 'nobody'\nhint: ")
    done = posada_cli("rm", "a")
    assert done.status == 1
    assert "running" in done.err
    assert posada_cli("rm", "-f", "a").status == 0


def test_wait_times_out_with_124(posada_cli: Posada) -> None:
    up(posada_cli, "a")
    assert posada_cli("wait", "a", "--timeout", "0.1").status == 124


def test_ps(posada_cli: Posada) -> None:
    up(posada_cli, "a", "-l", "team=x", "-p", "80")
    assert posada_cli("create", "--engine", "fake", "--name", "b", IMAGE).status == 0
    table = posada_cli("ls").out.splitlines()
    assert table[0].split() == ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "UP", "PORTS", "UUID"]
    assert table[1].split()[:5] == ["a", "running", IMAGE, "1", "512MiB"]
    assert "->80" in table[1]
    assert posada_cli("ps", "-q").out == "a\nb\n"
    assert posada_cli("ps", "-q", "--running").out == "a\n"
    assert posada_cli("ps", "-q", "-l", "team=x").out == "a\n"
    assert posada_cli("ps", "-q", "-a").out == "a\nb\n"
    (a, b) = parsed(posada_cli("ps", "--format", "json"))
    assert set(a) == {
        "name", "uuid", "state", "image", "engine", "cpus", "memory", "ports", "labels", "created", "started", "parent",
        "generation", "ephemeral", "exit",
    }  # fmt: skip
    assert (a["ports"][0]["guest"], b["ports"], b["started"]) == (80, [], None)


def test_info_and_top(posada_cli: Posada) -> None:
    up(posada_cli, "a", "-p", "80")
    assert posada_cli("snapshot", "create", "a", "base").status == 0
    text = posada_cli("info", "a").out
    assert ("state     running" in text, "snapshot  base (full)" in text, "uses" in text) == (True, True, True)
    info = parsed(posada_cli("info", "a", "--format", "json"))
    assert (info["usage"]["rss"] > 0, info["snapshots"][0]["name"], info["pid"] > 0) == (True, "base", True)
    assert posada_cli("top").out.splitlines()[1].split()[0] == "a"
    (line,) = posada_cli("top", "--format", "json").out.splitlines()
    assert json.loads(line)[0]["name"] == "a"


def test_fork_and_clone(posada_cli: Posada) -> None:
    up(posada_cli, "a")
    assert posada_cli("fork", "a", "-n", "2").status == 0
    assert posada_cli("fork", "a", "--name", "x", "--name", "y").out == "x\ny\n"
    assert posada_cli("fork", "a", "v", "w").out == "v\nw\n"
    assert len(posada_cli("fork", "a", "2").out.splitlines()) == 2
    assert posada_cli("fork", "a", "0").status == 2
    assert len(states(posada_cli)) == 9
    assert posada_cli("fork", "a", "-n", "3", "--name", "z").status == 2
    assert posada_cli("snapshot", "create", "a", "s").out == "s\n"
    assert posada_cli("fork", "a", "--snapshot", "s", "--name", "f").out == "f\n"
    assert posada_cli("clone", "a", "c", "--snapshot", "s").out == "c\n"
    assert states(posada_cli)["c"] == "created"
    done = posada_cli("clone", "a", "d")
    assert (done.status, "hint:" in done.err) == (1, True)


def test_snapshots(posada_cli: Posada) -> None:
    up(posada_cli, "a")
    for name in ("one", "two"):
        assert posada_cli("snapshot", "create", "a", name).out == f"{name}\n"
    assert posada_cli("snapshot", "restore", "a", "one").out == "a\n"
    assert posada_cli("snapshot", "create", "a", "three").status == 0
    listed = parsed(posada_cli("snapshot", "ls", "a", "--format", "json"))
    assert [(s["name"], s["kind"]) for s in listed] == [("one", "full"), ("two", "full"), ("three", "full")]
    assert posada_cli("snapshot", "ls", "a").out.splitlines()[1].split()[:2] == ["one", "full"]
    assert posada_cli("snapshot", "tree", "a").out.splitlines() == [
        "a",
        "└─ one (full)",
        "   ├─ two (full)",
        "   └─ three (full)  ← the machine",
    ]
    tree = parsed(posada_cli("snapshot", "tree", "a", "--format", "json"))
    assert tree["head"] == listed[2]["id"]
    done = posada_cli("snapshot", "rm", "a", "one")
    assert (done.status, "two, three" in done.err or "three, two" in done.err) == (1, True)
    assert posada_cli("snapshot", "rm", "-r", "a", "one").out == "one\n"
    assert parsed(posada_cli("snapshot", "ls", "a", "--format", "json")) == []
    assert posada_cli("snapshot", "create", "a", "--kind", "disks").status == 0


def test_devices(posada_cli: Posada, tmp_path: Path) -> None:
    assert posada_cli("create", "--engine", "fake", "--name", "a", IMAGE).status == 0
    assert posada_cli("resize", "a").status == 2
    resized = parsed(posada_cli("resize", "a", "--cpus", "2", "-m", "1GiB", "--disk", "4MiB", "--format", "json"))
    assert (resized["cpus"], resized["memory"], resized["disks"][0]["size"]) == (2, 1 << 30, 4 << 20)
    assert posada_cli("attach", "a", "data").status == 2
    assert posada_cli("attach", "a", "data", "--size", "1MiB").out == "data\n"
    assert posada_cli("resize", "a", "--disk", "data=2MiB").status == 0
    assert posada_cli("detach", "a", "data").out == "data\n"
    assert posada_cli("start", "a").status == 0
    added = parsed(posada_cli("port", "a", "--add", "80", "--add", "53/udp", "--format", "json"))
    assert [(p["guest"], p["protocol"]) for p in added] == [(80, "tcp"), (53, "udp")] or len(added) == 2
    assert "http://127.0.0.1:" in posada_cli("port", "a").out
    assert len(parsed(posada_cli("port", "a", "--rm", "80", "--format", "json"))) == 1
