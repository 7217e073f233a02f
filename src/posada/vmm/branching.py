"""Requests for points in time and copies: what `posada.vmm.control` gets, done by `fork` and `capture`.

Each pauses the machine, so each runs from `Loop.soon`: at a moment when no handler is under way, and the loop has nothing
in hand that a forked child must not dispatch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from posada.errors import Busy, EngineError
from posada.proto.monitor import Op
from posada.runtime.files import identity
from posada.vmm.block.chain import layers_of
from posada.vmm.block.file import File
from posada.vmm.capture import Captured, Files, capture
from posada.vmm.config import MonitorConfig
from posada.vmm.control import Call, Child, Given, Handler, Result
from posada.vmm.fork import Child as Birth
from posada.vmm.fork import Forker
from posada.vmm.machine import Machine
from posada.vmm.migrate import Moved, Outgoing
from posada.vmm.pagemap import PageMap
from posada.vmm.reset import Point
from posada.vmm.tied import fork_servers, whole
from posada.vmm.tuning import find_disk


@dataclass(slots=True)
class NewLayer:
    """A disk's new top, and read-only descriptors of files of which the layer it freezes is one."""

    disk: str
    top: int
    """-1 once the disk has it."""
    frozen: list[int]

    def find(self, file: File) -> int:
        """The place of ``file`` in ``frozen``. Raises EngineError."""
        try:
            return [*map(identity, self.frozen)].index(file.identity())
        except ValueError:
            raise EngineError(f"disk {self.disk!r} is not written to the layer that is to be frozen") from None

    def close(self) -> None:
        for fd in {self.top, *self.frozen} - {-1}:
            os.close(fd)
        self.top, self.frozen = -1, []


class Switch:
    """Disks go on, on new layers. ``switched`` names those that do already."""

    def __init__(self, machine: Machine, layers: Sequence[NewLayer]) -> None:
        self._machine, self._layers = machine, layers
        self.switched: list[str] = []

    def check(self) -> None:
        """That each disk is written to a file that is given as frozen. Raises EngineError, OSError."""
        for layer in self._layers:
            layer.find(layers_of(find_disk(self._machine, layer.disk).disk)[-1].file)

    def __call__(self) -> None:
        """While the vcpus stand still. Raises OSError, ImageError, EngineError."""
        for layer in self._layers:
            blk = find_disk(self._machine, layer.disk)
            below = blk.disk
            blk.switch(layer.top)
            layer.top = -1
            self.switched.append(layer.disk)
            # What is below belongs to others too from now on: not even a monitor that was taken over may write to it.
            file = layers_of(below)[-1].file
            file.replace(layer.frozen.pop(layer.find(file)))

    def close(self) -> None:
        for layer in self._layers:
            layer.close()


class Branching:
    """The handlers of one machine, and of the children it becomes."""

    def __init__(self, machine: Machine, live: Callable[[], NoReturn] | None = None) -> None:
        """``live`` is `Forker`'s."""
        self._machine = machine
        self._forker = Forker(machine, live)
        self._point: Point | None = None
        self._busy = False

    def handlers(self) -> dict[Op, Handler]:
        work = {
            Op.FORK: self._fork,
            Op.SWITCH: self._switch,
            Op.CAPTURE: self._capture,
            Op.RESET: self._reset,
            Op.MIGRATE: self._migrate,
        }
        alone = {op: self._alone(handler) for op, handler in work.items()}
        return {op: whole(self._machine, op, each) for op, each in alone.items()}

    def _alone(self, handler: Callable[[Call], None]) -> Handler:
        """One at a time: a child must not inherit another request, nor its descriptors."""

        def handle(call: Call) -> None:
            if self._busy:
                raise Busy("the machine is being copied, saved or moved", hint="try again when that is done")
            self._busy = True
            try:
                handler(call)
            except BaseException:
                self._busy = False
                raise

        return handle

    def _fork(self, call: Call) -> None:
        children = [Birth(config) for config in _configs(call.take_children())]
        switch = self._layers(call)

        def forget() -> None:
            switch.close()
            self._busy = False
            if self._point is not None:
                self._point.forget()
                self._point = None

        def part() -> None:
            try:
                switch()
            finally:
                fork_servers(self._machine, [child.config for child in children])

        def fork() -> Result | None:
            forked = self._forker.fork(children, part, forget)
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
            self._busy = False
            if isinstance(outcome, Captured):
                call.done({"pause": outcome.pause, "bytes": outcome.bytes})
            else:
                _fail(call, outcome, switch)

        def begin() -> None:
            complete = bool(call.args.get("complete", False))
            capture(self._machine, Files(memory, devices, pagemap, complete), written, switch)

        self._later(call, switch, begin)

    def _reset(self, call: Call) -> None:
        """With a page map: make the point to come back to, its disks on ``layers``. Without: come back to it. ``drop``:
        forget it."""
        pagemap = PageMap(call.given.take(call.args["pagemap"])) if "pagemap" in call.args else None
        layers = [NewLayer(item["disk"], call.given.take(item["top"]), []) for item in call.args.get("layers", ())]

        def work() -> Result:
            if self._point is not None and (pagemap is not None or call.args.get("drop")):
                self._point.close()
                self._point = None
            if pagemap is not None:
                try:
                    self._point = Point(self._machine, pagemap, {layer.disk: layer.top for layer in layers})
                finally:
                    pagemap.close()
            elif not call.args.get("drop"):
                if self._point is None:
                    raise EngineError("there is no point to reset the machine to", hint="make one first")
                return {"pages": self._point.reset()}
            return {}

        self._later(call, Switch(self._machine, layers), work)

    def _migrate(self, call: Call) -> None:
        """To whoever is at the other end of the stream, which must be a monitor that waits for a machine."""
        stream = call.given.take(call.args["fd"])
        pages = PageMap(call.given.take(call.args["pagemap"])) if "pagemap" in call.args else None

        def moved(outcome: Moved | Exception) -> None:
            self._busy = False
            if isinstance(outcome, Moved):
                call.done({"pause": outcome.pause, "bytes": outcome.bytes, "rounds": outcome.rounds})
            else:
                call.fail(outcome)

        def begin() -> None:
            try:
                if self._point is not None:
                    raise EngineError("a machine with a reset point cannot be migrated", hint="drop the point first")
                Outgoing(self._machine, stream, call.args["pause"], moved, pages)
            finally:
                if pages is not None:
                    pages.close()

        self._later(call, Switch(self._machine, []), begin)

    def _layers(self, call: Call) -> Switch:
        """Raises EngineError, when nothing has happened yet, for layers that do not fit the machine's disks."""
        switch = Switch(
            self._machine,
            [
                NewLayer(item["disk"], call.given.take(item["top"]), [*map(call.given.take, item["frozen"])])
                for item in call.args["layers"]
            ],
        )
        try:
            switch.check()
        except BaseException:
            switch.close()
            raise
        return switch

    def _later(self, call: Call, switch: Switch, work: Callable[[], Result | None]) -> None:
        """Answered now, unless ``work`` returns None: it will answer by itself, or need not."""

        def run() -> None:
            try:
                result = work()
                if result is not None:
                    self._busy = False
                    call.done(result)
            except Exception as error:
                self._busy = False
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
