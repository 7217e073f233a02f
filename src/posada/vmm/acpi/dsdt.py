r"""The DSDT: everything a guest cannot discover by itself. Pure; golden bytes in tests, checked with ``iasl -d``.

::

    \_S5                     sleep type 5 is power off
    \_SB.C000 …              processors (ACPI0007)
    \_SB.COM1, \_SB.RTC      PNP0501, PNP0B00
    \_SB.GED                 ACPI0013: on an edge of EVENT_GSI, _EVT reads the event register and notifies
    \_SB.PWRB                PNP0C0C, power button
    \_SB.VGEN                VM generation ID; its value lies in RAM
    \_SB.V000 …              virtio-mmio transports (LNRO0005)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from posada.vmm import layout
from posada.vmm.acpi import aml
from posada.vmm.legacy.power import SLEEP_TYPE_S5, Event


class Transport(NamedTuple):
    """A virtio-mmio device's registers and interrupt."""

    address: int
    gsi: int


def body(cpus: int, transports: Sequence[Transport]) -> bytes:
    """The definition block's terms, without the table's header."""
    return aml.name("\\_S5", aml.package(map(aml.integer, (SLEEP_TYPE_S5, 0, 0, 0)))) + aml.scope(
        "\\_SB",
        *(_processor(index) for index in range(cpus)),
        _com1(),
        _rtc(),
        _power_button(),
        _generation(),
        _events(),
        *(_virtio(index, transport) for index, transport in enumerate(transports)),
    )


def _processor(index: int) -> bytes:
    return aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))


def _com1() -> bytes:
    crs = aml.resources(aml.io_ports(layout.COM1_PORT, 8), aml.interrupt(layout.COM1_GSI))
    return aml.device(
        "COM1", aml.name("_HID", aml.eisa_id("PNP0501")), aml.name("_UID", aml.integer(1)), aml.name("_CRS", crs)
    )


def _rtc() -> bytes:
    crs = aml.resources(aml.io_ports(layout.RTC_PORT, 2))
    return aml.device("RTC", aml.name("_HID", aml.eisa_id("PNP0B00")), aml.name("_CRS", crs))


def _power_button() -> bytes:
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0)))


def _generation() -> bytes:
    """Microsoft, *Virtual Machine Generation ID*, 2012: ADDR gives the value's address as two dwords."""
    address = aml.package((aml.integer(layout.VMGENID & 0xFFFF_FFFF), aml.integer(layout.VMGENID >> 32)))
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("QEMUVGID")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", address),
    )


def _events() -> bytes:
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.string("GED")),
        aml.name("_CRS", aml.resources(aml.interrupt(layout.EVENT_GSI))),
        aml.io_region("EREG", layout.EVENT_PORT, 1),
        aml.byte_field("EREG", "EVNT"),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.path("EVNT"), aml.LOCAL0),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(Event.POWER_BUTTON)), aml.notify("\\_SB.PWRB", 0x80)),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(Event.GENERATION)), aml.notify("\\_SB.VGEN", 0x80)),
            serialized=True,
        ),
    )


def _virtio(index: int, transport: Transport) -> bytes:
    crs = aml.resources(
        aml.memory(transport.address, layout.VIRTIO_MMIO_SIZE), aml.interrupt(transport.gsi, shared=True)
    )
    return aml.device(
        f"V{index:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CRS", crs),
    )
