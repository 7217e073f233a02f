"""The victim of bench/storm.py: forks a machine, works in the children, deletes some. Killed at any instant."""

from __future__ import annotations

import sys

import posada


def main(source: str, n: int, keep: bool) -> None:
    with posada.connect() as host:  # POSADA_HOME and POSADA_RUNTIME say where
        vm = host.vms.get(source)
        print("connected", flush=True)
        children = vm.fork(n)
        print("forked", *(child.uuid for child in children), flush=True)
        for child in children:
            child.exec("true", check=True)
            child.files.write("/root/mine", child.uuid)
        children.pop().snapshot("s") if keep else None
        print("worked", flush=True)
        if not keep:
            for child in children:
                child.delete()
        print("done", flush=True)


main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "keep")
