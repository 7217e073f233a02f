"""The socket device itself: its connections, and what the guest sends on them.

Requests from guest to host are refused: nothing in the jail could open the socket they would go to. One is of use all the
same: a guest that asks for the *host's* port of a channel's number says that its listener is there now (a *knock*), and
clients that wait for it are connected at once instead of at the next try.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from functools import partial
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Any

from posada.vmm import state
from posada.vmm.loop import Timer
from posada.vmm.virtio.device import Device
from posada.vmm.virtio.queue import Chain, QueueError
from posada.vmm.virtio.views import split, total
from posada.vmm.virtio.vsock.doors import Door, FrontDoor
from posada.vmm.virtio.vsock.events import ResetEvent
from posada.vmm.virtio.vsock.packet import HOST_CID, MAX_PAYLOAD, STREAM, Op, Packet, Shut, parse
from posada.vmm.virtio.vsock.sender import Sender
from posada.vmm.virtio.vsock.stream import Due, State, Stream

MAX_STREAMS = 64
"""Connections at a time; those whose last bytes are still being written count: so 16 MiB of backlog at the very most."""
KEPT_FOR_CHANNELS = 16
"""Of these: places that clients of the front door cannot take."""
MAX_CLOSING = 64
"""Connections that the guest has not confirmed the end of. The oldest is reset for the next."""
RETRY_SECONDS = 0.25
FIRST_PORT, LAST_PORT = 1 << 30, (1 << 31) - 1
"""Ports of the host's side of streams: in turn, so that none comes again soon."""

RX, TX, EVENT = 0, 1, 2
F_STREAM = 1


