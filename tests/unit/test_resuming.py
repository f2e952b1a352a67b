"""A follower notices a watch that lives and keeps silent, and begins it anew where it had come to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from events import resuming
from events.errors import StoreUnavailableError
from events.following import Change, Changes, KeyValue, Snapshot, StopEvent, Tick
from events.resuming import Batch, ResumingFollower

PREFIX = "/cargo/requests/"


class Session:
    """A watch that tells what the test gives it."""

    def __init__(self, cursors: Mapping[str, int]) -> None:
        self.cursors = dict(cursors)
        self.batches: queue.Queue[Batch | None] = queue.Queue()

    def __iter__(self) -> Iterator[Batch]:
        yield Batch()
        while (batch := self.batches.get()) is not None:
            yield batch
        raise StoreUnavailableError("cancelled")

    def close(self) -> None:
        self.batches.put(None)


class Store:
    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def snapshot(self, prefix: str) -> tuple[list[KeyValue], int]:
        return [], 10

    def revision(self) -> int:
        return 10

    def open_watches(self, cursors: Mapping[str, int]) -> Session:
        self.sessions.append(Session(cursors))
        return self.sessions[-1]


def until(condition: Callable[[], object]) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("never")


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def follower(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[ResumingFollower]:
    monkeypatch.setattr(resuming, "SILENT_SECONDS", 0.05)
    made = ResumingFollower(store, [PREFIX], stop=None, tick_seconds=1, contents=True)
    assert isinstance(made.poll(5), Snapshot)
    until(lambda: store.sessions)
    yield made
    made.close()


def changed(revision: int) -> Batch:
    return Batch(PREFIX, (Change(PREFIX + "web", b"x", revision),))


def test_a_watch_that_keeps_silent_about_what_a_read_shows_is_begun_anew_at_its_cursor(
    store: Store, follower: ResumingFollower
) -> None:
    """B9, E13, E17, E34: the stream lives, so neither keep-alive nor progress notices tell anything."""
    store.sessions[0].batches.put(changed(11))
    item = follower.poll(5)
    assert isinstance(item, Changes)
    until(lambda: (follower.expect(PREFIX, 12), len(store.sessions) == 2)[1])
    assert store.sessions[1].cursors == {PREFIX: 11}, "nothing is lost, nothing repeated"
    store.sessions[1].batches.put(changed(12))
    again = follower.poll(5)
    assert isinstance(again, Changes)
    assert again.revision == 12


def test_a_watch_that_tells_everything_is_left_alone(store: Store, follower: ResumingFollower) -> None:
    """B10: late is not silent, as long as it tells in the end."""
    for revision in range(11, 40):
        follower.expect(PREFIX, revision)
        store.sessions[0].batches.put(changed(revision))
        assert follower.poll(5) is not None
        threading.Event().wait(0.004)
    follower.expect(PREFIX, 39)
    assert len(store.sessions) == 1
    assert follower.trouble == ""


# --- woken, not looking -------------------------------------------------------------------------------------


def consumed(store: Store, stop: StopEvent, tick_seconds: float) -> tuple[ResumingFollower, queue.Queue[object]]:
    """A follower that a thread iterates over, and what it yields; None once it has ended."""
    made = ResumingFollower(store, [PREFIX], stop=stop, tick_seconds=tick_seconds, contents=True)
    seen: queue.Queue[object] = queue.Queue()

    def consume() -> None:
        for item in made:
            seen.put(item)
        seen.put(None)

    threading.Thread(target=consume, daemon=True).start()
    assert isinstance(seen.get(timeout=5), Snapshot)
    until(lambda: store.sessions)
    return made, seen


def test_whoever_waits_for_a_tick_is_woken_by_the_stop(store: Store) -> None:
    """It does not look for it twice a second: an idle agent would pay for that."""
    stop = StopEvent()
    made, seen = consumed(store, stop, 3600)
    stop.set()
    assert seen.get(timeout=5) is None
    made.close()


def test_a_stop_before_the_first_wait_ends_it_too(store: Store) -> None:
    stop = StopEvent()
    stop.set()
    made = ResumingFollower(store, [PREFIX], stop=stop, tick_seconds=3600, contents=True)
    assert list(made) == []
    made.close()


def test_whoever_waits_for_a_tick_is_told_of_trouble_and_of_its_end(store: Store) -> None:
    """B1: at once, not at the next look around."""
    stop = StopEvent()
    made, seen = consumed(store, stop, 3600)
    store.sessions[0].batches.put(None)
    assert seen.get(timeout=5) == Tick("cancelled")
    assert seen.get(timeout=5) == Tick("")
    store.sessions[-1].batches.put(changed(11))
    assert isinstance(seen.get(timeout=5), Changes)
    made.close()


def test_whoever_is_woken_for_nothing_still_gets_its_tick_in_time(store: Store) -> None:
    """B9: the look around must not be put off."""
    stop = StopEvent()
    made, seen = consumed(store, stop, 0.3)
    began = time.monotonic()
    woken = threading.Thread(target=lambda: [(made._wake(), threading.Event().wait(0.05)) for _ in range(10)])
    woken.start()
    assert seen.get(timeout=5) == Tick("")
    assert 0.25 < time.monotonic() - began < 5
    woken.join()
    made.close()
