"""What a subscription to the store yields, and the promise it makes (``Store.follow``).

A watch only wakes: whoever must decide something reads it again. Still the promise is exact, so that a
consumer may keep a mirror of a prefix from it. Stands between a concrete store and the services' loops; does
no I/O itself.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

TICK_SECONDS = 30.0
"""A watch may be silent although something happened; consumers look for themselves this often (B9)."""
STOP_POLL_SECONDS = 0.5
"""How soon an iterating consumer notices that it should stop, where ``stop`` is no StopEvent."""


class StopEvent(threading.Event):
    """An event that also wakes those who wait for something else. ``set`` may be called by a signal handler."""

    def __init__(self) -> None:
        super().__init__()
        self._wakes: list[Callable[[], None]] = []

    def wakes(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when the event is set. It must return at once, take no lock, and bear to be called at any time."""
        self._wakes.append(wake)
        if self.is_set():
            wake()

    def set(self) -> None:
        """Set it, and wake them."""
        super().set()
        for wake in self._wakes:
            wake()


class KeyValue(NamedTuple):
    """One stored key."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    lease: int = 0
    """Id of the lease that the key lives under; 0 means none."""


class Change(NamedTuple):
    """One key was put, or removed when ``value`` is None."""

    key: str
    value: bytes | None
    mod_revision: int


class Snapshot(NamedTuple):
    """The state of one followed prefix at ``revision``.

    The first item for each prefix. With ``resync`` the changes between are lost to compaction, and the
    consumer must take this state in place of what it knew: a key that is missing here is gone.
    """

    prefix: str
    items: list[KeyValue]
    revision: int
    resync: bool = False


class Changes(NamedTuple):
    """Everything that one revision changed under one followed prefix."""

    prefix: str
    changes: list[Change]
    revision: int


class Tick(NamedTuple):
    """Nothing came for a while, or ``trouble`` (empty when there is none) has changed."""

    trouble: str = ""


Item = Snapshot | Changes | Tick


class Follower(ABC):
    """A subscription to one or more prefixes: iterate over it, or ``poll`` it.

    For each prefix: first a Snapshot, then Changes, one per revision, complete, in order, none lost and none
    repeated, through restarts, outages and leader changes of the store; after a compaction past the cursor
    a Snapshot with ``resync``. Between two prefixes no order is promised. Iterating also gives a Tick after
    ``tick_seconds`` of silence and whenever ``trouble`` changes, and ends when ``stop`` is set or the
    follower is closed. Raises WrongClusterError; every other trouble is waited out. For one consumer thread.
    """

    def __init__(self, stop: threading.Event | None, tick_seconds: float) -> None:
        self._stop = stop if stop is not None else threading.Event()
        self._tick_seconds = tick_seconds
        self._poll_seconds = min(STOP_POLL_SECONDS, tick_seconds)
        """How long iterating may wait without looking for itself; a store that wakes for everything makes it longer."""
        self.closed = False

    @property
    @abstractmethod
    def trouble(self) -> str:
        """Why nothing can come at the moment, in words; empty when all is well."""

    @abstractmethod
    def poll(self, timeout_seconds: float) -> Snapshot | Changes | None:
        """The next item, or None when none came in time; sooner than that if there is something else to notice."""

    def expect(self, prefix: str, revision: int) -> None:
        """Say that a read has shown ``revision`` below ``prefix``, every time one does.

        A watch that goes on not telling it is alive and silent, which no keep-alive finds out (E13, E34). The default is
        for stores that cannot lose anything.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Let go of connection and threads. Harmless when repeated."""

    def __iter__(self) -> Iterator[Item]:
        quiet_since = time.monotonic()
        told = ""
        while not self._stop.is_set() and not self.closed:
            left = quiet_since + self._tick_seconds - time.monotonic()
            item = self.poll(max(0.0, min(self._poll_seconds, left)))
            if item is not None:
                yield item
            elif self.trouble != told:
                told = self.trouble
                yield Tick(told)
            elif time.monotonic() - quiet_since >= self._tick_seconds:
                yield Tick(told)
            else:
                continue
            quiet_since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
