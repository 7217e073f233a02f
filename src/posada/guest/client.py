"""``GuestClient``: what the host can do inside a guest, over one channel to its agent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posada.errors import CommandError, GuestError, Timeout
from posada.guest import channel
from posada.guest.connection import GuestSocket
from posada.guest.files import GuestFiles
from posada.guest.link import Alive
from posada.guest.process import MAX_OUTPUT, GuestProcess
from posada.guest.stream import Stream
from posada.model.exec import AgentHello, ExecResult, IdentityReset, Pty

_FIRST_INPUT = 64 << 10
"""Bytes of input that go out with the request; more waits for the command to take it."""


class GuestClient(GuestFiles):
    """A connection to a guest's agent. Any number of tasks of one event loop may use it at the same time.

    Nothing here has a timeout of its own: a machine that is paused is not gone. When the guest or its machine ends, all
    that waits and all that follows raises GuestGone at once. Everything raises GuestError for what the agent refuses.
    """

    @classmethod
    async def connect(
        cls, channels: Sequence[Path], *, timeout: float | None = None, alive: Alive | None = None
    ) -> GuestClient:
        """Connect over the first free one of the machine's channels, and wait until the agent answers.

        ``alive`` tells whether the machine still runs; it is asked now and then. Raises Timeout, Busy (all channels are
        in use by others), GuestGone, GuestError (the guest cannot boot), ProtocolError.
        """
        return cls(await channel.connect(channels, timeout=timeout, alive=alive))

    @property
    def hello(self) -> AgentHello:
        """What the agent said of itself and its guest."""
        return self._link.hello

    @property
    def gone(self) -> bool:
        """The connection is over."""
        return self._link.gone

    @property
    def busy(self) -> bool:
        """Something is going on: a command, a copy, a connection."""
        return self._link.busy

    async def close(self) -> None:
        """End the connection. Processes that were not started with ``keep`` are hung up. Idempotent."""
        self._link.close()
        await self._link.wait_ended()

    async def __aenter__(self) -> GuestClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(self, op: str, /, **args: Any) -> dict[str, Any]:
        """One short request, as in the protocol's table of calls. The answer is the guest's: check it."""
        return await self._link.call(op, args)

    # -- commands ---------------------------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        clear_env: bool = False,
        user: str | None = None,
        stdin: bool = False,
        pty: Pty | None = None,
        keep: bool = False,
    ) -> GuestProcess:
        """Start a command and return once it runs. Raises GuestError (``ENOENT``, ``EACCES``) when it cannot.

        ``env`` is added to the guest's environment, or is all of it (``clear_env``). ``user`` is a name or number, with
        an optional ``:group``. Without ``stdin`` it reads /dev/null. ``keep``: it goes on when the connection ends.
        """
        body = _exec_body(argv, cwd=cwd, env=env, clear_env=clear_env, user=user, stdin=stdin, pty=pty, keep=keep)
        return await _started(await self._start(body, argv))

    async def attach(self, exec_id: int) -> GuestProcess:
        """Go on with a command that was started with ``keep`` and whose connection has ended."""
        return await _started(await self._start({"kind": "attach", "exec": exec_id}, [f"exec {exec_id}"]))

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output: int = MAX_OUTPUT,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        clear_env: bool = False,
        user: str | None = None,
        pty: Pty | None = None,
    ) -> ExecResult:
        """Run a command to its end and collect its output. A cancelled or timed out command is hung up, then killed.

        Raises Timeout, GuestError (also for more than ``max_output`` bytes of output), with ``check`` CommandError.
        """
        stdin = input is not None
        body = _exec_body(argv, cwd=cwd, env=env, clear_env=clear_env, user=user, stdin=stdin, pty=pty)
        try:
            async with asyncio.timeout(timeout):
                result = await self._run(body, argv, input or b"", max_output)
        except TimeoutError:
            raise Timeout(f"command {' '.join(argv)!r} ran longer than {timeout:g} s and was ended") from None
        if check and not result.ok:
            raise CommandError(argv, result)
        return result

    async def _run(self, body: dict[str, Any], argv: Sequence[str], input: bytes, max_output: int) -> ExecResult:
        head, rest = input[:_FIRST_INPUT], input[_FIRST_INPUT:]
        process = await self._start(body, argv, data=head, eof=body["stdin"] and not rest)
        feeder = asyncio.create_task(_feed(process, rest)) if rest else None
        try:
            return await process.wait(max_output=max_output)
        finally:
            if feeder is not None:
                feeder.cancel()
                await asyncio.wait([feeder])
            await process.close()

    async def _start(
        self, body: dict[str, Any], argv: Sequence[str], *, data: bytes = b"", eof: bool = False
    ) -> GuestProcess:
        outputs = frozenset({0}) if "pty" in body else frozenset({0, 1})
        what = f"exec {argv[0]}"
        stream: Stream = await self._link.open_stream(body, what=what, outputs=outputs, data=data, eof=eof)
        # A terminal is always written to; of a command that is attached to we do not know.
        return GuestProcess(self._link, stream, argv, stdin=body.get("stdin", True) or "pty" in body)

    # -- connections ------------------------------------------------------------------------------------------------

    async def open_tcp(self, port: int, host: str = "127.0.0.1") -> GuestSocket:
        """Connect to a TCP port from inside the guest. Raises GuestError (``ECONNREFUSED``)."""
        return await self._connect({"host": host, "port": port}, f"connect to {host}:{port}")

    async def open_unix(self, path: str) -> GuestSocket:
        """Connect to a unix socket in the guest."""
        return await self._connect({"unix": path}, f"connect to {path}")

    async def _connect(self, where: dict[str, Any], what: str) -> GuestSocket:
        stream = await self._link.open_stream({"kind": "connect", **where}, what=what)
        try:
            await stream.opened()
        except BaseException:
            stream.close()
            raise
        return GuestSocket(stream)

    # -- forks ------------------------------------------------------------------------------------------------------

    async def fork_prepare(self, token: bytes) -> None:
        """Stop every process of the guest, and have it remember ``token``. Undone by itself after 30 s."""
        await self._link.call("fork.prepare", {"token": token})

    async def fork_done(self, token: bytes) -> None:
        """In the source: the processes go on."""
        await self._link.call("fork.done", {"token": token})

    async def identity_reset(self, identity: IdentityReset) -> dict[str, Any]:
        """In a fork: make it another machine than its source, then let its processes go on. Returns step → outcome.

        Raises GuestError when a step fails; nothing goes on then.
        """
        args: dict[str, Any] = {
            "generation": identity.generation,
            "hostname": identity.hostname,
            "machine_id": identity.machine_id,
            "macs": list(identity.macs),
            "entropy": identity.entropy,
            "time_ns": identity.time_ns,
            "ssh_host_keys": identity.ssh_host_keys,
        }
        if identity.token is not None:
            args["token"] = identity.token
        steps = (await self._link.call("identity.reset", args)).get("steps")
        if not isinstance(steps, dict):
            raise GuestError("identity.reset: the guest's agent does not say what it did")
        return steps


def _exec_body(
    argv: Sequence[str],
    *,
    cwd: str | None,
    env: Mapping[str, str] | None,
    clear_env: bool,
    user: str | None,
    stdin: bool,
    pty: Pty | None,
    keep: bool = False,
) -> dict[str, Any]:
    if isinstance(argv, (str, bytes)) or not argv:
        raise ValueError(f"a command is a list of its words, not {argv!r}")
    body: dict[str, Any] = {"kind": "exec", "argv": list(argv), "stdin": stdin}
    if env:
        body["env"] = dict(env)
    if clear_env:
        body["clear_env"] = True
    if cwd is not None:
        body["cwd"] = cwd
    if user is not None:
        body["user"] = user
    if pty is not None:
        body["pty"] = {"rows": pty.rows, "cols": pty.cols, "term": pty.term}
    if keep:
        body["keep"] = True
    return body


async def _started(process: GuestProcess) -> GuestProcess:
    try:
        await process.started()
    except BaseException:
        await process.close()
        raise
    return process


async def _feed(process: GuestProcess, data: bytes) -> None:
    try:
        await process.write(data)
        await process.close_stdin()
    except GuestError:
        pass  # It ended before it had read everything, which is its right; or `wait` tells.
