"""How many transfers at once: decided from what was measured, and every batch handed out exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from hostd.streams import MAX_STREAMS, MEASURE_SECONDS, Pace, work_off


def settled(rate: Callable[[int], float]) -> Pace:
    """A pace after a long fill over a link on which so many streams move ``rate`` of them."""
    pace, work, now = Pace(), 0.0, 0.0
    for _ in range(200):
        pace.note(now, work, pace.streams)
        now += 1.0
        work += rate(pace.streams)
    return pace


@pytest.mark.parametrize(
    ("rate", "streams"),
    [
        (lambda n: 100.0, 1),
        (lambda n: 100.0 / n, 1),
        (lambda n: 100.0 + n, 1),
        (lambda n: min(n, 2) * 100.0, 2),
        (lambda n: 100.0 * n, MAX_STREAMS),
    ],
)
def test_more_streams_are_kept_only_where_they_are_clearly_faster(rate: Callable[[int], float], streams: int) -> None:
    assert settled(rate).streams == streams


def test_a_short_fill_is_left_alone_and_the_tail_of_one_decides_nothing() -> None:
    pace = Pace()
    pace.note(0.0, 0.0, 1)
    pace.note(MEASURE_SECONDS - 1, 1e9, 1)
    assert (pace.streams, pace.rates) == (1, {})
    pace.note(MEASURE_SECONDS, 1e9, 1)
    assert pace.streams == 2
    for second in range(100):
        pace.note(MEASURE_SECONDS + second, 1e9, 1)  # there is no second batch
    assert (pace.streams, list(pace.rates)) == (2, [1])


class Trials:
    """Fetches that take note of themselves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: list[int] = []
        self.now: dict[int, int] = {}
        self.most = 0

    def fetch(self, batch: int, stream: int, _stop: threading.Event) -> bool:
        with self.lock:
            assert stream not in self.now, "two with one number"
            self.now[stream] = batch
            self.most = max(self.most, len(self.now))
        time.sleep(0.002)
        with self.lock:
            del self.now[stream]
            self.done.append(batch)
        return True


def wide() -> Pace:
    pace = Pace()
    pace.streams = MAX_STREAMS
    return pace


def test_every_batch_is_fetched_once_by_as_many_as_are_wanted() -> None:
    trials = Trials()
    work_off(range(100), trials.fetch, pace=wide(), work=lambda: 0.0, alone=lambda: False)
    assert (sorted(trials.done), trials.most) == (list(range(100)), MAX_STREAMS)


def test_under_a_limit_one_does_it_all() -> None:
    trials = Trials()
    work_off(range(20), trials.fetch, pace=wide(), work=lambda: 0.0, alone=lambda: True)
    assert (trials.done, trials.most) == (list(range(20)), 1)


def test_a_batch_that_was_ended_comes_again() -> None:
    trials, limited = Trials(), threading.Event()

    def fetch(batch: int, stream: int, stop: threading.Event) -> bool:
        if stream > 0:
            limited.set()
            return False
        return trials.fetch(batch, stream, stop)

    work_off(range(20), fetch, pace=wide(), work=lambda: 0.0, alone=limited.is_set)
    assert sorted(trials.done) == list(range(20))


def test_one_that_fails_ends_the_others_and_is_heard_of() -> None:
    ended: list[int] = []

    def fetch(batch: int, stream: int, stop: threading.Event) -> bool:
        if batch == 2:
            raise OSError("no space")
        if stop.wait(20):
            ended.append(batch)
        return False

    with pytest.raises(OSError, match="no space"):
        work_off(range(10), fetch, pace=wide(), work=lambda: 0.0, alone=lambda: False)
    assert set(ended) == {0, 1, 3} or set(ended) == {0, 1}
