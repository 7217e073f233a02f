"""A Debian kernel under the GDB stub, and what is told of one that KVM gives up on."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian_kit import SUITES, booted, mapped_device, sh, symbols, wait_for

import posada
from posada.kvm import System
from posada.vmm.gdb.layout import REGISTERS

sys.path.append(str(Path(__file__).parents[2] / "unit"))
from gdb_client import Client
from kvm_kit import has_hardware_breakpoints

NUMBERS = {register.name: number for number, register in enumerate(REGISTERS)}
NOP = "90"
FXSAVE = "0fae00"
"""fxsave [rax]: to a device's registers, that is nothing KVM's emulator knows."""
SPIN = "while :; do :; done"
ASK = "while :; do uname > /dev/null; done"


@pytest.fixture(scope="module", params=SUITES)
def vm(request: pytest.FixtureRequest) -> Iterator[posada.VM]:
    with booted(request.param, nics=[]) as machine:
        yield machine


@contextlib.contextmanager
def attached(vm: posada.VM) -> Iterator[Client]:
    """The machine stands still; it runs on at the end."""
    with socket.create_connection(("127.0.0.1", vm.debug())) as connection:
        client = Client(connection)
        assert client.ask("?") == "T05thread:1;"
        yield client
        assert client.ask("D") == "OK"


def set_register(client: Client, name: str, value: int) -> None:
    assert client.ask(f"P{NUMBERS[name]:x}={value.to_bytes(8, 'little').hex()}") == "OK"


def test_the_kernels_memory_is_read_through_its_own_page_tables(vm: posada.VM) -> None:
    (banner,) = symbols(vm, "linux_banner")
    version = sh(vm, "cat /proc/version")
    with attached(vm) as client:
        assert bytes.fromhex(client.ask(f"m{banner:x},{len(version):x}")) == version.encode()
        assert client.ask("m10,8") == "E0e"  # nothing is mapped there


def test_steps_are_single_ones(vm: posada.VM) -> None:
    """Three no-operations where it happens to be: it runs them one by one, though interrupts wait."""
    with vm.shell(SPIN, stream=True), attached(vm) as client:
        before = client.ask("g")
        rip = client.register("rip")
        code = client.ask(f"m{rip:x},3")
        assert client.ask(f"M{rip:x},3:{NOP * 3}") == "OK"
        for step in (1, 2, 3):
            assert client.ask("s") == "T05thread:1;"
            assert client.register("rip") == rip + step
        assert client.ask(f"M{rip:x},3:{code}") == "OK"
        set_register(client, "rip", rip)
        assert client.ask("g") == before
    assert sh(vm, "echo alive") == "alive\n"


def test_a_hardware_breakpoint_in_the_kernel(vm: posada.VM) -> None:
    with System.open() as system:
        if not has_hardware_breakpoints(system):
            pytest.skip("this processor has no hardware breakpoints for guests (QEMU's emulated SVM)")
    (place,) = symbols(vm, "__x64_sys_newuname")
    with vm.shell(ASK, stream=True), attached(vm) as client:
        assert client.ask(f"Z1,{place:x},1") == "OK"
        for _ in range(3):
            assert client.ask("c") == "T05thread:1;hwbreak:;"
            assert client.register("rip") == place
        assert client.ask(f"z1,{place:x},1") == "OK"
    assert sh(vm, "echo alive") == "alive\n"


def test_what_kvm_gives_up_on_is_reported_with_registers_and_code(vm: posada.VM) -> None:
    """An instruction that cannot be emulated, given to the idle kernel. The report is in the machine's log."""
    device = mapped_device(vm)
    (child,) = vm.fork(1, ephemeral=False)
    try:
        with socket.create_connection(("127.0.0.1", child.debug())) as connection:
            client = Client(connection)
            for _ in range(100):  # until it is in the kernel
                if client.ask("?") and not client.register("cs") & 3:
                    break
                client.send("c")
                connection.sendall(b"\x03")
                client.receive()
            rip = client.register("rip")
            assert rip >> 63
            assert client.ask(f"M{rip:x},3:{FXSAVE}") == "OK"
            set_register(client, "rax", device)
            client.send("c")
            wait_for(lambda: child.state is posada.State.CRASHED, "it goes on")
        assert str(child.record.exit).startswith("KVM gave up: INTERNAL_ERROR EMULATION, instruction 0f ae 00 ")
        report = child.logs()
        assert f"rax {device:016x}" in report
        assert f"code at {rip:#x}: " in report
        assert "<0f> ae 00" in report
    finally:
        child.delete()
