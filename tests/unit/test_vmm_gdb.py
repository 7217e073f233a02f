"""The GDB stub: packets, session, and toy guests under a small client and under gdb itself."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gdb_client import Client, Debugged
from kvm_kit import CODE, Running, Toy, counted, needs_kvm, wait_until

from posada.errors import EngineError
from posada.kvm import Exit, System
from posada.kvm.exits import DebugExit, InternalError, Plain
from posada.proto.monitor import Op
from posada.vmm.control import Given
from posada.vmm.gdb.debugger import Debugging
from posada.vmm.gdb.layout import REGISTERS, SIZE, target_xml
from posada.vmm.gdb.packet import MAX_PACKET, Decoder, Mark, encode
from posada.vmm.gdb.target import Stop
from posada.vmm.loop import Loop
from posada.vmm.vcpu import State

# the packet layer


def test_packets_come_back_as_they_were_sent_however_they_are_cut() -> None:
    payloads = [b"", b"g", b"binary }$#* and more", bytes(range(256))]
    stream = b"".join(map(encode, payloads))
    assert list(Decoder().feed(stream)) == payloads
    decoder = Decoder()
    assert [p for byte in stream for p in decoder.feed(bytes([byte]))] == payloads


def test_what_is_not_a_packet_is_marked_or_ignored() -> None:
    assert encode(b"OK") == b"$OK#9a"
    seen = list(Decoder().feed(b"++-\x03junk$OK#9b$OK#zz$lost$OK#9a"))
    assert seen == [Mark.ACK, Mark.ACK, Mark.NAK, Mark.INTERRUPT, Mark.DAMAGED, Mark.DAMAGED, b"OK"]


def test_an_endless_packet_holds_no_memory() -> None:
    decoder = Decoder()
    assert list(decoder.feed(b"$" + b"x" * (10 * MAX_PACKET))) == []
    assert len(decoder._body or b"") <= 2 * MAX_PACKET + 1
    assert list(decoder.feed(b"#00$OK#9a")) == [Mark.DAMAGED, b"OK"]


def test_the_description_names_each_register_once_and_in_order() -> None:
    text = target_xml().decode()
    at = [text.index(f'<reg name="{register.name}" ') for register in REGISTERS]
    assert at == sorted(at)
    assert text.count("<reg ") == len(REGISTERS)
    assert sum(register.size for register in REGISTERS) == SIZE


# toy guests


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System.open() as opened:
        yield opened


@pytest.fixture
def debugged(system: System) -> Iterator[Any]:
    made: list[Debugged] = []

    def make(code: bytes, **options: Any) -> Debugged:
        made.append(Debugged(Toy(system, code, long_mode=True, **options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


SPIN = bytes.fromhex("48ff04250005000048ffc048ffc3ebf0")
"""CODE: inc qword [0x500]; +8: inc rax; +11: inc rbx; +14: jmp CODE"""


@needs_kvm
def test_attaching_stops_and_leaving_lets_it_run(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    ask = with_gdb.client.ask
    assert ask("?") == "T05thread:1;"
    assert with_gdb.machine.first.state is State.PARKED
    assert "swbreak+" in ask("qSupported:multiprocess+;swbreak+")
    assert (ask("qAttached"), ask("qfThreadInfo"), ask("qsThreadInfo"), ask("qC")) == ("1", "m1", "l", "QC1")
    assert bytes.fromhex(ask("qThreadExtraInfo,1")) == b"vcpu 0"
    assert ask("vMustReplyEmpty") == ""
    assert ask("Hg0") == "OK"
    assert (ask("T1"), ask("T2")) == ("OK", "E16")
    before = counted(with_gdb.machine)
    assert ask("D") == "OK"
    wait_until(lambda: counted(with_gdb.machine) > before, "it does not run on")


@needs_kvm
def test_registers_and_memory_are_read_and_written(debugged: Any) -> None:
    client = debugged(SPIN).client
    assert len(client.ask("g")) == SIZE * 2
    assert CODE <= client.register("rip") <= CODE + 14
    assert client.register("cs") == 8
    assert client.register("cr3") == 0x4000
    assert client.ask("P3=3412000000000000") == "OK"
    assert client.register("rdx") == 0x1234
    assert client.register("rsp") == 0x3000
    assert client.ask("m1000,8") == SPIN[:8].hex()
    assert client.ask("M2000,4:deadbeef") == "OK"
    assert client.ask(b"X2004,3:" + b"}#$") == "OK"
    assert client.ask("m2000,7") == "deadbeef7d2324"
    assert client.ask("m7fff00000000,8") == "E0e"
    assert client.ask("M7fff00000000,1:00") == "E0e"
    assert client.ask("md0000000,4") == "E0e"  # mapped by the guest, and no memory there
    whole = client.ask("g")
    assert client.ask("G" + whole) == "OK"
    assert client.ask("g") == whole
    assert client.ask("G00") == "E0e"
    assert client.ask("P5000=00") == "E0e"
    xmm3 = [register.name for register in REGISTERS].index("xmm3")
    assert client.ask(f"P{xmm3:x}={bytes(range(16)).hex()}") == "OK"
    assert client.ask(f"p{xmm3:x}") == bytes(range(16)).hex()


def run_to_breakpoint(with_gdb: Debugged, reply: str) -> None:
    """Continue and expect a software breakpoint, where the processor can make an exit of one."""
    assert with_gdb.client.ask("QStartNoAckMode") == "OK"  # what comes next is the stop
    with_gdb.client.send("vCont;c")
    wait_until(lambda: with_gdb.readable() or bool(with_gdb.other), "nothing stops it")
    if with_gdb.other:
        pytest.skip("this processor gives the guest its int3 (QEMU's emulated SVM)")
    assert with_gdb.client.receive().endswith(reply)


@needs_kvm
def test_a_software_breakpoint_stops_each_time_and_is_not_seen(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    client = with_gdb.client
    assert client.ask("Z0,1008,1") == "OK"
    assert client.ask("Z0,1008,1") == "OK"
    assert client.ask("m1000,e") == SPIN[:14].hex()
    assert with_gdb.machine.toy.memory.read(CODE + 8, 1) == b"\xcc"
    assert client.ask("M1008,1:90") == "E0e"
    run_to_breakpoint(with_gdb, "T05thread:1;swbreak:;")
    assert client.register("rip") == CODE + 8
    rax, turns = client.register("rax"), counted(with_gdb.machine)
    assert client.ask("z0,1008,1") == "OK"
    assert client.ask("vCont;s:1") == "T05thread:1;"
    assert (client.register("rip"), client.register("rax")) == (CODE + 11, rax + 1)
    assert client.ask("Z0,1008,1") == "OK"
    assert client.ask("c") == "T05thread:1;swbreak:;"
    assert counted(with_gdb.machine) == turns + 1


@needs_kvm
def test_running_is_interrupted(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    before = counted(with_gdb.machine)
    with_gdb.client.send("c")
    wait_until(lambda: counted(with_gdb.machine) > before, "it does not run")
    with_gdb.client.socket.sendall(b"\x03")
    assert with_gdb.client.receive() == "T02thread:1;"
    assert with_gdb.machine.first.state is State.PARKED


@needs_kvm
def test_single_steps_walk_the_code(debugged: Any) -> None:
    client = debugged(SPIN).client
    order = [CODE, CODE + 8, CODE + 11, CODE + 14]
    at = order.index(client.register("rip"))
    for i in range(1, 9):
        assert client.ask("s") == "T05thread:1;"
        assert client.register("rip") == order[(at + i) % 4]


def skip_without_debug_registers(reply: str) -> None:
    if reply.startswith("T02"):
        pytest.skip("this processor has no hardware breakpoints for guests (QEMU's emulated SVM)")


def run_or_interrupt(client: Client) -> str:
    """Continue; if nothing stops it within two seconds, by hand."""
    client.send("c")
    client.socket.settimeout(2)
    try:
        return client.receive()
    except TimeoutError:
        client.socket.sendall(b"\x03")
        return client.receive()
    finally:
        client.socket.settimeout(10)


@needs_kvm
def test_hardware_breakpoints_and_watchpoints(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    client = with_gdb.client
    assert client.ask("Z1,100b,1") == "OK"
    reply = run_or_interrupt(client)
    skip_without_debug_registers(reply)
    assert reply == "T05thread:1;hwbreak:;"
    assert client.register("rip") == CODE + 11
    assert client.ask("z1,100b,1") == "OK"
    assert client.ask("Z2,500,8") == "OK"
    before = counted(with_gdb.machine)
    reply = run_or_interrupt(client)
    if reply.startswith("T02"):
        pytest.skip("this processor does not watch memory for guests")
    assert reply == "T05thread:1;watch:500;"
    assert counted(with_gdb.machine) == before + 1
    assert client.ask("z2,500,8") == "OK"


@needs_kvm
def test_debug_registers_are_four_and_watch_whole_places(debugged: Any) -> None:
    client = debugged(SPIN).client
    assert client.ask("Z3,500,8") == "", "x86 cannot watch reads alone"
    assert client.ask("Z2,501,8") == "E0e"
    assert client.ask("Z2,500,3") == "E0e"
    assert [client.ask(f"Z4,{0x500 + 8 * i:x},8") for i in range(5)] == ["OK"] * 4 + ["E0e"]
    assert client.ask("Z4,500,8") == "OK"
    assert client.ask("z4,500,8") == "OK"
    assert client.ask("Z1,1000,1") == "OK"


@needs_kvm
def test_an_int3_of_the_guests_own_reaches_the_guest(debugged: Any) -> None:
    """int3 at CODE; the handler at +0x80 counts at 0x500 and returns; then hlt without an irqchip."""
    from kvm_kit import IDT, gate

    code = bytes.fromhex("ebfeccf4").ljust(0x80, b"\0") + bytes.fromhex("48ff04250005000048cf")
    with_gdb = debugged(code)
    with_gdb.machine.toy.memory.write(IDT + 3 * 16, gate(CODE + 0x80))
    rip = [register.name for register in REGISTERS].index("rip")
    assert with_gdb.client.ask(f"P{rip:x}={(CODE + 2).to_bytes(8, 'little').hex()}") == "OK"
    with_gdb.client.send("c")
    wait_until(lambda: bool(with_gdb.other), "no halt came")
    if isinstance(with_gdb.other[0], InternalError):
        pytest.skip("this host's KVM does not emulate int3")
    assert with_gdb.other[0].reason == Exit.HLT
    assert counted(with_gdb.machine) == 1


@needs_kvm
def test_vcpus_are_threads_and_are_stepped_apart(debugged: Any) -> None:
    with_gdb = debugged(SPIN, cpus=3)
    client = with_gdb.client
    assert client.ask("qfThreadInfo") == "m1,2,3"
    assert client.ask("Hg2") == "OK"
    rip = client.register("rip")
    order = [CODE, CODE + 8, CODE + 11, CODE + 14]
    assert client.ask("vCont;s:2") == "T05thread:2;"
    assert client.register("rip") == order[(order.index(rip) + 1) % 4]
    stood = counted(with_gdb.machine)
    assert client.ask("vCont;s:3;x") == "E16"
    assert client.ask("vCont;s:9") == "E16"
    assert counted(with_gdb.machine) == stood
    assert client.ask("Z0,1008,1") == "OK"
    run_to_breakpoint(with_gdb, "swbreak:;")
    assert {thread.state for thread in with_gdb.machine.vcpus.threads} == {State.PARKED}


@needs_kvm
def test_a_debug_exit_is_told_apart_by_where_and_why_it_came(debugged: Any) -> None:
    """What a processor that has all of it reports; the toys above show what this one does."""
    with_gdb = debugged(SPIN)
    client, target, thread = with_gdb.client, with_gdb.server.target, with_gdb.machine.first
    assert client.ask("Z0,1008,1") == client.ask("Z2,500,8") == client.ask("Z1,1000,1") == "OK"
    assert target.exited(thread, DebugExit(3, CODE + 8, 0, 0)) == Stop(0, 5, "swbreak:")
    assert target.exited(thread, DebugExit(1, CODE + 8, 0xFFFF0FF1, 0)) == Stop(0, 5, "watch:500")
    assert target.exited(thread, DebugExit(1, CODE, 0xFFFF0FF2, 0)) == Stop(0, 5, "hwbreak:")
    assert target.exited(thread, DebugExit(1, CODE, 0xFFFF4FF0, 0)) == Stop(0, 5, "")
    assert target.exited(thread, Plain(Exit.SHUTDOWN)) is None
    assert target.exited(thread, DebugExit(3, CODE + 11, 0, 0)) is True, "the guest's own goes to the guest"
    assert thread.vcpu.get_vcpu_events().exception_nr == 3
    thread.vcpu.set_regs(thread.vcpu.get_regs())  # take it back


@needs_kvm
def test_a_client_that_drops_the_line_leaves_no_breakpoint(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    assert with_gdb.client.ask("Z0,1008,1") == "OK"
    before = counted(with_gdb.machine)
    with_gdb.ours.close()
    assert with_gdb.gone.wait(10)
    assert with_gdb.machine.toy.memory.read(CODE, len(SPIN)) == SPIN
    wait_until(lambda: counted(with_gdb.machine) > before + 10, "it does not run on")
    assert not with_gdb.other


@needs_kvm
def test_whoever_lets_the_machine_run_meanwhile_does_not_hang_the_stub(debugged: Any) -> None:
    with_gdb = debugged(SPIN)
    with_gdb.machine.vcpus.resume()
    assert CODE <= with_gdb.client.register("rip") <= CODE + 14


@needs_kvm
def test_monitor_commands(debugged: Any) -> None:
    client = debugged(SPIN).client
    assert "rax" in bytes.fromhex(client.ask("qRcmd," + b"registers".hex())).decode()
    assert "vcpu 0" in bytes.fromhex(client.ask("qRcmd," + b"exits".hex())).decode()
    assert "monitor registers" in bytes.fromhex(client.ask("qRcmd," + b"what".hex())).decode()


@needs_kvm
@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_itself(debugged: Any) -> None:
    probe = debugged(SPIN)
    assert probe.client.ask("Z0,1008,1") == "OK"
    run_to_breakpoint(probe, "swbreak:;")  # or skip: gdb would wait for it
    with_gdb = debugged(SPIN)
    here, there = with_gdb.client.socket, socket.socket(socket.AF_INET)
    there.bind(("127.0.0.1", 0))
    there.listen(1)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def serve() -> None:
        connection, _ = there.accept()
        with connection:
            back = threading.Thread(target=pump, args=(here, connection), daemon=True)
            back.start()
            pump(connection, here)
        here.shutdown(socket.SHUT_RDWR)

    here.settimeout(None)
    threading.Thread(target=serve, daemon=True).start()
    commands = [
        f"target remote 127.0.0.1:{there.getsockname()[1]}",
        "info threads",
        "break *0x1008",
        "continue",
        "p/x $rip",
        "x/2i $rip",
        "set $rbx = 0x77",
        "delete",
        "stepi",
        "stepi",
        "p/x $rbx",
        "p $cr3",
        "p $xmm0.uint128",
        "monitor exits",
        "detach",
    ]
    argv = ["gdb", "-nx", "-batch", "-ex", "set confirm off", "-ex", "set architecture i386:x86-64"]
    argv += [word for command in commands for word in ("-ex", command)]
    with there:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert "vcpu 0" in done.stdout, done.stdout + done.stderr
    assert "$1 = 0x1008" in done.stdout, done.stdout + done.stderr
    assert "inc    %rax" in done.stdout
    assert "$2 = 0x78" in done.stdout
    assert "$3 = 16384" in done.stdout
    assert "detached" in done.stdout
    assert with_gdb.gone.wait(10)
    before = counted(with_gdb.machine)
    wait_until(lambda: counted(with_gdb.machine) > before, "it does not run on")


@needs_kvm
def test_a_machine_listens_on_request_and_is_not_copied_meanwhile(system: System) -> None:
    toy = Toy(system, SPIN, long_mode=True)
    loop = Loop()
    with Running(toy, lock=loop.lock) as machine:
        machine.vcpus.start()
        owner: Any = SimpleNamespace(loop=loop, vcpus=machine.vcpus, memory=toy.memory)
        debugging = Debugging(owner)
        handlers = debugging.handlers({Op.FORK: lambda call: {"forked": True}, Op.INFO: lambda call: {}})
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # any abstract name
        listener.listen(1)
        name = listener.getsockname()
        call: Any = SimpleNamespace(args={"listener": 0}, given=Given([listener.detach()]))
        handlers[Op.DEBUG](call)
        assert handlers[Op.FORK](call) == {"forked": True}
        runner = threading.Thread(target=loop.run, daemon=True)
        runner.start()
        wait_until(lambda: not debugging._copying, "the copy is not done")
        for _ in range(2):  # one after the other
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(name)
                client = Client(connection)
                assert client.ask("?") == "T05thread:1;"
                with pytest.raises(EngineError, match="detach it first"):
                    handlers[Op.FORK](call)
                with socket.socket(socket.AF_UNIX) as second:
                    second.settimeout(10)
                    second.connect(name)
                    assert second.recv(1) == b""
                assert client.ask("Z0,1008,1") == "OK"
                assert machine.first.on_exit != machine.ends
            wait_until(lambda: not debugging.attached, "the line was dropped, and it did not notice")
            assert machine.first.on_exit == machine.ends
        before = counted(machine)
        wait_until(lambda: counted(machine) > before, "it does not run on")
        debugging._close_listener()
        loop.stop()
        runner.join(10)
    loop.close()
