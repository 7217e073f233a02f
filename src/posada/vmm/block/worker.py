"""A thread that waits for a slow disk, so that the loop, and every vcpu that needs its lock, does not.

It is given nothing but system calls on descriptors (fdatasync): tables and guest memory are touched by the loop's
thread alone. It starts at the first job; after `drain` it is idle, and the process may fork.
"""

from __future__ import annotations

import _thread
from _queue import Empty, SimpleQueue
from collections.abc import Callable

from posada.vmm.loop import Loop

_Job = tuple[Callable[[], object], Callable[[OSError | None], object]]


class Worker:
    """Does jobs one after the other. All methods are called on the loop's thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.after_fork()

    def after_fork(self) -> None:
        """In a child, where the thread does not exist. Nothing may have been under way."""
        self._started = False
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._finished: SimpleQueue[tuple[Callable[[OSError | None], object], OSError | None]] = SimpleQueue()
        self._pending = 0

    def submit(self, work: Callable[[], object], done: Callable[[OSError | None], object]) -> None:
        """Run ``work`` in the thread, then ``done`` in the loop with the OSError it raised, or None."""
        if not self._started:
            self._started = True
            self._ended = _thread.allocate_lock()
            self._ended.acquire()
            _thread.start_new_thread(self._run, (self._jobs, self._finished, self._ended))
        self._pending += 1
        self._jobs.put((work, done))

    def drain(self) -> None:
        """Wait for every job, and for those that their ``done`` submits."""
        while self._pending:
            self._deliver(*self._finished.get())

    def close(self) -> None:
        """`drain` and end the thread. Idempotent; another `submit` starts it again."""
        self.drain()
        if self._started:
            self._jobs.put(None)
            self._ended.acquire()
            self._started = False

    def _run(
        self,
        jobs: SimpleQueue[_Job | None],
        finished: SimpleQueue[tuple[Callable[[OSError | None], object], OSError | None]],
        ended: _thread.LockType,
    ) -> None:
        while (job := jobs.get()) is not None:
            work, done = job
            failed: OSError | None = None
            try:
                work()
            except OSError as error:
                failed = error
            finished.put((done, failed))
            self._loop.soon(self._poll)
        ended.release()

    def _poll(self) -> None:
        while True:
            try:
                done, error = self._finished.get_nowait()
            except Empty:  # `drain` was quicker
                return
            self._deliver(done, error)

    def _deliver(self, done: Callable[[OSError | None], object], error: OSError | None) -> None:
        self._pending -= 1
        done(error)
