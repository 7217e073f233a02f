"""Verbs of a machine's life, with the fake engine."""

from __future__ import annotations

import json

from client_home import IMAGE, Posada, paths, posada_cli

__all__ = ["paths", "posada_cli"]


def test_run_gives_the_commands_output_and_status_and_leaves_nothing(posada_cli: Posada) -> None:
    done = posada_cli("run", "--engine", "fake", IMAGE, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.status, done.out, done.err) == (7, "out\n", "err\n")
    assert json.loads(posada_cli("ps", "--format", "json").out) == []
