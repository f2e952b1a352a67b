"""A follower that survives its watches: it keeps the cursor, and begins again wherever a watch ended.

A watch (``WatchSession``) may end at any moment, for any reason. The cursor of a prefix is the last revision
that was seen whole; the next watch starts right after it, so nothing is lost and nothing repeated, and no
watch ever starts ahead of a revision that was read (E16, E33). Where the store has forgotten the revisions
after the cursor, the prefix is read anew and handed out as a ``resync`` (E12). While the store is away
attempts are spaced out, so that waiting costs next to nothing; the spacing starts over once a watch has
answered, not once it was asked for.

Knows no etcd: what watches and reads is passed in, which is also how it is tested. One thread per follower.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import NamedTuple, Protocol

from events.errors import StoreUnavailableError, WrongClusterError
from events.following import Change, Changes, Follower, KeyValue, Snapshot, StopEvent

FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 2.0
"""An attempt costs a few milliseconds; a recovered store is found again within this time."""
QUEUED_ITEMS = 1000
"""What may wait for a slow consumer; beyond it the watch itself is made to wait."""
FULL_QUEUE_SECONDS = 0.05
"""How soon a full queue is looked at again."""
CLOSE_SECONDS = 2.0
SILENT_SECONDS = 4.0
"""A healthy watch tells within milliseconds what a read can show; one that is this late is begun anew at its cursor,
which loses nothing, repeats nothing, and costs one call."""


class Batch(NamedTuple):
    """What one message of a watch says about one prefix. An empty prefix is a mere sign of life."""

    prefix: str = ""
    changes: tuple[Change, ...] = ()
    revision: int = 0
    """Everything up to here has been told; 0 when the message says nothing about that."""
    compacted: bool = False
    """The watch cannot start where it was asked to: those revisions are forgotten."""


class WatchSession(Protocol):
    """Watches on one connection. Iterating raises StoreUnavailableError when they end."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """End the iteration, from any thread."""


class Watchable(Protocol):
    """What a ResumingFollower needs of a store."""

    def snapshot(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys under ``prefix`` and the revision that they show."""

    def revision(self) -> int:
        """The newest revision."""

    def open_watches(self, cursors: Mapping[str, int]) -> WatchSession:
        """Watch each prefix from the revision after its cursor. Raises StoreUnavailableError."""


class ResumingFollower(Follower):
    """See the module."""

    def __init__(
        self,
        store: Watchable,
        prefixes: list[str],
        *,
        stop: threading.Event | None,
        tick_seconds: float,
        contents: bool,
    ) -> None:
        super().__init__(stop, tick_seconds)
        self._store = store
        self._contents = contents
        self._unread = dict.fromkeys(prefixes, False)
        """Prefixes to read before watching; True where that is a resync."""
        self._cursors: dict[str, int] = {}
        # A look into an empty one costs a tenth of what a bounded queue asks for it, twice a second for ever.
        self._items: queue.SimpleQueue[Snapshot | Changes | None] = queue.SimpleQueue()
        self._wakes = isinstance(stop, StopEvent)
        """Whoever iterates waits for a whole tick, and is woken for everything else."""
        if isinstance(stop, StopEvent):
            self._poll_seconds = tick_seconds
            stop.wakes(self._wake)
        self._closing = threading.Event()
        self._session: WatchSession | None = None
        self._trouble = ""
        self._doubts: dict[str, tuple[int, float]] = {}
        """By prefix: a revision that a read has shown and the watch has not told, and since when (monotonic)."""
        self._silent = ""
        """Why the session is being ended by us, in words."""
        self._fatal: WrongClusterError | None = None
        self._thread = threading.Thread(target=self._run, name=f"follow {prefixes[0]}", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        return self._trouble

    def poll(self, timeout_seconds: float) -> Snapshot | Changes | None:
        try:
            item = self._items.get(block=timeout_seconds > 0, timeout=timeout_seconds or None)
        except queue.Empty:
            item = None
        if item is None and self._fatal is not None:
            raise self._fatal
        return item

    def expect(self, prefix: str, revision: int) -> None:
        told = self._cursors.get(prefix)
        session = self._session
        if session is None or told is None or told >= revision:
            self._doubts.pop(prefix, None)
            return
        now = time.monotonic()
        missed, since = self._doubts.setdefault(prefix, (revision, now))
        if told >= missed:
            self._doubts[prefix] = (revision, now)
        elif now - since >= SILENT_SECONDS:
            self._doubts.clear()
            self._silent = (
                f"a watch kept silent about revision {missed} of {prefix}, which a read has shown; watching anew"
            )
            session.close()

    def close(self) -> None:
        self.closed = True
        self._closing.set()
        session = self._session
        if session is not None:
            session.close()
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _wake(self) -> None:
        self._items.put(None)

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while not self._closing.is_set():
            try:
                self._read_unread()
                self._session = self._store.open_watches(self._cursors)
                for batch in self._session:
                    backoff = FIRST_BACKOFF_SECONDS
                    self._tell("")
                    self._take(batch)
                    if self._closing.is_set() or self._unread:
                        break
            except WrongClusterError as error:
                self._fatal = error
                self._trouble = str(error)
                self._wake()
                return
            except StoreUnavailableError as error:
                trouble, self._silent = self._silent or str(error), ""
                self._tell(trouble)
            finally:
                if self._session is not None:
                    self._session.close()
                    self._session = None
            if self._unread and not self._trouble:
                continue
            self._closing.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, no secret
            backoff = min(backoff * 2, LONGEST_BACKOFF_SECONDS)

    def _read_unread(self) -> None:
        for prefix, resync in list(self._unread.items()):
            items: list[KeyValue] = []
            if self._contents:
                items, revision = self._store.snapshot(prefix)
            else:
                revision = self._store.revision()
            self._cursors[prefix] = revision
            del self._unread[prefix]
            self._offer(Snapshot(prefix, items, revision, resync))

    def _take(self, batch: Batch) -> None:
        cursor = self._cursors.get(batch.prefix)
        if cursor is None:
            return
        if batch.compacted:
            self._unread[batch.prefix] = True
            return
        for revision, changes in groupby(batch.changes, key=lambda change: change.mod_revision):
            if revision > cursor:
                self._offer(Changes(batch.prefix, list(changes), revision))
                self._cursors[batch.prefix] = cursor = revision
        self._cursors[batch.prefix] = max(cursor, batch.revision)

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            if self._wakes:
                self._wake()

    def _offer(self, item: Snapshot | Changes) -> None:
        while self._items.qsize() >= QUEUED_ITEMS:
            if self._closing.wait(FULL_QUEUE_SECONDS):
                return
        self._items.put(item)
