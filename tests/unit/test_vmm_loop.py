"""The event loop: order, timers, other threads, forks."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator

import pytest

from posada.vmm.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_ready_descriptor_is_called_with_its_events(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.watch(pipe[0], lambda events: (seen.append(events), loop.stop()))
    os.write(pipe[1], b"x")
    loop.run()
    assert seen[0] == select.EPOLLIN


def test_handlers_run_with_the_lock_held(loop: Loop) -> None:
    free: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: free.append(loop.lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        loop.stop()

    loop.soon(look)
    loop.run()
    assert free == [False]


def test_timers_fire_in_order_and_cancelled_ones_do_not(loop: Loop) -> None:
    seen: list[str] = []
    loop.timer(0.02, lambda: (seen.append("late"), loop.stop()))
    loop.timer(0.001, lambda: seen.append("early"))
    gone = loop.timer(0.01, lambda: seen.append("cancelled"))
    gone.cancel()
    gone.cancel()
    loop.run()
    assert seen == ["early", "late"]


def test_a_timer_from_another_thread_wakes_a_sleeping_loop(loop: Loop) -> None:
    loop.timer(30, lambda: None)
    thread = threading.Thread(target=lambda: loop.timer(0.001, loop.stop))
    begun = time.monotonic()
    thread.start()
    loop.run()
    thread.join()
    assert time.monotonic() - begun < 10


def test_soon_from_another_thread(loop: Loop) -> None:
    thread = threading.Thread(target=lambda: loop.soon(loop.stop))
    thread.start()
    loop.run()
    thread.join()


def test_what_soon_adds_does_not_starve_descriptors(loop: Loop, pipe: tuple[int, int]) -> None:
    def again() -> None:
        loop.soon(again)

    loop.watch(pipe[0], lambda _: loop.stop())
    loop.soon(again)
    loop.soon(lambda: os.write(pipe[1], b"x"))
    loop.run()


def test_unwatch_within_a_batch_is_heeded(loop: Loop) -> None:
    a, b = os.pipe(), os.pipe()
    seen: list[str] = []

    def first(name: str, other: int) -> None:
        seen.append(name)
        loop.unwatch(other)
        loop.stop()

    loop.watch(a[0], lambda _: first("a", b[0]))
    loop.watch(b[0], lambda _: first("b", a[0]))
    os.write(a[1], b"x")
    os.write(b[1], b"x")
    loop.run()
    assert len(seen) == 1
    loop.unwatch(a[0])
    loop.unwatch(a[0])
    for fd in (*a, *b):
        os.close(fd)


def test_modify_to_nothing_and_back(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.watch(pipe[0], seen.append)
    loop.modify(pipe[0], 0)
    os.write(pipe[1], b"x")
    loop.timer(0.01, loop.stop)
    loop.run()
    assert not seen
    loop.modify(pipe[0], select.EPOLLIN)
    loop.timer(0.01, loop.stop)
    loop.run()
    assert seen
    with pytest.raises(KeyError):
        loop.modify(pipe[1], 0)


def test_an_error_in_a_handler_ends_run(loop: Loop) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    loop.soon(fail)
    with pytest.raises(ZeroDivisionError):
        loop.run()
    assert loop.lock.acquire(blocking=False)


def test_a_forked_child_has_the_watches_and_the_parent_keeps_its_own(loop: Loop, pipe: tuple[int, int]) -> None:
    seen: list[int] = []
    loop.watch(pipe[0], lambda events: (seen.append(os.getpid()), loop.stop()))
    done = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            loop.after_fork()
            loop.run()
            os.read(pipe[0], 1)
            os.write(done[1], b"ok" if seen == [os.getpid()] else b"no")
            status = 0
        finally:
            os._exit(status)
    os.write(pipe[1], b"x")
    assert os.read(done[0], 2) == b"ok"
    assert os.waitpid(child, 0)[1] == 0
    os.write(pipe[1], b"y")
    loop.run()
    assert seen == [os.getpid()]
    for fd in done:
        os.close(fd)


def test_timers_of_other_threads_are_never_lost(loop: Loop) -> None:
    """While the loop drops cancelled ones, as the serial port of a talking guest makes and cancels them."""
    fired = 0
    count = 300

    def note() -> None:
        nonlocal fired
        fired += 1

    def make() -> None:
        for _ in range(count):
            with loop.lock:
                loop.timer(0, lambda: None).cancel()
                loop.timer(0, note)
        loop.soon(lambda: loop.timer(0.001, loop.stop))

    threads = [threading.Thread(target=make)]
    for thread in threads:
        thread.start()
    loop.run()
    for thread in threads:
        thread.join()
    assert fired == count
