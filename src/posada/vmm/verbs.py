"""What the engine can ask of a running monitor: the handlers of `posada.vmm.control`, one short function each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from posada.errors import StateError
from posada.kvm.report import report
from posada.proto.monitor import Op
from posada.vmm.control import Call, Handler, Result
from posada.vmm.machine import Machine

#: Exits that a trace may keep for each vcpu.
MAX_TRACE = 10_000
#: Characters of a trace's line; the message has a limit too.
_LINE = 100


class Verbs:
    """The handlers of one machine. ``jail``: what the process gave up, in words."""

    def __init__(self, machine: Machine, jail: list[str]) -> None:
        self._machine, self._jail = machine, jail

    def handlers(self) -> dict[Op, Handler]:
        """Those of this module; snapshots, forks and disks have their own."""
        simple: dict[Op, Callable[[], object]] = {
            Op.PAUSE: self._machine.pause,
            Op.RESUME: self._machine.resume,
            Op.POWERDOWN: self._machine.powerdown,
            Op.DISOWN: self._machine.life.disown,
        }
        return {
            **{op: _simple(action) for op, action in simple.items()},
            Op.QUIT: self._quit,
            Op.INFO: self._info,
            Op.METRICS: self._metrics,
            Op.REGISTERS: self._registers,
            Op.TRACE: self._trace,
        }

    def _quit(self, call: Call) -> Result:
        self._machine.end(call.args.get("reason", "quit by request"))
        return {}

    def _info(self, _: Call) -> Result:
        machine = self._machine
        return {
            "state": machine.state.value,
            "pid": os.getpid(),
            "uuid": machine.config.uuid,
            "name": machine.config.name,
            "cpus": machine.config.cpus,
            "memory": machine.memory.size,
            "jail": self._jail,
            "notes": machine.life.notes[-4096:],
            "devices": [
                {"name": name, "kind": slot.transport.device.kind, "address": slot.address, "gsi": slot.line.gsi}
                for name, slot in machine.slots.items()
            ],
        }

    def _metrics(self, _: Call) -> Result:
        machine = self._machine
        return {
            "exits": [thread.counts() for thread in machine.vcpus.threads],
            "devices": {name: slot.transport.metrics() for name, slot in machine.slots.items()},
        }

    def _registers(self, _: Call) -> Result:
        with self._machine.vcpus.quiesced():
            return {"vcpus": [report(thread.vcpu, self._machine.memory) for thread in self._machine.vcpus.threads]}

    def _trace(self, call: Call) -> Result:
        """What was traced so far; then ``limit`` exits are kept anew, or none for 0."""
        limit = int(call.args["limit"])
        if limit > MAX_TRACE:
            raise StateError(f"a trace of {limit} exits; at most {MAX_TRACE}")
        threads = self._machine.vcpus.threads
        traced = [[[moment, text[:_LINE]] for moment, text in thread.traced()[-500:]] for thread in threads]
        for thread in threads:
            thread.trace(limit)
        return {"vcpus": traced}


def _simple(action: Callable[[], object]) -> Handler:
    def handle(_: Call) -> dict[str, Any]:
        action()
        return {}

    return handle
