"""What a fork can get wrong: one test for each row of docs/hazards.md that is not accepted as it is.

Each machine here is a Debian guest with nothing but the essential packages; so programs in it are sh, bash and perl.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

import posada

#: Appends a counter to a log, fsyncs, and keeps a copy in memory, for ever. At any instant, of a machine that is sound:
#: done <= last line of the log <= begun, begun - done <= 1, and the lines are 1, 2, 3 … without a gap.
WRITER = r"""
use IO::Handle;
open(my $log, '>', '/root/log') or die; open(my $cell, '+>', '/root/cell') or die;
sub memory { open(my $f, '>', "/dev/shm/$_[0].new") or die; print $f $_[1]; close $f;
             rename("/dev/shm/$_[0].new", "/dev/shm/$_[0]") }
for (my $n = 1; ; $n++) {
    memory('begun', $n);
    syswrite($log, "$n\n"); $log->sync;
    sysseek($cell, 0, 0); syswrite($cell, sprintf('%-20d', $n)); $cell->sync;
    memory('done', $n);
}
"""

#: Draws from a generator that was seeded before the fork; when the generation changes it seeds anew, if told to.
DICE = r"""
my ($reseed, $out) = @ARGV;
sub generation { open(my $f, '<', '/run/posada/generation') or return ''; local $/; <$f> }
srand(42); my $seen = generation();
open(my $f, '>', "$out.ready"); close $f;
while ((my $now = generation()) eq $seen) { select(undef, undef, undef, 0.02) }
if ($reseed) { open(my $r, '<', '/dev/urandom'); read($r, my $seed, 4); srand(unpack('L', $seed)) }
open($f, '>', "$out.new"); print $f int(rand(1e12)); close $f; rename("$out.new", $out);
"""

#: A stand-in for openssh's: what counts is that the old keys go, and that new ones are asked for.
KEYGEN = r"""#!/bin/sh
key() { head -c 32 /dev/urandom | od -An -tx1 > "$1"; }
case "$*" in
    *-A*) key /etc/ssh/ssh_host_ecdsa_key; [ -e /etc/ssh/ssh_host_ed25519_key ] || key /etc/ssh/ssh_host_ed25519_key ;;
    *"-t ed25519"*"-f /etc/ssh/ssh_host_ed25519_key"*) key /etc/ssh/ssh_host_ed25519_key ;;
    *) exit 1 ;;
esac
"""


@contextmanager
def forked(source: posada.VM, n: int = 1, **options: object) -> Iterator[list[posada.VM]]:
    """Children of ``source``, deleted at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(child) for child in source.fork(n, **options)]  # type: ignore[arg-type]


def run(vm: posada.VM, script: str) -> str:
    return vm.shell(script, check=True, timeout=30).stdout.strip()


def differ(values: Sequence[str]) -> bool:
    return len(set(values)) == len(values)


def wait_for_file(vm: posada.VM, path: str) -> str:
    """The contents of a file in the guest as soon as it is there."""
    return run(vm, f"while ! [ -e {path} ]; do sleep 0.05; done; cat {path}")


def start(vm: posada.VM, name: str, script: str, *args: str) -> None:
    """A perl program that runs on in the background of the guest."""
    vm.files.write(f"/root/{name}.pl", script)
    perl = f"setsid perl /root/{name}.pl {' '.join(args)} >/root/{name}.out 2>&1 </dev/null"
    run(vm, f"{perl} & echo $! > /root/{name}.pid")


# ------------------------------------------------------------------ identity


def test_identity_is_new(vm: posada.VM) -> None:
    asked = {
        "hostname": "hostname",
        "/etc/hostname": "cat /etc/hostname",
        "machine-id": "cat /etc/machine-id",
        "mac": "cat /sys/class/net/eth0/address",
    }
    before = {name: run(vm, script) for name, script in asked.items()}
    with forked(vm, 2) as children:
        for name, script in asked.items():
            values = [before[name], *(run(child, script) for child in children)]
            assert differ(values), name
            assert all(values), name
        for child in children:
            assert run(child, "hostname") == run(child, "cat /etc/hostname") == child.name
            assert re.fullmatch("[0-9a-f]{32}", run(child, "cat /etc/machine-id"))
            assert run(child, "cat /sys/class/net/eth0/address") in child.record.macs
    assert {name: run(vm, script) for name, script in asked.items()} == before


