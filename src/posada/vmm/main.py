"""The monitor's process: ``python -I -S main.py FD``, where FD holds the machine's `MonitorConfig` as CBOR.

Engines start it by way of `posada.vmm.nursery`. Given a starter (`posada.vmm.life`), it answers on that socket. Exit
status: 0 when the machine ran, 1 when it could not be made (the reason is on stderr and with the starter), 2 for a misuse.
How the machine ended is in the exit record.
"""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from typing import NoReturn

if __name__ == "__main__":  # -I: not even our own package is on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from posada.errors import PosadaError
from posada.proto import cbor
from posada.runtime import ending
from posada.vmm import jail, process, snapshot
from posada.vmm.branching import Branching
from posada.vmm.builder import build
from posada.vmm.config import MonitorConfig
from posada.vmm.control import Control
from posada.vmm.gdb.debugger import Debugging
from posada.vmm.incoming import Incoming
from posada.vmm.machine import Machine
from posada.vmm.tuning import Tuning
from posada.vmm.verbs import Verbs

MAX_CONFIG = 1 << 20


def main(argv: list[str]) -> int:
    """Run one machine until it ends."""
    if len(argv) != 2 or not argv[1].isdecimal():
        return _complain("usage: main.py FD", 2)
    try:
        config = read_config(int(argv[1]))
    except (PosadaError, OSError, cbor.CborError) as error:
        return _complain(f"cannot make the machine: {error}", 1)
    return live_as(config)


def born(fd: int, given: list[int]) -> int:
    """In a process that the nursery has forked (`posada.vmm.nursery`): the document in ``fd``, and what it speaks of."""
    try:
        with os.fdopen(fd, "rb") as file:
            document = cbor.decode_map(file.read(MAX_CONFIG + 1))
        place = dict(zip(document["fds"], given, strict=True))
        config = MonitorConfig.from_dict(document["config"]).relocated(place.__getitem__)
    except (PosadaError, OSError, cbor.CborError, LookupError, TypeError, ValueError) as error:
        return _complain(f"cannot make the machine: {error}", 1)
    return live_as(config)


def live_as(config: MonitorConfig) -> int:
    """Make the machine and run it to its end. Returns the exit status."""
    starter = config.life.starter
    try:
        if starter >= 0:
            process.detach()
            process.announce(starter)
        incoming = Incoming(config.incoming) if config.incoming >= 0 else None
        machine = incoming.receive(config) if incoming else make(config)
        settle(machine)
        if incoming:
            incoming.take_over()
    except (PosadaError, OSError, cbor.CborError) as error:
        process.refuse(starter, error)
        return _complain(f"cannot make the machine: {error}", 1)
    run(machine, incoming)
    return 0


def make(config: MonitorConfig) -> Machine:
    """From power-on, or from where another machine was saved."""
    if config.restore is None:
        return build(config)
    document = snapshot.Document.read(config.restore.devices)
    os.close(config.restore.devices)
    return snapshot.restore(config, document, config.restore.memory)


def settle(machine: Machine) -> None:
    """Into the jail, with the last door open: the control socket. Raises OSError."""
    config = machine.config
    process.settle(machine.life, lambda: machine.end(ending.KILLED))
    gone = jail.enter(config.jail)
    handlers = (
        Verbs(machine, gone).handlers()
        | Branching(machine, partial(live, machine)).handlers()
        | Tuning(machine).handlers()
    )
    handlers = Debugging(machine).handlers(handlers)
    machine.control = Control(machine.loop, config.control, handlers, machine.life.note)
    process.warm()
    gone += jail.lock_main(config.jail)


def read_config(fd: int) -> MonitorConfig:
    """Read ``fd`` to its end and close it. Raises CborError, StateError."""
    with os.fdopen(fd, "rb") as file:
        return MonitorConfig.from_dict(cbor.decode_map(file.read(MAX_CONFIG + 1)))


def run(machine: Machine, incoming: Incoming | None = None) -> None:
    """From the first instruction, or from where another monitor stopped, to the exit record."""
    restore = machine.config.restore
    machine.start(paused=restore is not None and restore.paused)
    if incoming:
        incoming.running()
    machine.life.started()
    serve(machine)


def serve(machine: Machine) -> None:
    """The loop, to the exit record."""
    try:
        machine.loop.run()
    except Exception as error:
        machine.exited(machine.vcpus.threads[0], error)
        raise
    finally:
        machine.close()


def live(machine: Machine) -> NoReturn:
    """A forked child, once it has all that it needs: its loop on a thread of its own, to the end of the process."""
    status = 1
    try:
        serve(machine)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _complain(text: str, status: int) -> int:
    print(text, file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
