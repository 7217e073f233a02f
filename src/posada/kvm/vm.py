"""`Vm`: the descriptor of one virtual machine: memory slots, interrupt chips, event descriptors, clock, dirty pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from types import TracebackType

from posada.kvm import numbers
from posada.kvm.call import call, call_long
from posada.kvm.numbers import Cap, Chip, Ioctl
from posada.kvm.structs import (
    ClearDirtyLog,
    ClockData,
    DirtyLog,
    EnableCap,
    IoEventFd,
    IrqChip,
    IrqFd,
    IrqLevel,
    MemoryRegion,
    Msi,
    PitConfig,
    PitState,
    Routing,
    RoutingEntry,
)
from posada.kvm.vcpu import Vcpu

PAGE = 4096


@dataclass(frozen=True)
class ChipRoute:
    """``gsi`` raises ``pin`` of an in-kernel chip."""

    gsi: int
    chip: Chip
    pin: int


@dataclass(frozen=True)
class MsiRoute:
    """``gsi`` sends a message-signalled interrupt: ``data`` written to ``address``."""

    gsi: int
    address: int
    data: int


class Vm:
    """One virtual machine. It belongs to the process that made it; every method raises KvmError."""

    def __init__(self, fd: int, mmap_size: int, state_msrs: tuple[int, ...]) -> None:
        self.fd = fd
        self.has_irqchip = False
        """PIC and IOAPIC are in the kernel."""
        self.has_lapic = False
        """Vcpus made from now on have a local APIC in the kernel."""
        self.has_pit = False
        self._mmap_size = mmap_size
        self._state_msrs = state_msrs
        self.slots: dict[int, MemoryRegion] = {}
        """Memory slots as they were set last, by number."""

    # what it is made of

    def check(self, cap: Cap) -> int:
        """As `System.check`, but for this vm: the answer may be narrower."""
        return call(self.fd, Ioctl.CHECK_EXTENSION, cap)

    def enable_cap(self, cap: Cap, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        request = EnableCap(cap=cap, flags=flags)
        for i, value in enumerate(args):
            request.args[i] = value
        call(self.fd, Ioctl.ENABLE_CAP, request, f"capability {cap.name}")

    def set_memory(self, slot: int, guest_phys: int, size: int, address: int, flags: int = 0) -> None:
        """Put ``size`` bytes of our memory at ``address`` into the guest at ``guest_phys``; all multiples of a page.

        Size 0 takes the slot away. ``flags`` are `MemFlag`. The caller keeps the memory mapped as long as the vm lives.
        Set slots before `create_irqchip`: on some hosts the other order costs milliseconds.
        """
        region = MemoryRegion(slot, flags, guest_phys, size, address)
        call(self.fd, Ioctl.SET_USER_MEMORY_REGION, region, f"slot {slot}, {size:#x} bytes at {guest_phys:#x}")
        if size:
            self.slots[slot] = region
        else:
            self.slots.pop(slot, None)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """A vcpu with this APIC id, in reset state. After the irqchip, so that it has a local APIC in the kernel."""
        fd = call(self.fd, Ioctl.CREATE_VCPU, vcpu_id)
        return Vcpu(fd, vcpu_id, self._mmap_size, self.xsave_size(), self._state_msrs, self.has_lapic)

    def xsave_size(self) -> int:
        """Bytes of a vcpu's XSAVE area (KVM_CAP_XSAVE2): at least 4096, more with AMX."""
        return max(self.check(Cap.XSAVE2), 4096)

    def set_tss_addr(self, address: int) -> None:
        """Three pages below 4 GiB that the guest does not use (Intel needs them for real mode)."""
        call_long(self.fd, Ioctl.SET_TSS_ADDR, address)

    def set_identity_map_addr(self, address: int) -> None:
        """One page, likewise. Before the first vcpu."""
        call(self.fd, Ioctl.SET_IDENTITY_MAP_ADDR, bytearray(address.to_bytes(8, "little")))

    def set_boot_cpu(self, vcpu_id: int) -> None:
        """Which vcpu starts; 0 if never called. Before the first vcpu."""
        call(self.fd, Ioctl.SET_BOOT_CPU_ID, vcpu_id)

    # interrupts

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and local APICs in the kernel. Before the first vcpu."""
        call(self.fd, Ioctl.CREATE_IRQCHIP)
        self.has_irqchip = self.has_lapic = True

    def create_split_irqchip(self, pins: int) -> None:
        """Local APICs in the kernel, IOAPIC and PIC with us; ``pins`` GSIs are kept for our IOAPIC."""
        self.enable_cap(Cap.SPLIT_IRQCHIP, pins)
        self.has_lapic = True

    def create_pit(self, speaker: bool = True) -> None:
        """The 8254 timer in the kernel; ``speaker`` answers port 0x61 too. After `create_irqchip`."""
        call(self.fd, Ioctl.CREATE_PIT2, PitConfig(flags=numbers.PIT_SPEAKER_DUMMY if speaker else 0))
        self.has_pit = True

    def irq_line(self, gsi: int, level: int) -> None:
        """Set an interrupt line to 0 or 1."""
        call(self.fd, Ioctl.IRQ_LINE, IrqLevel(gsi, level), f"gsi {gsi}")

    def signal_msi(self, address: int, data: int) -> int:
        """Send an MSI. Returns > 0 delivered, 0 blocked by the guest."""
        message = Msi(address & 0xFFFFFFFF, address >> 32, data)
        return call(self.fd, Ioctl.SIGNAL_MSI, message, f"to {address:#x}")

    def set_gsi_routing(self, routes: Sequence[ChipRoute | MsiRoute]) -> None:
        """Replace the whole table of what each GSI does."""
        entries = bytearray(Routing(nr=len(routes)))
        for route in routes:
            if isinstance(route, ChipRoute):
                entry = RoutingEntry(route.gsi, numbers.ROUTING_IRQCHIP)
                entry.u[0], entry.u[1] = route.chip, route.pin
            else:
                entry = RoutingEntry(route.gsi, numbers.ROUTING_MSI)
                entry.u[0], entry.u[1], entry.u[2] = route.address & 0xFFFFFFFF, route.address >> 32, route.data
            entries += bytes(entry)
        call(self.fd, Ioctl.SET_GSI_ROUTING, entries, f"{len(routes)} routes")

    def irqfd(self, eventfd: int, gsi: int, assign: bool = True, resample: int | None = None) -> None:
        """A write to ``eventfd`` pulses ``gsi``: an edge. With ``resample`` it is a level until the guest's EOI."""
        flags = (0 if assign else numbers.IRQFD_DEASSIGN) | (numbers.IRQFD_RESAMPLE if resample is not None else 0)
        call(self.fd, Ioctl.IRQFD, IrqFd(eventfd, gsi, flags, resample or 0), f"gsi {gsi}")

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        """A guest's write of ``size`` bytes (0: any) at ``address`` signals ``eventfd`` and makes no exit.

        With ``datamatch`` only a write of that value does.
        """
        flags = 0 if datamatch is None else numbers.IOEVENTFD_DATAMATCH
        flags |= (numbers.IOEVENTFD_PIO if pio else 0) | (0 if assign else numbers.IOEVENTFD_DEASSIGN)
        call(self.fd, Ioctl.IOEVENTFD, IoEventFd(datamatch or 0, address, size, eventfd, flags), f"at {address:#x}")

    # state

    def get_irqchip(self, chip: Chip) -> IrqChip:
        state = IrqChip(chip_id=chip)
        call(self.fd, Ioctl.GET_IRQCHIP, state, chip.name)
        return state

    def set_irqchip(self, state: IrqChip) -> None:
        call(self.fd, Ioctl.SET_IRQCHIP, state, f"chip {state.chip_id}")

    def get_pit(self) -> PitState:
        state = PitState()
        call(self.fd, Ioctl.GET_PIT2, state)
        return state

    def set_pit(self, state: PitState) -> None:
        call(self.fd, Ioctl.SET_PIT2, state)

    def get_clock(self) -> ClockData:
        """kvm-clock: nanoseconds as the guest sees them."""
        state = ClockData()
        call(self.fd, Ioctl.GET_CLOCK, state)
        return state

    def set_clock(self, state: ClockData) -> None:
        """``flags`` 0 sets the clock to ``clock``; CLOCK_REALTIME adds the time since ``realtime``."""
        call(self.fd, Ioctl.SET_CLOCK, state)

    # dirty pages

    def dirty_log(self, slot: int) -> bytearray:
        """One bit per page written since the last call (bit 0 of byte 0 is the slot's first page), and forget them.

        The slot must have `MemFlag.LOG_DIRTY_PAGES`. With MANUAL_DIRTY_LOG_PROTECT2 they stay until `clear_dirty_log`.
        """
        size = self.slots[slot].memory_size if slot in self.slots else 0
        bitmap = bytearray((size // PAGE + 63) // 64 * 8)
        if bitmap:
            # SAFETY: the bitmap has a bit for each page of the slot, in whole 64-bit words, and outlives the call.
            request = DirtyLog(slot, 0, addressof(c_char.from_buffer(bitmap)))
            call(self.fd, Ioctl.GET_DIRTY_LOG, request, f"slot {slot}")
        return bitmap

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytearray) -> None:
        """Forget the pages whose bits are set; ``first_page`` and ``pages`` are multiples of 64 (or reach the end)."""
        if len(bitmap) < (pages + 63) // 64 * 8:
            raise ValueError(f"the bitmap is too short for {pages} pages")
        # SAFETY: checked above: the kernel reads a bit for each page, in whole 64-bit words.
        request = ClearDirtyLog(slot, pages, first_page, addressof(c_char.from_buffer(bitmap)))
        call(self.fd, Ioctl.CLEAR_DIRTY_LOG, request, f"slot {slot}")

    def enable_dirty_ring(self, entries: int) -> None:
        """Report written pages through a ring per vcpu (`posada.kvm.dirty`); a power of two. Before the first vcpu."""
        self.enable_cap(Cap.DIRTY_LOG_RING, entries * 16)

    def reset_dirty_rings(self) -> int:
        """Take back what the rings' readers have collected. Returns how many entries."""
        return call(self.fd, Ioctl.RESET_DIRTY_RINGS)

    def after_fork(self, fd: int) -> None:
        """In a forked child: become ``fd``, an empty vm of its own, which the caller fills as this one was."""
        self.close()
        self.fd = fd

    def close(self) -> None:
        """Idempotent. The kernel keeps the vm until its vcpus are closed too."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