def test_random_numbers_differ(vm: posada.VM) -> None:
    draw = "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; cat /proc/sys/kernel/random/uuid"
    with forked(vm, 3) as children:
        drawn = [run(machine, draw) for machine in [vm, *children]]
    assert differ(drawn)
    assert all(len(d) > 60 for d in drawn)


def test_generation_counts_up(vm: posada.VM) -> None:
    # What programs do: wait for the file to be replaced. `tail -F` would do; a shell loop shows the moment as well.
    before = run(vm, "cat /run/posada/generation 2>/dev/null || echo 0")
    with forked(vm, 1) as (child,):
        assert int(run(child, "cat /run/posada/generation")) > int(before)
        assert child.record.generation == vm.refresh().generation + 1
    assert run(vm, "cat /run/posada/generation 2>/dev/null || echo 0") == before


def test_python_hook_reseeds(vm: posada.VM) -> None:
    """The recipe's way, in the language the guest has; tests/test_recipes.py has the recipe's own code."""
    start(vm, "careless", DICE, "0", "/root/careless")
    start(vm, "careful", DICE, "1", "/root/careful")
    wait_for_file(vm, "/root/careless.ready")
    wait_for_file(vm, "/root/careful.ready")
    with forked(vm, 2) as children:
        careless = [wait_for_file(child, "/root/careless") for child in children]
        careful = [wait_for_file(child, "/root/careful") for child in children]
        assert careless[0] == careless[1], "the hazard is gone: then so is the need for this test"
        assert differ(careful)


def test_clock_is_right(vm: posada.VM) -> None:
    run(vm, "date -s '1 hour ago'")
    with forked(vm, 1) as (child,):
        monotonic = [float(run(machine, "cut -d' ' -f1 /proc/uptime")) for machine in (vm, child)]
        assert abs(float(run(child, "date +%s.%N")) - time.time()) < 3
        assert abs(monotonic[0] - monotonic[1]) < 30
    assert time.time() - float(run(vm, "date +%s")) > 3000, "the source's own clock is the guest's business"


def test_ssh_host_keys_are_new(vm: posada.VM) -> None:
    vm.files.write("/usr/bin/ssh-keygen", KEYGEN, mode=0o755)
    run(vm, "mkdir -p /etc/ssh && echo old > /etc/ssh/ssh_host_rsa_key && ssh-keygen -A")
    old = run(vm, "cat /etc/ssh/ssh_host_ed25519_key")
    with forked(vm, 2) as children:
        new = [run(child, "cat /etc/ssh/ssh_host_ed25519_key") for child in children]
        assert differ([old, *new])
        for child in children:
            assert wait_for_file(child, "/etc/ssh/ssh_host_ecdsa_key")  # of -A; it may take its time
            assert not child.files.exists("/etc/ssh/ssh_host_rsa_key")
    assert run(vm, "cat /etc/ssh/ssh_host_ed25519_key") == old


# ------------------------------------------------------------------ network


