"""ACPI: encodings from the specification's own examples, checksums, pointers, and the DSDT byte by byte.

The golden file was looked at through ``iasl -d``; where that is installed, the tables are given to it again.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from posada.vmm import layout
from posada.vmm.acpi import aml, dsdt, tables

GOLDEN = Path(__file__).parent.parent / "golden" / "dsdt.hex"
TRANSPORTS = [dsdt.Transport(layout.VIRTIO_MMIO, 5), dsdt.Transport(layout.VIRTIO_MMIO + 0x1000, 23)]


@pytest.mark.parametrize(
    ("size", "start"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (1 << 20, "c4000001")],
)
def test_package_length(size: int, start: str) -> None:
    encoded = aml.package_length(bytes(size))
    assert encoded.hex().startswith(start)
    assert len(encoded) == size + len(start) // 2


def test_package_length_is_bounded() -> None:
    with pytest.raises(ValueError):
        aml.package_length(bytes(1 << 28))


@pytest.mark.parametrize(
    ("term", "encoded"),
    [
        (aml.path("_HID"), "5f484944"),
        (aml.path("RTC"), "5254435f"),
        (aml.path("\\"), "5c00"),
        (aml.path("\\_SB.GED"), "5c2e5f53425f4745445f"),
        (aml.path("\\A.B.C"), "5c2f03415f5f5f425f5f5f435f5f5f"),
        (aml.integer(0), "00"),
        (aml.integer(1), "01"),
        (aml.integer(0xFF), "0aff"),
        (aml.integer(0x100), "0b0001"),
        (aml.integer(0xD0000000), "0c000000d0"),
        (aml.integer(1 << 32), "0e0000000001000000"),
        (aml.eisa_id("PNP0501"), "0c41d00501"),
        (aml.eisa_id("PNP0C0C"), "0c41d00c0c"),
        (aml.string("ab"), "0d616200"),
        (aml.buffer(b"\1\2"), "11050a020102"),
        (aml.package([aml.integer(1), aml.integer(0)]), "1204020100"),
        (aml.resources(), "11050a027900"),
        (aml.io_ports(0x3F8, 8), "4701f803f8030108"),
        (aml.memory(0xD0000000, 0x1000), "86090001000000d000100000"),
        (aml.interrupt(5, shared=True), "8906000b0105000000"),
        (aml.interrupt(9), "890600030109000000"),
    ],
)
def test_terms(term: bytes, encoded: str) -> None:
    assert term.hex() == encoded


@pytest.mark.parametrize("name", ["TOOLONG", "\\_SB.TOOLONG"])
def test_names_of_more_than_four_letters_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        aml.path(name)


def find_tables(memory: bytes) -> dict[bytes, bytes]:
    """Every table that the RSDP leads to, checksums checked."""

    def at(address: int) -> bytes:
        offset = address - layout.ACPI_TABLES
        (size,) = struct.unpack_from("<I", memory, offset + 4)
        table = memory[offset : offset + size]
        assert len(table) == size and sum(table) & 0xFF == 0, table[:4]
        return table

    assert memory[:8] == b"RSD PTR " and sum(memory[:20]) & 0xFF == 0 and sum(memory[:36]) & 0xFF == 0
    xsdt = at(struct.unpack_from("<Q", memory, 24)[0])
    found = {table[:4]: table for table in map(at, (n for (n,) in struct.iter_unpack("<Q", xsdt[36:])))}
    found[b"DSDT"] = at(struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


def test_tables_are_linked_and_summed() -> None:
    found = find_tables(tables.build(3, TRANSPORTS))
    assert found.keys() == {b"FACP", b"APIC", b"DSDT"}
    (flags,) = struct.unpack_from("<I", found[b"FACP"], 112)
    assert flags >> 20 & 1 and flags >> 10 & 1, "hardware-reduced, with a reset register"
    assert found[b"FACP"][116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, layout.EVENT_PORT + 3)
    madt = found[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (layout.LAPIC, 0)
    assert [madt[44 + 8 * n : 52 + 8 * n] for n in range(3)] == [bytes([0, 8, n, n, 1, 0, 0, 0]) for n in range(3)]


def test_the_largest_machine_fits() -> None:
    many = [dsdt.Transport(layout.VIRTIO_MMIO + 0x1000 * n, 5) for n in range(48)]
    assert len(tables.build(64, many)) <= layout.ACPI_TABLES_SIZE


def test_dsdt_is_the_golden_one() -> None:
    body = dsdt.body(2, TRANSPORTS)
    assert [body[at : at + 32].hex() for at in range(0, len(body), 32)] == GOLDEN.read_text().splitlines(), (
        "if this is meant, look at the new table with iasl -d and write it to the golden file"
    )


def test_generation_id_is_a_little_endian_guid() -> None:
    text = "00112233-4455-6677-8899-aabbccddeeff"
    assert tables.generation_bytes(text).hex() == "33221100554477668899aabbccddeeff"
    assert tables.generation_bytes("") == bytes(16)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (package acpica-tools) is not installed")
def test_iasl_reads_it_without_a_complaint(tmp_path: Path) -> None:
    for signature, table in find_tables(tables.build(2, TRANSPORTS)).items():
        path = tmp_path / f"{signature.decode()}.dat"
        path.write_bytes(table)
        done = subprocess.run(["iasl", "-d", str(path)], capture_output=True, text=True, check=True)
        assert "rror" not in done.stderr + done.stdout
