"""How many transfers at once the fill uses: one, unless more of them prove to be faster.

On a link with a long way, or with many small files, one rsync waits more than it works; on a fast link or a busy disk a
second one only takes from the first, and from the container. Nobody knows beforehand, so it is measured: one for some
seconds, then two, then four. What is not clearly faster is taken back, and the question is not asked again in this fill.

``Pace`` is pure; ``work_off`` hands out batches to that many threads. What it must never do: give a batch to two at once,
or leave a transfer running when it returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

from hostd.priority import background_threads

MAX_STREAMS = 4
"""Each takes a core's share on the source for its encryption, and a session of the connection that all share."""
MEASURE_SECONDS = 8.0
"""A fill that is over sooner is not worth a decision; and a batch's own beginning and end must not decide."""
GAIN = 1.25
"""So much faster twice as many must be to be kept: less may be chance."""
FILE_WORK_BYTES = 64 * 1024
"""A file costs about as much as so many bytes more, whatever is in it."""
TICK_SECONDS = 0.5

Batch = TypeVar("Batch")


class Pace:
    """The decision. ``streams`` is how many are wanted now."""

    def __init__(self) -> None:
        self.streams = 1
        self.rates: dict[int, float] = {}
        """What was measured: streams to work (see FILE_WORK_BYTES) per second."""
        self._began: tuple[float, float] | None = None
        self._settled = False

    def note(self, now_seconds: float, work: float, running: int) -> None:
        """``running`` transfers have done ``work`` in all by now."""
        if self._settled:
            return
        if running != self.streams:
            self._began = None
        elif self._began is None:
            self._began = now_seconds, work
        elif now_seconds - self._began[0] >= MEASURE_SECONDS:
            began, before = self._began
            self._began = None
            self._decide((work - before) / (now_seconds - began))

    def _decide(self, rate: float) -> None:
        self.rates[self.streams] = rate
        fewer = self.streams // 2
        if fewer and rate < GAIN * self.rates[fewer]:
            self.streams, self._settled = fewer, True
        elif self.streams >= MAX_STREAMS:
            self._settled = True
        else:
            self.streams *= 2


def work_off(
    batches: Iterable[Batch],
    fetch: Callable[[Batch, int, threading.Event], bool],
    *,
    pace: Pace,
    work: Callable[[], float],
    alone: Callable[[], bool],
) -> None:
    """Have every batch fetched; returns when all are, and raises what the first failing one raised.

    ``fetch(batch, stream, stop)`` says whether it is done with the batch; one that is not comes again. It has to end
    soon after ``stop`` is set, and, unless it is stream 0, when ``alone()`` says that one stream must do (a limit).
    """
    waiting, again = iter(batches), list[Batch]()
    stop = threading.Event()
    running: dict[Future[bool], tuple[int, Batch]] = {}
    with background_threads(MAX_STREAMS) as pool:
        try:
            while True:
                wanted = 1 if alone() else pace.streams
                while len(running) < wanted:
                    batch = again.pop() if again else next(waiting, None)
                    if batch is None:
                        break
                    free = set(range(MAX_STREAMS)) - {stream for stream, _ in running.values()}
                    running[pool.submit(fetch, batch, min(free), stop)] = min(free), batch
                if not running:
                    return
                finished = wait(running, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED).done
                pace.note(time.monotonic(), work(), len(running))
                for future in finished:
                    _, batch = running.pop(future)
                    if not future.result():
                        again.append(batch)
        except BaseException:
            stop.set()
            raise