@contextmanager
def listener() -> Iterator[tuple[socket.socket, int]]:
    """A TCP server of this host, which guests reach at 10.0.2.2."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server, server.getsockname()[1]


def test_network_works_in_children(vm: posada.VM) -> None:
    with listener() as (server, port), forked(vm, 2) as children:
        for machine in [vm, *children]:
            hello = f"timeout 20 bash -c 'echo hello from {machine.name} > /dev/tcp/10.0.2.2/{port}'"
            run(machine, hello)
            connection, _ = server.accept()
            with connection:
                connection.settimeout(30)
                assert connection.makefile().readline() == f"hello from {machine.name}\n"


def test_inherited_connections_end_in_the_child_only(vm: posada.VM) -> None:
    with listener() as (server, port):
        vm.files.write(
            "/root/talk",
            f"exec 3<>/dev/tcp/10.0.2.2/{port}\n"
            "while read -r line <&3; do echo \"got $line\" >&3; done\necho ended > /root/ended\n",
        )
        run(vm, "setsid bash /root/talk >/dev/null 2>&1 </dev/null &")
        connection, _ = server.accept()
        with connection, connection.makefile("rw") as talk:
            connection.settimeout(30)
            talk.write("before\n")
            talk.flush()
            assert talk.readline() == "got before\n"
            with forked(vm, 1) as (child,):
                assert wait_for_file(child, "/root/ended") == "ended"
                talk.write("after\n")
                talk.flush()
                assert talk.readline() == "got after\n"
                assert not vm.files.exists("/root/ended")


def test_ports_are_their_own(host: posada.Host, image: str) -> None:
    with host.run(image, ports=[7000]) as vm:
        serve = (
            "use IO::Socket::INET;"
            "my $s = IO::Socket::INET->new(LocalPort => 7000, Listen => 5, ReuseAddr => 1) or die;"
            "while (my $c = $s->accept) { chomp(my $h = `hostname`); print $c \"$h\\n\"; close $c }"
        )
        start(vm, "serve", serve)
        run(vm, "while ! grep -q :1B58 /proc/net/tcp*; do sleep 0.05; done")
        with forked(vm, 2) as children:
            machines = [vm, *children]
            assert differ([str(machine.ports[7000].host) for machine in machines])
            for machine in machines:
                address = ("127.0.0.1", machine.ports[7000].host)
                with socket.create_connection(address, timeout=30) as client, client.makefile() as reply:
                    assert reply.readline().strip() == machine.name


# ------------------------------------------------------------------ programs


def test_source_streams_survive(vm: posada.VM) -> None:
    with vm.shell("while read -r line; do echo got $line; done", stream=True, stdin=True) as process:
        events = iter(process)
        for number in range(5):
            process.write(f"{number}\n")
            assert next(events).text == f"got {number}\n"
            with forked(vm, 1):
                process.write(f"while forked {number}\n")
                assert next(events).text == f"got while forked {number}\n"
        process.close_stdin()
        assert process.wait().exit_code == 0


def test_commands_in_flight_go_on_in_both(vm: posada.VM) -> None:
    counting = "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/n.new; mv /dev/shm/n.new /dev/shm/n; sleep 0.05; done"
    with vm.shell(counting, stream=True):
        wait_for_file(vm, "/dev/shm/n")
        with forked(vm, 1) as (child,):
            for machine in (child, vm):
                seen = run(machine, "cat /dev/shm/n")
                run(machine, f"while [ $(cat /dev/shm/n) = {seen} ]; do sleep 0.05; done")


# ------------------------------------------------------------------ memory and disks


def test_no_later_write_is_seen(vm: posada.VM) -> None:
    run(vm, "echo early | tee /dev/shm/word > /root/word; head -c 32M /dev/zero > /dev/shm/pad; sync")
    with forked(vm, 1) as (child,):
        run(vm, "echo late | tee /dev/shm/word > /root/word; head -c 32M /dev/urandom > /dev/shm/pad; sync")
        run(vm, "head -c 20M /dev/urandom > /root/later; sync")
        run(child, "sync; echo 3 > /proc/sys/vm/drop_caches")
        assert run(child, "cat /dev/shm/word /root/word").split() == ["early", "early"]
        assert run(child, "tr -d '\\0' < /dev/shm/pad | wc -c") == "0"
        assert not child.files.exists("/root/later")
        run(child, "echo child | tee /dev/shm/word > /root/word; sync")
        run(vm, "sync; echo 3 > /proc/sys/vm/drop_caches")
        assert run(vm, "cat /dev/shm/word /root/word").split() == ["late", "late"]


def test_siblings_do_not_see_each_other(vm: posada.VM) -> None:
    run(vm, "head -c 48M /dev/urandom > /dev/shm/pad; sha256sum < /dev/shm/pad > /dev/shm/sum")
    verify = "[ \"$(sha256sum < /dev/shm/pad)\" = \"$(cat /dev/shm/sum)\" ] && echo same || echo changed"
    with forked(vm, 2) as (one, other):
        # The first gives 48 MiB back (free page reporting punches holes for them) and writes over what it gets next.
        run(one, "rm /dev/shm/pad; head -c 64M /dev/urandom > /dev/shm/new; rm /dev/shm/new; sync")
        assert run(other, verify) == "same"
        assert run(vm, verify) == "same"
        with forked(other, 1) as (late,):
            assert run(late, verify) == "same"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_disk_and_memory_agree(vm: posada.VM) -> None:
    start(vm, "writer", WRITER)
    wait_for_file(vm, "/dev/shm/done")
    look = """
        kill -STOP $(cat /root/writer.pid)
        cat /dev/shm/begun; echo; cat /dev/shm/done; echo
        echo 3 > /proc/sys/vm/drop_caches
        cat /root/cell; echo; awk '$1 != NR { print "gap at", NR; exit } END { print NR }' /root/log
    """
    for number in range(50):
        with forked(vm, 1) as (child,):
            seen = run(child, look).split("\n")
            assert len(seen) == 4, f"fork {number}: {seen}"
            begun, done, cell, lines = (int(line) for line in seen)
            assert done <= cell <= lines <= begun <= done + 1, f"fork {number}: {seen}"
    assert run(vm, "cat /root/writer.out") == ""


# ------------------------------------------------------------------ forks of everything, and forks that fail


def test_fork_of_a_fork(vm: posada.VM) -> None:
    run(vm, "echo source > /dev/shm/who")
    with forked(vm, 1) as (child,):
        run(child, "echo child > /dev/shm/who")
        with forked(child, 2) as grandchildren:
            family = [vm, child, *grandchildren]
            assert [run(machine, "cat /dev/shm/who") for machine in family] == ["source", *["child"] * 3]
            assert differ([run(machine, "cat /etc/machine-id") for machine in family])
            assert differ([run(machine, "cat /sys/class/net/eth0/address") for machine in family])
            assert differ([run(machine, "head -c 16 /dev/urandom | od -An -tx1") for machine in family])
            assert {machine.record.generation for machine in grandchildren} == {child.record.generation + 1}
            child.delete()  # nothing of a grandchild depends on it
            assert [run(machine, "cat /dev/shm/who /etc/debian_version | head -n1") for machine in grandchildren] == [
                "child",
                "child",
            ]


def test_fork_of_a_snapshot(vm: posada.VM) -> None:
    run(vm, "echo then | tee /dev/shm/word > /root/word")
    snapshot = vm.snapshot("then")
    run(vm, "echo now | tee /dev/shm/word > /root/word; date -s '1 hour ago'")
    with forked(vm, 2, snapshot=snapshot) as children:
        family = [vm, *children]
        for child in children:
            assert run(child, "cat /dev/shm/word /root/word").split() == ["then", "then"]
            assert abs(float(run(child, "date +%s.%N")) - time.time()) < 3
        assert differ([run(machine, "cat /etc/machine-id") for machine in family])
        assert differ([run(machine, "head -c 16 /dev/urandom | od -An -tx1") for machine in family])


def test_failed_reset_leaves_no_child(host: posada.Host, vm: posada.VM) -> None:
    run(vm, "rm -f /etc/machine-id; mkdir -p /etc/machine-id/in-the-way; echo here > /dev/shm/word")
    with pytest.raises(posada.ForkError) as caught:
        vm.fork(2)
    assert caught.value.vms == []
    assert set(caught.value.failures) == {0, 1}
    assert [machine.name for machine in host.vms.list()] == [vm.name]
    assert run(vm, "cat /dev/shm/word") == "here"
    run(vm, "rm -r /etc/machine-id; echo 0123456789abcdef0123456789abcdef > /etc/machine-id")
    with forked(vm, 1) as (child,):
        assert run(child, "cat /dev/shm/word") == "here"
