"""File system device (virtio 1.2, section 5.11): a folder of the host, by the FUSE protocol.

The jailed monitor opens nothing, so it serves no files either. A process beside it does (`posada.vmm.folder`), one per
folder, confined to it; this device carries the guest's messages to it over a seqpacket socket, and its answers back,
straight from and into guest memory. Requests are answered in their order.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections import deque
from collections.abc import Mapping
from errno import EIO, EPIPE
from struct import Struct
from typing import Any

from posada.vmm.virtio.device import BUDGET, Device
from posada.vmm.virtio.queue import Chain, Queue, QueueError
from posada.vmm.virtio.views import fill, split, total

IN_HEADER = Struct("<IIQQIIII")
"""struct fuse_in_header: length, opcode, unique, nodeid, uid, gid, pid, padding."""
OUT_HEADER = Struct("<IiQ")
"""struct fuse_out_header: length, error (negative errno), unique."""
FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42
SILENT = (FORGET, INTERRUPT, BATCH_FORGET)
"""Opcodes that are not answered."""
MAX_MESSAGE = (128 << 10) + 256
"""Bytes of one message: the largest write, which the server names at INIT, and its headers."""
MAX_PENDING = 64
QUIESCE_SECONDS = 10.0
_MAX_VIEWS = 1024  # IOV_MAX
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Fs(Device):
    """``tag``: what the guest mounts it by, at most 36 bytes. ``fd``: a seqpacket socket to the folder's server, or -1."""

    kind = 26
    name = "fs"
    queue_sizes = (64, 128)

    def __init__(self, tag: str, fd: int) -> None:
        self._tag = tag.encode()
        if not 1 <= len(self._tag) <= 36:
            raise ValueError(f"{tag!r} is not the tag of a folder: 1 to 36 bytes")
        self._sock: socket.socket | None = None
        self._pending: deque[tuple[Queue, Chain, int]] = deque()
        self._held: set[int] = set()
        self._watched = -1
        self._requests = 0
        self._open(fd)

    def config(self) -> bytes:
        return self._tag.ljust(36, b"\0") + (1).to_bytes(4, "little")

    def activate(self) -> None:
        for queue in self.queues:
            queue.places = True  # an answer may come after somebody has begun to log what is written
        self._watch()

    def notify(self, index: int) -> None:
        queue = self.queues[index]
        queue.disable_notify()
        for _ in range(BUDGET):
            chain = queue.pop()
            if chain is None:
                if queue.enable_notify():
                    continue
                break
            if not self._forward(queue, chain):
                queue.put_back(chain)
                self._held.add(index)
                break
        else:
            self.transport.again(index)
        self.signal(queue)
        self._watch()

    def reset(self) -> None:
        """What was asked is answered to nobody; the server's answers still come, and are dropped."""
        self._held.clear()

    def quiesce(self) -> None:
        """Wait for the answers that are under way: the server works on local files."""
        while self._pending and self._sock is not None:
            poller = select.poll()  # select(2) is not for the jailed
            poller.register(self._sock, select.POLLIN)
            if not poller.poll(QUIESCE_SECONDS * 1000):
                self._lose("it does not answer")
                return
            self._answer(0)

    def fork_server(self, fd: int) -> None:
        """The guest is forked: its server forks too, and its twin serves the new guest on ``fd``, with all that is open.

        After `quiesce`, before the guest asks anything more. Raises OSError: there is no server.
        """
        if self._sock is None:
            raise BrokenPipeError(EPIPE, "the folder's server is gone")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
        self._sock.sendmsg([b"\0"], rights, _FLAGS)

    def reopen(self, given: Mapping[str, Any]) -> None:
        """``given``: "fd" to a server that knows what the guest has open (and "server", its end, which is not ours); or
        nothing: then every request fails (EIO)."""
        self.close()
        if given.get("server", -1) >= 0:
            os.close(given["server"])
        self._open(given.get("fd", -1))
        if self.active:
            self._watch()

    def close(self) -> None:
        if self._sock is not None:
            if self._watched >= 0:
                self.loop.unwatch(self._sock.fileno())
                self._watched = -1
            self._sock.close()
            self._sock = None
        self._pending.clear()

    def metrics(self) -> dict[str, int]:
        return {"requests": self._requests, "pending": len(self._pending)}

    def _open(self, fd: int) -> None:
        if fd >= 0:
            self._sock = socket.socket(fileno=fd)
            self._sock.setblocking(False)

    def _forward(self, queue: Queue, chain: Chain) -> bool:
        """False while the server takes no more."""
        if len(self._pending) >= MAX_PENDING:
            return False
        head, body = split(chain.readable, IN_HEADER.size)
        header = b"".join(head)  # copied: what we judge and what the server reads is the same
        size = len(header) + total(body)
        if len(header) < IN_HEADER.size or size > MAX_MESSAGE or len(body) >= _MAX_VIEWS:
            raise QueueError(f"a file system request of {size} bytes")
        opcode, unique = IN_HEADER.unpack(header)[1:3]
        silent = opcode in SILENT
        if not silent and chain.writable_size < OUT_HEADER.size:
            raise QueueError("a file system request without room for an answer")
        if self._sock is not None:
            try:
                self._sock.sendmsg([header, *body], (), _FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                self._lose(str(error))
        self._requests += 1
        if silent:
            queue.push(chain, 0)
        elif self._sock is None:
            self._refuse(queue, chain, unique)
        else:
            self._pending.append((queue, chain, unique))
        return True

    def _refuse(self, queue: Queue, chain: Chain, unique: int) -> None:
        fill(chain.writable, OUT_HEADER.pack(OUT_HEADER.size, -EIO, unique))
        queue.push(chain, OUT_HEADER.size)

    def _ready(self, events: int) -> None:
        if events & ~select.EPOLLOUT:
            for _ in range(MAX_PENDING):
                if not self._answer(socket.MSG_DONTWAIT):
                    break
        held, self._held = self._held, set()
        for index in held:
            if self.active:
                self.transport.again(index)
        self._watch()

    def _answer(self, flags: int) -> bool:
        """Take one message of the server. False: there is none."""
        if self._sock is None:
            return False
        waiting = self._pending[0] if self._pending else None
        # An answer that nobody waits for any more, after a reset, comes all the same.
        stale = waiting is None or waiting[1].epoch != waiting[0].epoch
        views: list[Any] = (
            [bytearray(OUT_HEADER.size)] if stale or waiting is None else waiting[1].writable[:_MAX_VIEWS]
        )
        try:
            size = self._sock.recvmsg_into(views, 0, flags)[0]
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lose(str(error))
            return False
        if not size:
            self._lose("it has ended")
            return False
        if waiting is not None:
            queue, chain, unique = self._pending.popleft()
            if not stale and size < OUT_HEADER.size:
                self._refuse(queue, chain, unique)
            elif not stale:
                queue.push(chain, size)
            self.signal(queue)
        return True

    def _lose(self, why: str) -> None:
        """The server is gone: everything fails from now on."""
        sys.stderr.write(f"{self.name}: the folder's server is gone: {why}\n")
        pending = list(self._pending)
        self.close()
        for queue, chain, unique in pending:
            if chain.epoch == queue.epoch:
                self._refuse(queue, chain, unique)
                self.signal(queue)

    def _watch(self) -> None:
        if self._sock is None:
            return
        events = select.EPOLLIN | (select.EPOLLOUT if self._held and len(self._pending) < MAX_PENDING else 0)
        if self._watched < 0:
            self.loop.watch(self._sock.fileno(), self.guarded(self._ready), events)
        elif events != self._watched:
            self.loop.modify(self._sock.fileno(), events)
        self._watched = events