class Vsock(Device):
    """``cid``: the guest's address, 3 or more. ``listeners``: (guest port, listening unix socket) per channel.

    ``front``: a listening unix socket for clients that name their port, or -1. The device owns these descriptors.
    """

    kind = 19
    name = "vsock"
    queue_sizes = (256, 256, 16)
    features = F_STREAM

    def __init__(self, cid: int, listeners: Iterable[tuple[int, int]] = (), front: int = -1) -> None:
        self._cid = cid
        self._streams: dict[tuple[int, int], Stream] = {}
        self._closing: dict[Stream, None] = {}
        self._draining: set[Stream] = set()
        self._sender = Sender(self, RX, cid=lambda: self._cid, changed=self._watch, ended=self._shut)
        self._reset_event = ResetEvent(self, EVENT, self._set_open)
        self._next_port = FIRST_PORT
        self._retry: Timer | None = None
        self._opened = self._refused = self._resets = self._malformed = self._received = 0
        self._set_doors(listeners, front)

    # Hooks.

    def config(self) -> bytes:
        return self._cid.to_bytes(8, "little")

    def activate(self) -> None:
        self._reset_event.work()
        self._set_open()

    def notify(self, index: int) -> None:
        if index == TX:
            self.serve(self.queues[TX], self._take)
        elif index == EVENT:
            self._reset_event.work()
        self._sender.resume()

    def reset(self) -> None:
        self._drop_all()
        self._reset_event.clear()
        self._set_open()

    def quiesce(self) -> None:
        self._reset_event.quiesce()

    def save(self) -> dict[str, Any]:
        """Connections are not in it: they end with the machine that made them. Nor is the CID: it is the host's to give."""
        return {"next_port": self._next_port}

    def load(self, document: dict[str, Any]) -> None:
        self._next_port = state.integer(document, "next_port", FIRST_PORT, LAST_PORT)
        self._reset_event.want()

    def reopen(self, given: Mapping[str, Any]) -> None:
        """``given``: "cid" (else the old one stays), "listeners", "connect", as in `posada.vmm.config.VsockConfig`."""
        self._drop_all()  # closes, and does not shut down: the parent goes on with the same sockets
        self._close_doors()
        self._cid = state.integer(given, "cid", 3, 0xFFFF_FFFE, self._cid)
        self._set_doors(given.get("listeners", ()), given.get("connect", -1))
        # Before the guest hears of the reset: it reads its new address then, perhaps without an exit to us.
        self.config_changed()
        self._reset_event.want()
        if self.active:
            self.activate()

    def close(self) -> None:
        self._drop_all()
        self._close_doors()

    def metrics(self) -> dict[str, int]:
        return {
            "streams": len(self._streams) + len(self._draining),
            "opened": self._opened,
            "refused": self._refused,
            "resets": self._resets,
            "malformed": self._malformed,
            "from_guest_bytes": self._received,
            "to_guest_bytes": self._sender.moved,
        }

    # Doors.

    def _set_doors(self, listeners: Iterable[tuple[int, int]], front: int) -> None:
        self._channels = {
            port: Door(self, fd, partial(self._connect, port=port, patient=True), partial(self._full, 0))
            for port, fd in listeners
        }
        full = partial(self._full, KEPT_FOR_CHANNELS)
        self._front = FrontDoor(self, front, self._connect, full) if front >= 0 else None

    def _doors(self) -> list[Door]:
        return [*self._channels.values(), *([self._front] if self._front else [])]

    def _close_doors(self) -> None:
        for door in self._doors():
            door.close()
        self._channels, self._front = {}, None

    def _set_open(self) -> None:
        for door in self._doors():
            door.set_open(self.active)

    def _full(self, kept: int) -> bool:
        used = len(self._streams) - len(self._closing) + len(self._draining)
        return self._reset_event.due or used >= MAX_STREAMS - kept

    def _connect(self, client: socket.socket, port: int, patient: bool = False) -> None:
        """A client wants a stream to ``port`` of the guest."""
        if self._full(0):
            client.close()
            return
        while (self._take_port(), port) in self._streams:
            pass
        host_port = self._next_port
        banner = b"" if patient else b"OK %d\n" % host_port
        stream = Stream(client, host_port, port, patient=patient, banner=banner)
        self._streams[stream.key] = stream
        self._sender.owe(stream, Due.REQUEST)
        self._watch(stream)
        self._sender.resume()

    def _take_port(self) -> int:
        self._next_port = self._next_port + 1 if self._next_port < LAST_PORT else FIRST_PORT
        return self._next_port

    # What the guest sends.

    def _take(self, chain: Chain) -> int | None:
        """One packet. None while too many answers wait for buffers."""
        if self._sender.must_wait():
            return None
        parsed = parse(chain.readable)
        if parsed is None:
            raise QueueError("a vsock packet without a whole header")
        packet, payload = parsed
        stream = self._streams.get((packet.dst_port, packet.src_port))
        if packet.src_cid != self._cid or packet.dst_cid != HOST_CID or packet.type != STREAM or stream is None:
            self._refused += packet.op != Op.RST
            self._sender.reject(packet)
            if packet.op == Op.REQUEST and packet.dst_port in self._channels:
                self._retry_now()
        elif packet.op == Op.RST:
            self._guest_reset(stream)
        elif stream.take_credit(packet) and self._dispatch(stream, packet, payload):
            if stream.watched != EPOLLIN or stream.backlog:
                self._watch(stream)
        else:
            self._malformed += 1
            self._sender.reject(packet)
            self._detach(stream)
        return 0

    def _dispatch(self, stream: Stream, packet: Packet, payload: list[memoryview]) -> bool:
        """False if the packet may not come now."""
        if packet.op == Op.RW and stream.state is State.OPEN:
            return self._receive(stream, packet, payload)
        if packet.op == Op.RESPONSE and stream.state is State.CONNECTING and not stream.due & Due.REQUEST:
            self._opened += 1
            stream.state = State.OPEN
            stream.greet()
            return True
        if stream.state not in (State.OPEN, State.CLOSING):
            return False
        if packet.op == Op.RW:
            return self._receive(stream, packet, payload)
        if packet.op == Op.SHUTDOWN:
            stream.guest_shut |= packet.flags & Shut.BOTH
            if stream.guest_shut == Shut.BOTH:
                self._sender.reject(packet)  # confirms the end (section 5.10.6.5)
                self._detach(stream)
            else:
                stream.half_close()
        elif packet.op == Op.CREDIT_REQUEST:
            self._sender.owe(stream, Due.CREDIT_UPDATE)
        return packet.op in (Op.SHUTDOWN, Op.CREDIT_REQUEST, Op.CREDIT_UPDATE)

    def _receive(self, stream: Stream, packet: Packet, payload: list[memoryview]) -> bool:
        """Data. False if the guest broke a rule."""
        views = split(payload, packet.length)[0]
        if packet.length > MAX_PAYLOAD or stream.guest_shut & Shut.SEND or total(views) < packet.length:
            return False
        if not stream.accept(views, packet.length):
            return False
        self._received += packet.length
        self._after_write(stream)
        return True

    def _guest_reset(self, stream: Stream) -> None:
        self._resets += 1
        if stream.state is not State.CONNECTING or not stream.patient:
            self._detach(stream)
            return
        stream.state = State.WAITING
        self._sender.forget(stream)
        if self._retry is None:
            self._retry = self.loop.timer(RETRY_SECONDS, self.guarded(self._retry_now))

    def _retry_now(self) -> None:
        """Ask again for the clients that found nobody listening."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for stream in self._streams.values():
            if stream.state is State.WAITING:
                stream.state = State.CONNECTING
                self._sender.owe(stream, Due.REQUEST)
        self._sender.resume()

    # The clients' sockets.

    def _watch(self, stream: Stream) -> None:
        """Wait for what can be worked on, and for nothing else: the loop must not spin."""
        wanted = -1
        if stream.backlog or stream.readable:
            wanted = (EPOLLOUT if stream.backlog else 0) | (EPOLLIN if stream.readable else 0)
        elif stream.state in (State.CONNECTING, State.WAITING) or stream.silent:
            wanted = 0  # the end of the client is heard of even so
        if wanted == stream.watched:
            return
        if wanted < 0:
            self.loop.unwatch(stream.sock.fileno())
        elif stream.watched < 0:
            self.loop.watch(stream.sock.fileno(), self.guarded(partial(self._ready, stream)), wanted)
        else:
            self.loop.modify(stream.sock.fileno(), wanted)
        stream.watched = wanted

    def _ready(self, stream: Stream, events: int) -> None:
        if not self.active and stream.state is not State.DRAINING:
            self._drop_all()  # the device has failed
            return
        ended = events & (EPOLLHUP | EPOLLERR)
        if stream.backlog:
            stream.flush()
            self._after_write(stream)
        if stream.readable and (ended or events & EPOLLIN):
            self._sender.pump(stream)
        elif ended and stream.state in (State.CONNECTING, State.WAITING):
            if stream.state is State.CONNECTING and not stream.due & Due.REQUEST:
                self._sender.abort(stream)
            self._forget(stream)
        elif ended and stream.silent:
            self._shut(stream, Shut.BOTH)
        elif stream.watched >= 0:
            self._watch(stream)
        self._sender.resume()

    def _after_write(self, stream: Stream) -> None:
        """Something went to the client, or it was found gone."""
        if stream.state is State.DRAINING:
            if not stream.backlog:
                self._forget(stream)
            return
        if stream.deaf and stream.state is State.OPEN and not stream.shut & Shut.RECEIVE:
            self._shut(stream, Shut.RECEIVE)
        if stream.update_due:
            self._sender.owe(stream, Due.CREDIT_UPDATE)
        stream.half_close()

    def _shut(self, stream: Stream, what: int) -> None:
        """The client does not receive, or not send, any more: tell the guest."""
        stream.shut |= what
        self._sender.owe(stream, Due.SHUTDOWN)
        if stream.shut != Shut.BOTH:
            return
        # Until its RST the guest may still read what it has, and says so in credits: to RST those would lose it the data.
        if len(self._closing) >= MAX_CLOSING:
            oldest = next(iter(self._closing))
            self._sender.abort(oldest)
            self._forget(oldest)
        stream.state = State.CLOSING
        stream.deaf = True
        stream.drop_backlog()
        self._closing[stream] = None
        self._close_socket(stream)
        self._set_open()

    # Ends.

    def _detach(self, stream: Stream) -> None:
        """The guest is done with it; what waits for the client is still written."""
        if not stream.backlog:
            self._forget(stream)
            return
        del self._streams[stream.key]
        self._sender.forget(stream)
        stream.state = State.DRAINING
        self._draining.add(stream)
        self._watch(stream)

    def _forget(self, stream: Stream) -> None:
        if self._streams.get(stream.key) is stream:
            del self._streams[stream.key]
        self._closing.pop(stream, None)
        self._draining.discard(stream)
        self._sender.forget(stream)
        stream.state = State.GONE
        self._close_socket(stream)
        self._set_open()

    def _close_socket(self, stream: Stream) -> None:
        if stream.watched >= 0:
            self.loop.unwatch(stream.sock.fileno())
            stream.watched = -1
        stream.sock.close()

    def _drop_all(self) -> None:
        """End every connection, without a word to the guest."""
        self._sender.clear()
        for stream in [*self._streams.values(), *self._draining]:
            stream.state = State.GONE
            self._close_socket(stream)
        self._streams.clear()
        self._closing.clear()
        self._draining.clear()
        if self._front is not None:
            self._front.dismiss()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
