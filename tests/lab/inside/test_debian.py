"""What a Debian guest makes of its devices: the power button, a new generation ID, free memory, sockets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from debian_kit import SUITES, ask, booted, load_modules, perl, runtime, sh, wait_for

import posada
from posada.proto.monitor import Op

#: struct input_event: time, type, code, value. Key 116 is KEY_POWER.
EVENT = struct.Struct("<qqHHi")
EV_KEY, KEY_POWER = 1, 116
RESEEDED = "crng reseeded due to virtual machine fork"
MIB = 1 << 20


@pytest.fixture(scope="module", params=SUITES)
def vm(request: pytest.FixtureRequest) -> Iterator[posada.VM]:
    with booted(request.param, nics=[]) as machine:
        yield machine


READ = """
open(E, "<:raw", $ARGV[0]) or die "$ARGV[0]: $!"; $| = 1; print "ready\\n";
my $event; sysread(E, $event, 24) or die "read: $!"; print unpack("H*", $event);
"""


def test_the_power_button_is_a_key_to_the_guest(vm: posada.VM) -> None:
    load_modules(vm, SUITES[str(vm.spec.image)])
    (name,) = sh(vm, "grep -l '^Power Button' /sys/class/input/input*/name").split()
    node = sh(vm, f"ls {name.removesuffix('/name')} | grep '^event'").strip()
    with vm.exec("perl", "-e", READ, f"/dev/input/{node}", stream=True, timeout=60) as reader:
        said = iter(reader)
        assert next(said).text == "ready\n"
        ask(vm, Op.POWERDOWN)
        event = bytes.fromhex("".join(output.text for output in said))
    assert EVENT.unpack(event)[2:] == (EV_KEY, KEY_POWER, 1)


def test_a_fork_tells_the_kernel_that_it_is_one(vm: posada.VM) -> None:
    """Linux 6.12 as Debian builds it has a driver for the generation ID, 6.1 has none; the agent reseeds in both."""
    has_driver = vm.shell("ls -d /sys/bus/*/drivers/vmgenid").exit_code == 0
    assert has_driver == (vm.spec.image == "debian:13")
    (child,) = vm.fork(1)
    with child:
        if has_driver:
            wait_for(lambda: RESEEDED in sh(child, "dmesg"), "the kernel has not noticed", 30)
        assert RESEEDED not in sh(vm, "dmesg")
        random = "od -An -N32 -tx1 /dev/urandom"
        assert sh(vm, random) != sh(child, random)


def test_memory_that_the_guest_frees_is_the_hosts_again(vm: posada.VM) -> None:
    """By free page reporting: nobody asks for it, and the balloon stays empty."""

    def used() -> int:
        return vm.usage().rss

    before = used()
    sh(vm, "mount -t tmpfs tmpfs /mnt; head -c 100000000 /dev/zero | tr '\\0' x > /mnt/big")
    full = used()
    assert full > before + 80 * MIB
    sh(vm, "umount /mnt")
    wait_for(lambda: used() < full - 70 * MIB, "the host did not get it back")
    assert vm.inspect().devices["balloon"]["actual_pages"] == 0


LISTEN = """
use Socket; socket(L, 40, SOCK_STREAM, 0) or die; bind(L, pack("SSLLx4", 40, 0, 5005, 0xffffffff)) or die; listen(L, 1) or die;
$| = 1; print "ready\\n"; accept(C, L) or die; my $n = 0;
while (sysread(C, my $data, 65536)) { my $at = 0; $at += syswrite(C, $data, length($data) - $at, $at) while $at < length $data; }
"""
DIAL = """
use Socket; socket(S, 40, SOCK_STREAM, 0) or die; connect(S, pack("SSLLx4", 40, 0, 5006, 2)) and exit 0; print $!;
"""


def test_the_host_reaches_a_port_of_the_guest_through_one_socket(vm: posada.VM) -> None:
    """Firecracker's convention: CONNECT PORT, OK, then the stream."""
    data = bytes(range(256)) * 2000
    with vm.exec("perl", "-e", LISTEN, stream=True, timeout=60) as server, socket.socket(socket.AF_UNIX) as client:
        assert next(iter(server)).text == "ready\n"
        client.settimeout(30)
        client.connect(str(runtime(vm) / "vsock.sock"))
        client.sendall(b"CONNECT 5005\n")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += client.recv(1)
        assert answer.startswith(b"OK ")
        back = b""
        for at in range(0, len(data), 32000):
            client.sendall(data[at : at + 32000])
            while len(back) < min(at + 32000, len(data)):
                back += client.recv(65536)
        assert back == data


def test_the_guest_reaches_nothing_of_the_host(vm: posada.VM) -> None:
    assert perl(vm, DIAL) == "Connection reset by peer"
