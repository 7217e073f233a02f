"""Network device (virtio 1.2, section 5.1), one pair of queues, in front of a `posada.vmm.net.Backend`.

Nothing is dropped on the way out: what the network does not take stays queued, and the guest waits. On the way in, what
the guest has no buffers for stays where it is, and the network's end drops what becomes too much, as networks do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from struct import Struct
from typing import Any

from posada.vmm.loop import Timer
from posada.vmm.net import Backend, open_backend
from posada.vmm.net.backend import MAX_FRAME, MIN_FRAME, Feature, Gone, Outcome
from posada.vmm.net.bucket import Bucket
from posada.vmm.net.buffers import HEADER_SIZE, RxBuffers
from posada.vmm.state import StateError
from posada.vmm.virtio.device import SETTLE, Device
from posada.vmm.virtio.queue import Chain, Queue, QueueError

RX, TX = 0, 1
TURN = 128
"""Packets in one direction before the loop looks after others."""
BATCH, BATCH_BYTES = 32, 256 << 10
"""Packets handed to the network at once."""
_CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
_LINK_UP = 1
_DEFAULT_MTU = 1500
_PROMISED = Feature.CSUM | Feature.HOST_TSO4 | Feature.HOST_TSO6 | Feature.HOST_ECN
"""What a guest that took it relies on at every packet it sends."""
_FRAMING = HEADER_SIZE + 18  # Ethernet's header with a VLAN tag


class Net(Device):
    """``mac``: six bytes as text, with colons. ``mtu``: what the guest is told (0: nothing, so 1500); the backend must
    be able to carry it. ``rate``: bytes per second in each direction, 0 for no bound. None for ``backend``: link down.
    """

    kind = 1
    name = "net"
    queue_sizes = (256, 256)

    def __init__(self, mac: str, backend: Backend | None, *, mtu: int = 0, rate: int = 0) -> None:
        self._mac = parse_mac(mac)
        self._backend = backend
        self._mtu = mtu
        self._up = backend is not None
        offer = Feature.MAC | Feature.STATUS | Feature.MRG_RXBUF
        if backend is not None:
            offer |= backend.features
        if mtu:
            offer |= Feature.MTU
        self.features = int(offer)
        self._buffers: RxBuffers | None = None
        self._out, self._in = Bucket(rate), Bucket(rate)
        self._timers: dict[int, Timer] = {}
        self._watched = -1
        self._full = False
        """The guest has no buffers."""
        self._blinking = False
        """The link is down for a moment, until the guest has seen that."""
        self._sent = self._sent_bytes = self._dropped = 0
        self._before = (0, 0, 0)

    # Hooks.

    def config(self) -> bytes:
        return _CONFIG.pack(self._mac, _LINK_UP if self._up else 0, 1, self._mtu)

    def config_noticed(self) -> None:
        if self._blinking:
            self._blinking = False
            self.loop.timer(SETTLE, self.guarded(self._link_up))

    def activate(self) -> None:
        acked = Feature(self.acked & self.features)
        segments = acked & (Feature.GUEST_TSO4 | Feature.GUEST_TSO6)
        self._buffers = RxBuffers(
            self.queues[RX],
            mergeable=bool(acked & Feature.MRG_RXBUF),
            longest=HEADER_SIZE + MAX_FRAME if segments else _FRAMING + (self._mtu or _DEFAULT_MTU),
            valid=bool(acked & Feature.GUEST_CSUM),
        )
        self._full = False
        if self._backend is not None:
            self._backend.settle(acked)
        self._watch()

    def notify(self, index: int) -> None:
        if index == TX:
            self._transmit()
        else:
            self._full = False
            self._receive()

    def reset(self) -> None:
        if self._blinking:  # nobody will notice any more
            self._blinking, self._up = False, True
        self._before = self._received_so_far()
        self._buffers = None
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._unwatch()

    def quiesce(self) -> None:
        if self._buffers is not None:
            self._buffers.give_back()

    def save(self) -> dict[str, Any]:
        """The address and the network are the host's to give. What the driver was offered is in the transport's state."""
        return {}

    def reopen(self, given: Mapping[str, Any]) -> None:
        """``given``: "mac", "kind" and "fd" as in `posada.vmm.config.NicConfig`. Raises StateError, OSError.

        The new address is in the configuration space at once; a running driver keeps its own until the agent sets the
        same one (docs/AGENT-PROTOCOL.md, `identity.reset`). "renew" (default: for a tap, which others are on too): the
        link goes down and, once the guest has seen that, up again, so that whoever watches it asks for a lease anew.
        """
        self._unplug()
        self._mac = parse_mac(given["mac"]) if "mac" in given else self._mac
        kind = given.get("kind", "none")
        kind_name = getattr(kind, "value", kind)
        backend = open_backend(kind_name, given.get("fd", -1))
        if backend is None:
            return
        acked = Feature(self.acked & self.features)
        if self.active and acked & _PROMISED & ~backend.features:
            backend.close()
            raise StateError(f"{self.name}: the guest sends what this network cannot carry (another kind than before)")
        self._backend = backend
        self._full = False
        if self.active:
            backend.settle(acked & backend.features)
            self._watch()
        self._blinking = bool(self.active and acked & Feature.STATUS and given.get("renew", kind_name == "tap"))
        self._up = not self._blinking
        if self.active:
            self.config_changed()

    def close(self) -> None:
        """Unplug: the link is down from now on."""
        self._up = self._blinking = False
        if self._backend is not None:
            self._unwatch()
            self._backend.close()
            self._backend = None

    def metrics(self) -> dict[str, int]:
        packets, size, dropped = self._received_so_far()
        return {
            "sent_packets": self._sent,
            "sent_bytes": self._sent_bytes,
            "received_packets": packets,
            "received_bytes": size,
            "dropped_packets": self._dropped + dropped,
        }

    # From the guest.

    def _transmit(self) -> None:
        queue = self.queues[TX]
        queue.disable_notify()
        budget = TURN
        worked = False
        while budget > 0:
            if self._wait(TX, self._out):
                break
            chains, packets, sizes = self._collect(queue)
            if not chains:
                if worked:  # while packets come, look again after a turn of the loop: kicks cost the guest an exit each
                    self.transport.again(TX)
                    break
                if queue.enable_notify():
                    continue
                break
            worked = True
            taken = self._send(packets, sizes)
            for chain in reversed(chains[taken:]):
                queue.put_back(chain)
            queue.push_together([(chain, 0) for chain in chains[:taken]])
            size = sum(sizes[:taken])
            self._sent += taken - sizes[:taken].count(0)
            self._sent_bytes += size
            self._out.spend(size)
            budget -= taken
            if taken < len(chains):
                break  # until the network takes more; kicks are not needed meanwhile
        else:
            self.transport.again(TX)
        self._watch()
        self.signal(queue)

    def _collect(self, queue: Queue) -> tuple[list[Chain], list[list[memoryview]], list[int]]:
        """What the guest has queued, a batch of it, and the frames' sizes; 0 for what is none."""
        chains: list[Chain] = []
        packets: list[list[memoryview]] = []
        sizes: list[int] = []
        left = BATCH_BYTES
        while len(chains) < BATCH and left > 0 and (chain := queue.pop()) is not None:
            if chain.writable:
                raise QueueError("a packet that is to be written to")
            size = chain.readable_size - HEADER_SIZE
            if not MIN_FRAME <= size <= MAX_FRAME:
                self._dropped += 1
                size = 0
            chains.append(chain)
            packets.append(chain.readable)
            sizes.append(size)
            left -= size
        return chains, packets, sizes

    def _send(self, packets: list[list[memoryview]], sizes: list[int]) -> int:
        """How many the network took; all, where there is none."""
        try:
            if self._backend is not None:
                taken = self._backend.send(packets, sizes)
                if self._backend.owing:
                    self.transport.again(RX)
                return taken
        except Gone as error:
            self._hang_up(error)
        self._dropped += len(packets) - sizes.count(0)
        sizes[:] = bytes(len(packets))
        return len(packets)

    # To the guest.

    def _receive(self) -> None:
        if self._backend is None or self._buffers is None or self._wait(RX, self._in):
            self._watch()
            return
        before = self._buffers.bytes
        try:
            outcome = self._backend.receive(self._buffers, TURN)
        except Gone as error:
            self._hang_up(error)
            outcome = Outcome.EMPTY
        self._buffers.publish()
        self._in.spend(self._buffers.bytes - before)
        self._full = outcome is Outcome.FULL
        if outcome is Outcome.MORE:
            self.transport.again(RX)  # some may be in the backend's own buffer: the descriptor would not tell
        self._watch()
        self.signal(self.queues[RX])

    def _received_so_far(self) -> tuple[int, int, int]:
        packets, size, dropped = self._before
        if self._buffers is not None:
            packets += self._buffers.packets
            size += self._buffers.bytes
            dropped += self._buffers.dropped
        return packets, size, dropped

    # The network's end.

    def _ready(self, events: int) -> None:
        if not self.active or self._backend is None:
            self._unwatch()
            return
        if events & EPOLLOUT:
            try:
                self._backend.flush()
            except Gone as error:
                self._hang_up(error)
                return
            if not self._backend.waiting:
                self._transmit()
        if events & EPOLLIN and not self._full:
            self._receive()
        elif events & (EPOLLHUP | EPOLLERR):
            self._hang_up(Gone("the network's end of a card has hung up"))
        else:
            self._watch()

    def _wait(self, index: int, bucket: Bucket) -> bool:
        """True if this direction has had its share; then it goes on by itself."""
        if index in self._timers:
            return True
        delay = bucket.delay()
        if not delay:
            return False

        def again() -> None:
            del self._timers[index]
            if self.active:
                self.notify(index)

        self._timers[index] = self.loop.timer(delay, self.guarded(again))
        return True

    def _watch(self) -> None:
        """Wait for what can be worked on, and for nothing else: the loop must not spin."""
        if self._backend is None or not self.active:
            return
        events = (EPOLLIN if not self._full and RX not in self._timers else 0) | (
            EPOLLOUT if self._backend.waiting else 0
        )
        if self._watched < 0:
            self.loop.watch(self._backend.fd, self.guarded(self._ready), events)
        elif self._watched != events:
            self.loop.modify(self._backend.fd, events)
        self._watched = events

    def _unwatch(self) -> None:
        if self._watched >= 0 and self._backend is not None:
            self.loop.unwatch(self._backend.fd)
        self._watched = -1

    def _link_up(self) -> None:
        if self._backend is not None and not self._up:
            self._up = True
            self.config_changed()

    def _hang_up(self, error: Gone) -> None:
        sys.stderr.write(f"{self.name}: {error}; its link is down\n")
        self._unplug()
        self.config_changed()

    def _unplug(self) -> None:
        self.close()
        self._full = False
        if self.active:
            self.transport.again(TX)  # what waited for this network is dropped, or goes to the next


def parse_mac(text: str) -> bytes:
    """Raises StateError for what is not a unicast MAC address."""
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1:
        raise StateError(f"{text!r} is not the MAC address of a card")
    return mac
