"""Small events and stamps for tests of the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from events.following import Changes
from events.schema import Data, Event, PrepareOrdered, Request, Requested, StepFailed
from events.stamp import Stamper
from events.store import Follower, LeaderGuard, Snapshot, Store

STAMPER = Stamper("coordinator/test")
DEADLINE_SECONDS = 15.0


def requested(container: str = "web") -> Requested:
    return Requested(
        request=Request(container=container, source="alpha", target="beta"), container_id=f"{container}-id"
    )


def append(
    store: Store,
    migration: str,
    previous: Event | None,
    data: Data | None = None,
    *,
    notify: tuple[str, ...] = (),
    guard: LeaderGuard | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Event:
    """Append ``data``, or the first thing that comes to mind."""
    if data is None:
        data = requested() if previous is None else PrepareOrdered()
    return store.append(
        migration,
        previous,
        data,
        cause=0 if previous is None else previous.seq,
        stamp=STAMPER.stamp(1),
        notify=notify,
        guard=guard,
        deadline_seconds=deadline_seconds,
    )


def failed(reason: str) -> StepFailed:
    return StepFailed(step="copy", reason=reason, retrying=True, attempt=1, advice="wait")


def history(store: Store, migration: str, length: int) -> list[Event]:
    """A migration with ``length`` events."""
    events: list[Event] = []
    for _ in range(length):
        events.append(append(store, migration, events[-1] if events else None))
    return events


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Return once ``condition`` holds; fail with ``what`` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.02)


class Mirror:
    """What a consumer of one prefix knows, kept from a follower; checks the follower's promise on the way."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.values: dict[str, bytes] = {}
        self.seen: list[tuple[str, int]] = []
        """(key, revision) of every change that was told."""
        self.revision = 0
        self.resyncs = 0

    def take_one(self, seconds: float = DEADLINE_SECONDS) -> Snapshot | Changes | None:
        item = self.follower.poll(seconds)
        if isinstance(item, Snapshot):
            assert item.revision >= self.revision
            assert item.resync == (self.revision > 0), "a second snapshot must be a resync"
            self.resyncs += item.resync
            self.values = {kv.key: kv.value for kv in item.items}
            self.revision = item.revision
        elif isinstance(item, Changes):
            assert item.revision > self.revision, "a change was repeated or came out of order"
            assert all(change.mod_revision == item.revision for change in item.changes)
            self.revision = item.revision
            for change in item.changes:
                self.seen.append((change.key, change.mod_revision))
                if change.value is None:
                    self.values.pop(change.key, None)
                else:
                    self.values[change.key] = change.value
        return item

    def take_until(self, condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"the follower did not tell in time; trouble: {self.follower.trouble}"
            self.take_one(0.2)
