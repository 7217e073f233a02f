"""Another process takes over: machines live on, whoever made them has gone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from contract_kit import RAM, Inn

from posada.model.states import State


def elsewhere(inn: Inn, code: str) -> str:
    """Run code in another process, with ``host`` open. Returns what it prints."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom posada.host.host import Host\n"
        "async def main():\n"
        "    host = await Host.open(Path(sys.argv[1]) / 'home', Path(sys.argv[1]) / 'run')\n"
        f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
        "    await host.close()\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(inn.base)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def only_where_machines_outlive_processes(inn: Inn) -> None:
    if inn.engine == "fake":
        pytest.skip("a fake guest dies with the process that made it")


async def test_work_in_a_machine_that_another_process_forked(inn: Inn) -> None:
    await inn.machine()
    await inn.put("one", RAM, "then")
    out = elsewhere(
        inn,
        """
        (kid,) = await host.vms.fork("one", names=["theirs"])
        print((await host.vms.run("theirs", ["cat", "/dev/shm/note"])).stdout)
        """,
    )
    assert out.strip() == "then"
    vm = inn.vms.get("theirs")
    assert vm.state is State.RUNNING
    assert await inn.see("theirs", RAM) == "then"
    await inn.vms.snapshot("theirs", "point")
    elsewhere(inn, "await host.vms.restore('theirs', 'point')")
    assert await inn.see("theirs", RAM) == "then", "the connection finds the new process"


async def test_an_ephemeral_machine_ends_with_its_owner(inn: Inn) -> None:
    await inn.machine()
    elsewhere(inn, "await host.vms.fork('one', names=['gone'], ephemeral=True)")
    await inn.until(lambda: "gone" not in {vm.name for vm in inn.vms.list()})
    await inn.until(lambda: inn.host.db.vm_named("gone") is None)


async def test_two_processes_start_and_delete_the_same_machine(inn: Inn) -> None:
    await inn.vms.create(inn.spec(name="one"))
    program = "print('ok')\nfor _ in range(1):\n    await host.vms.start('one')"
    import asyncio

    results = await asyncio.gather(asyncio.to_thread(_outcome, inn, program), asyncio.to_thread(_outcome, inn, program))
    assert sorted(results) == ["done", "failed"], "one starts it, the other is told that it runs"
    assert inn.vms.get("one").state is State.RUNNING
    delete = "await host.vms.delete('one', force=True)"
    results = await asyncio.gather(asyncio.to_thread(_outcome, inn, delete), asyncio.to_thread(_outcome, inn, delete))
    assert "done" in results
    assert inn.host.db.vm_named("one") is None


def _outcome(inn: Inn, code: str) -> str:
    try:
        elsewhere(inn, code)
    except AssertionError:
        return "failed"
    return "done"
