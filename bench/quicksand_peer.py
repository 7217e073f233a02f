"""Run by an interpreter that has quick-sandbox: prints milliseconds of its verbs, as one JSON object."""

import asyncio
import json
import sys
import time

from quicksand import Sandbox  # type: ignore[import-not-found]


async def main(runs: int) -> None:
    took: dict[str, list[float]] = {"cold": [], "exec": [], "checkpoint": [], "restore": []}

    def add(name: str, began: float) -> None:
        took[name].append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    async with Sandbox(image="alpine", accel="tcg") as sandbox:  # its "auto" picks a /dev/kvm that only seems to work
        await sandbox.execute("echo first")
        add("cold", began)
        for _ in range(runs):
            began = time.perf_counter()
            await sandbox.execute("true")
            add("exec", began)
        for number in range(min(runs, 5)):
            began = time.perf_counter()
            await sandbox.checkpoint(f"point{number}")
            add("checkpoint", began)
        for number in range(min(runs, 5)):
            began = time.perf_counter()
            await sandbox.revert(f"point{number}")
            await sandbox.execute("true")
            add("restore", began)
    print(json.dumps(took))


asyncio.run(main(int(sys.argv[1])))
