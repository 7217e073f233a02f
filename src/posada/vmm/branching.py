"""Requests for points in time and copies: what `posada.vmm.control` gets, done by `fork` and `capture`.

Each pauses the machine, so each runs from `Loop.soon`: at a moment when no handler is under way, and the loop has nothing
in hand that a forked child must not dispatch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posada.errors import PosadaError
from posada.proto.monitor import Op
from posada.vmm.capture import Captured, Files, capture
from posada.vmm.config import MonitorConfig
from posada.vmm.control import Call, Child, Given, Handler, Result
from posada.vmm.fork import Forker
from posada.vmm.machine import Machine
from posada.vmm.tuning import find_disk


@dataclass(slots=True)
class NewLayer:
    """A disk's new top, and a read-only descriptor of the layer it freezes. -1 once somebody has it."""

    disk: str
    top: int
    frozen: int

    def close(self) -> None:
        for fd in {self.top, self.frozen} - {-1}:
            os.close(fd)
        self.top = self.frozen = -1


class Switch:
    """Disks go on, on new layers. ``switched`` names those that do already."""

    def __init__(self, machine: Machine, layers: Sequence[NewLayer]) -> None:
        self._machine, self._layers = machine, layers
        self.switched: list[str] = []

    def __call__(self) -> None:
        """While the vcpus stand still. Raises OSError, ImageError, EngineError."""
        for layer in self._layers:
            blk = find_disk(self._machine, layer.disk)
            below = blk.disk
            blk.switch(layer.top)
            layer.top = -1
            self.switched.append(layer.disk)
            # What is below belongs to others too from now on: not even a monitor that was taken over may write to it.
            below.reopen([*map(os.dup, below.descriptors()[:-1]), layer.frozen])
            layer.frozen = -1

    def close(self) -> None:
        for layer in self._layers:
            layer.close()


class Branching:
    """The handlers of one machine, and of the children it becomes."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._forker = Forker(machine)

    def handlers(self) -> dict[Op, Handler]:
        return {Op.FORK: self._fork, Op.SWITCH: self._switch, Op.CAPTURE: self._capture}

    def _fork(self, call: Call) -> None:
        children = _configs(call.take_children())
        switch = self._layers(call)

        def fork() -> Result | None:
            forked = self._forker.fork(children, switch)
            if forked is None:
                return None  # we are a child
            pids = [{"pid": pid} if isinstance(pid, int) else {"error": str(pid)} for pid in forked.children]
            return {"pause": forked.pause, "children": pids}

        self._later(call, switch, fork)

    def _switch(self, call: Call) -> None:
        switch = self._layers(call)

        def change() -> Result:
            begun = time.monotonic()
            with self._machine.vcpus.quiesced():
                for layer in call.args["layers"]:
                    find_disk(self._machine, layer["disk"]).quiesce()
                switch()
            return {"pause": time.monotonic() - begun}

        self._later(call, switch, change)

    def _capture(self, call: Call) -> None:
        memory, devices, pagemap = (call.given.take(call.args[name]) for name in ("memory", "devices", "pagemap"))
        switch = self._layers(call)

        def written(outcome: Captured | Exception) -> None:
            if isinstance(outcome, Captured):
                call.done({"pause": outcome.pause, "bytes": outcome.bytes})
            else:
                _fail(call, outcome, switch)

        def begin() -> None:
            capture(self._machine, Files(memory, devices, pagemap), written, switch)

        self._later(call, switch, begin)

    def _layers(self, call: Call) -> Switch:
        layers = [
            NewLayer(item["disk"], call.given.take(item["top"]), call.given.take(item["frozen"]))
            for item in call.args["layers"]
        ]
        return Switch(self._machine, layers)

    def _later(self, call: Call, switch: Switch, work: Callable[[], Result | None]) -> None:
        def run() -> None:
            try:
                result = work()
                if result is not None:
                    call.done(result)
            except (PosadaError, OSError) as error:
                _fail(call, error, switch)
            finally:
                switch.close()

        self._machine.loop.soon(run)


def _fail(call: Call, error: Exception, switch: Switch) -> None:
    error.switched = tuple(switch.switched)  # type: ignore[attr-defined]
    call.fail(error)


def _configs(children: Sequence[Child]) -> list[MonitorConfig]:
    """What the client gave for children. Raises StateError, MonitorProtocolError; all descriptors are closed then."""
    configs: list[MonitorConfig] = []
    try:
        for child in children:
            configs.append(MonitorConfig.from_dict(child.config).relocated(_taker(child.given)))
            child.given.close()
    except BaseException:
        for config in configs:
            config.close()
        for child in children:
            child.given.close()
        raise
    return configs


def _taker(given: Given) -> Callable[[int], int]:
    return lambda index: given.take(index)
