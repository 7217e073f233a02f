"""The probe: measured once, believed only from a place that is ours; and processes by pid and start time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posada.engine.common import process
from posada.engine.qemu import ports, probe
from posada.engine.qemu.engine import QemuEngine
from posada.engine.qemu.status import status_of
from posada.errors import HostError, Timeout, Unsupported
from posada.host.launch import check_spec
from posada.model.capabilities import Feature
from posada.model.machine import make_spec
from posada.model.records import Process


def fake_qemu(folder: Path, text: str) -> Path:
    """A program that answers --version and counts how often it was asked."""
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho asked >> {folder}/asked\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = fake_qemu(tmp_path, "echo 'QEMU emulator version 9.1.2 (Debian 1:9.1)'")
    monkeypatch.setenv("POSADA_QEMU", str(path))
    monkeypatch.setattr(probe, "kvm_rate", lambda: (2e6, False, "too slow"))
    return path


def test_it_is_measured_once_per_binary(qemu: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    first = probe.facts(runtime)
    assert (first.version, first.machine, first.accelerator) == ("9.1.2", "pc-i440fx-9.1", "tcg")
    assert probe.facts(runtime) == first
    assert (tmp_path / "asked").read_text().count("asked") == 1
    qemu.write_text(qemu.read_text().replace("9.1.2", "10.0.3"))
    assert probe.facts(runtime).machine == "pc-i440fx-10.0"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"key": 1}', b"\xff" * 100])
def test_a_damaged_answer_is_measured_anew(qemu: Path, tmp_path: Path, content: bytes) -> None:
    runtime = tmp_path / "run"
    probe.facts(runtime)
    (runtime / "qemu-probe.json").write_bytes(content)
    assert probe.facts(runtime).version == "9.1.2"


def test_an_answer_that_others_could_have_written_is_not_read(qemu: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    probe.facts(runtime)
    runtime.chmod(0o777)
    probe.facts(runtime)
    assert (tmp_path / "asked").read_text().count("asked") == 2


def test_no_qemu_is_an_answer_of_the_probe_and_an_error_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSADA_QEMU", "qemu-that-is-not-there")
    engine = QemuEngine(tmp_path)
    found = engine.probe()
    assert not found.ok
    assert "not installed" in found.detail
    assert found.hint is not None
    with pytest.raises(HostError, match="not installed"):
        engine.capabilities()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo 'QEMU emulator version 6.2.0'", "is version 6.2.0"),
        ("exit 1", "does not run"),
        ("echo hello", "does not run: hello"),
    ],
)
def test_a_qemu_that_will_not_do(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(HostError, match=problem):
        probe.qemu_version(str(fake_qemu(tmp_path, text)))


def test_kvm_is_taken_only_where_it_is_fast_and_qemu_can_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_qemu(tmp_path, 'case "$1" in --version) echo "QEMU emulator version 8.2.0";; *) echo no MSR >&2; exit 1;; esac')
    monkeypatch.setenv("POSADA_QEMU", str(path))
    monkeypatch.setattr(probe, "kvm_rate", lambda: (3e9, True, "hardware runs it"))
    found = probe.facts(tmp_path / "run")
    assert (found.accelerator, found.kvm) == ("tcg", "hardware runs it, but QEMU cannot use it: no MSR")
    path.write_text("#!/bin/sh\necho QEMU emulator version 8.2.1\n")
    assert probe.facts(tmp_path / "run").accelerator == "kvm"


def test_the_measurement_itself_says_something_of_this_host() -> None:
    rate, useful, words = probe.kvm_rate()
    if not os.path.exists("/dev/kvm"):
        assert (rate, useful, words) == (0, False, "there is no /dev/kvm")
    else:
        assert "/dev/kvm" in words
        assert rate == 0 or rate > 1e4


@pytest.mark.parametrize(
    ("said", "useful"),
    [
        ("rate 3000000000 3000000000", True),
        ("rate 3000000000 0", True),  # nothing to compare with
        ("rate 2000000 7900000000", False),  # the host's kernel emulates
        ("rate 39000000 45000000", True),  # hardware, of a machine that is emulated itself
        ("rate 2000000 0", False),
        ("error no", False),
    ],
)
def test_what_hardware_runs_keeps_step_with_the_host(monkeypatch: pytest.MonkeyPatch, said: str, useful: bool) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=f"{said}\n", stderr="")
    )
    assert probe.kvm_rate()[1] is useful


@pytest.mark.parametrize(
    ("module", "said", "nests"), [("kvm_amd", "1", True), ("kvm_intel", "Y", True), ("kvm_intel", "N", False)]
)
def test_whether_kvm_guests_may_have_guests(tmp_path: Path, module: str, said: str, nests: bool) -> None:
    assert probe.kvm_nests(tmp_path) is False
    (tmp_path / module / "parameters").mkdir(parents=True)
    (tmp_path / module / "parameters/nested").write_text(f"{said}\n")
    assert probe.kvm_nests(tmp_path) is nests


def test_a_host_whose_kvm_does_not_nest_says_so(qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 9.1.3\n")
    assert QemuEngine(tmp_path / "tcg").capabilities().has(Feature.NESTED)
    monkeypatch.setattr(probe, "kvm_rate", lambda: (3e9, True, "hardware runs it"))
    monkeypatch.setattr(probe, "kvm_nests", lambda: False)
    can = QemuEngine(tmp_path / "kvm").capabilities()
    assert can.accelerator == "kvm"
    with pytest.raises(Unsupported, match="nested virtualisation .*does not pass it on"):
        check_spec(make_spec(image="debian:12", nested=True), can)


def test_every_feature_has_a_verdict(qemu: Path, tmp_path: Path) -> None:
    features = QemuEngine(tmp_path / "run").capabilities().features
    assert set(features) == set(Feature)
    assert all(verdict.hint for verdict in features.values() if not verdict.ok)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


async def test_a_process_is_its_pid_and_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    found = process.find(sleeper.pid)
    other = Process(found.pid, found.start + 1)
    assert process.alive(found)
    assert not process.alive(other)
    assert not process.send(other, signal.SIGKILL)
    assert process.has_ended(other)
    await process.ended(other, 1)
    with pytest.raises(Timeout):
        await process.ended(found, 0.01)
    waiting = asyncio.create_task(process.ended(found, 10))
    await asyncio.sleep(0)
    assert process.send(found, signal.SIGKILL)
    await waiting
    assert not process.alive(found)  # a zombie until the fixture takes it
    assert process.has_ended(found)


LEADER = """
import os, sys
if os.fork() == 0:
    os.write(1, b"%d" % os.getpid())
    os.close(1)
    os.read(0, 1)
"""


def test_one_that_is_gone_may_have_left_its_number_to_its_session() -> None:
    """A machine that was forked has children in its session: kernels before 6.16 say EINVAL of it then, not ESRCH."""
    argv = [sys.executable, "-c", LEADER]
    with subprocess.Popen(argv, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leader:
        found = process.find(leader.pid)
        assert leader.stdout is not None
        child = int(leader.stdout.read())
        leader.wait()
        assert os.getsid(child) == found.pid
        assert not process.send(found, signal.SIGKILL)
        assert process.has_ended(found)
        asyncio.run(process.ended(found, 1))


@pytest.mark.parametrize("content", [b"", b"{", b'{"reason": 1}', b"[" * 100_000])
def test_a_damaged_exit_record_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "exit.json").write_bytes(content)
    assert process.read_exit(tmp_path) is None
    status = status_of(Process(2**22 + 1, 1), tmp_path)
    assert (status.alive, status.crashed) == (False, True)


def test_a_taken_port_is_named_before_qemu_fails_on_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        spec = make_spec(image="x", ports=[f"{number}:80"])
        with pytest.raises(HostError, match=f"127.0.0.1:{number}/tcp: Address already in use"):
            ports.check_free(spec.ports)
    ports.check_free(spec.ports)
