"""Nothing is left behind: a short leak storm (`make bench` has the long one), and machines that hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from bench import storm

import posada


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [3, 4])
def test_a_storm_of_kills_leaves_nothing(host: posada.Host, places: tuple[Path, Path], image: str, seed: int) -> None:
    report = storm.storm(places, 15, seed, lambda message: None)
    assert report.cycles == 15
    assert len(report.fates) >= 3, "the dice fell on too few fates to say anything"
    assert report.leaks == []


def test_the_storm_would_notice(host: posada.Host, places: tuple[Path, Path], image: str) -> None:
    """A machine, its files and its processes, that nobody expects."""
    watch = storm.Storm(host, places, 1, lambda message: None)
    with host.run(image, keep=True) as watch.source:
        before = watch.state()
        with watch.source.fork(1)[0]:
            watch.compare(dict(before), "now")
            found = " ".join(watch.report.leaks)
            for what in ("processes", "machines", "files"):
                assert f"now: {what}: new" in found
        watch.report.leaks.clear()
        watch.settle()
        watch.compare(before, "afterwards")
        assert watch.report.leaks == []


def test_a_hung_machine_times_out_and_can_be_ended(vm: posada.VM) -> None:
    running = vm.refresh().running
    assert running is not None
    os.kill(running.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(posada.Timeout):
        vm.exec("true", timeout=1)
    with pytest.raises(posada.PosadaError):
        vm.fork(1)
    vm.kill()
    assert time.monotonic() - began < 60
    with pytest.raises(posada.NotFound):  # it was ephemeral
        vm.exec("true")
    assert not Path(f"/proc/{running.process.pid}").exists()


def test_a_machine_killed_in_a_command_says_so_at_once(vm: posada.VM) -> None:
    running = vm.refresh().running
    assert running is not None
    with vm.exec("sleep", "1000", stream=True) as process:
        os.kill(running.process.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(posada.GuestGone):
            process.wait()
        assert time.monotonic() - began < 5
