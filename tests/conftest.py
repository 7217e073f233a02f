"""What every test shares. Tests that start guests are in e2e/, and carry the mark ``guest``."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure() -> None:
    """A suite that runs in the background is started with signals ignored, and every program it starts inherits that: tests
    of Ctrl-C would wait for ever. A handler of ours is not inherited; the programs start with the default."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    # Some thousand toy machines and devices live in this one process, and their descriptors until they are collected.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16384)), hard))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in e2e/ and lab/ starts guests; and quick tests come first, so that a mistake shows early."""
    for item in items:
        if HERE / "lab" in item.path.parents:
            item.add_marker(pytest.mark.lab)
        if HERE / "e2e" in item.path.parents or HERE / "lab" in item.path.parents:
            item.add_marker(pytest.mark.guest)
            if not any(item.iter_markers("timeout")):
                item.add_marker(pytest.mark.timeout(300))  # guests may be emulated, two to a slow processor
    order = {"unit": 0, "golden": 1, "fuzz": 2, "contract": 3, "lab": 10}
    items.sort(key=lambda item: order.get(item.path.relative_to(HERE).parts[0], 9))
