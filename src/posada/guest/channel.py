"""Taking one of a machine's channels to its agent: the first whose lock is free, for one client at a time."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from posada.errors import Busy, GuestGone, HostError, PosadaError, Timeout
from posada.guest.link import Alive, GuestLink

_FIRST_PAUSE, _LAST_PAUSE = 0.01, 0.25


class ChannelLock:
    """An exclusive flock on ``<channel>.lock``. The kernel drops it when its holder dies, however that happens."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @classmethod
    def take(cls, channel: Path) -> ChannelLock | None:
        """The lock, or None when somebody holds it or the channel's directory is not there (yet)."""
        path = channel.with_name(channel.name + ".lock")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A file that was removed and made anew meanwhile (the vm was started again) would be locked by two.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return cls(fd)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(fd)
        return None

    def release(self) -> None:
        """Idempotent. Unlocks explicitly: a child forked meanwhile holds the same open file."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = None


async def connect(channels: Sequence[Path], *, timeout: float | None, alive: Alive | None) -> GuestLink:
    """A link over the first channel that is free, once the agent has answered.

    Waits for a free channel, for the socket to appear, and for the guest to boot, ``timeout`` seconds in all. Raises
    Busy when every channel was taken all the time, Timeout, GuestGone (at once when ``alive`` denies), ProtocolError,
    GuestError when the guest says that it cannot boot, and HostError when the channels are not ours to use.
    """
    if not channels:
        raise GuestGone("the machine has no channel to an agent", hint="its image runs no posada agent")
    lock: ChannelLock | None = None
    try:
        async with asyncio.timeout(timeout):
            lock, channel = await _take_one(channels, alive)
            return await _open(channel, lock, alive)
    except TimeoutError as error:
        if isinstance(error, PosadaError):
            raise
        if lock is None and any(channel.parent.exists() for channel in channels):
            raise Busy(
                f"all {len(channels)} channels to the guest's agent are in use", hint="wait for other commands to end"
            ) from None
        raise Timeout(f"the guest's agent did not answer within {timeout:g} s", hint="see the console log") from None
    except OSError as error:
        if isinstance(error, PosadaError):
            raise
        raise HostError(f"cannot connect to the guest's agent at {channels[0]}: {error}") from error


async def _take_one(channels: Sequence[Path], alive: Alive | None) -> tuple[ChannelLock, Path]:
    pause = _FIRST_PAUSE
    while True:
        for channel in channels:
            lock = ChannelLock.take(channel)
            if lock is not None:
                return lock, channel
        pause = await _pause(pause, alive)


async def _open(channel: Path, lock: ChannelLock, alive: Alive | None) -> GuestLink:
    """The link owns the lock from here on; on failure it is released."""
    pause = _FIRST_PAUSE
    try:
        while True:
            try:
                return await GuestLink.open(channel, alive, on_end=lock.release)
            except GuestGone:
                raise
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                pause = await _pause(pause, alive)
    except BaseException:
        lock.release()
        raise


async def _pause(pause: float, alive: Alive | None) -> float:
    """Nothing tells when a socket appears or another process unlocks: look again, less and less often."""
    if alive is not None and not alive():
        raise GuestGone("the guest is gone: its machine has ended")
    await asyncio.sleep(pause)
    return min(2 * pause, _LAST_PAUSE)
