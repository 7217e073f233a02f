"""What snapshot and fork share: the guest told to hold still, the chains grown, and both put right afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from posada.engine.base import CaptureFailed
from posada.errors import EngineError, GuestError, PosadaError, Timeout
from posada.host.house import House
from posada.host.layers import Growth, grow, settle, shrink
from posada.host.operations import Operation
from posada.model.records import VmRecord
from posada.model.states import State

#: Seconds that an agent has to stop its processes, and to let them go on.
PREPARE_TIMEOUT = 10.0


@asynccontextmanager
async def still(house: House, vm: VmRecord, op: Operation) -> AsyncIterator[bytes]:
    """Inside, the guest's processes stand still, so that whatever is made of it wakes up before they do.

    Yields the token of fork.prepare, which the copies need for their identity reset; empty for a guest without agent or
    one that is paused, and cannot answer. Afterwards the source's processes go on, whatever happened.
    """
    if vm.state is not State.RUNNING or not house.has_agent(vm):
        yield b""
        return
    client = await house.guests.connect(vm, timeout=PREPARE_TIMEOUT)
    token = secrets.token_bytes(16)
    op.intend(token=token.hex())
    try:
        try:
            async with asyncio.timeout(PREPARE_TIMEOUT):
                await client.fork_prepare(token)
        except TimeoutError:
            raise Timeout(
                f"the guest of {vm.name!r} did not hold still within {PREPARE_TIMEOUT:g} s",
                hint="its agent hangs; pause the machine first",
            ) from None
        yield token
    finally:
        # A guest that cannot be told (its machine is gone, or hangs) thaws by itself after 30 s.
        with contextlib.suppress(GuestError, TimeoutError):
            async with asyncio.timeout(PREPARE_TIMEOUT):
                await client.fork_done(token)


@asynccontextmanager
async def growing(house: House, vm: VmRecord) -> AsyncIterator[Growth]:
    """The disks of ``vm`` with a new layer on top; inside, the engine switches to it. Taken back if that fails.

    Turns `CaptureFailed` into the PosadaError that caused it.
    """
    growth = grow(house, vm)
    try:
        yield growth
    except CaptureFailed as failure:
        shrink(house, growth, failure.switched)
        cause = failure.__cause__
        raise (cause if isinstance(cause, PosadaError) else EngineError(str(failure))) from failure
    except PosadaError:
        shrink(house, growth)
        raise
    except BaseException:
        # Nobody can say how far the engine came. The longer chain is true either way (see posada.host.layers).
        settle(growth)
        raise
    else:
        settle(growth)
