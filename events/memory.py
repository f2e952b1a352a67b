"""A store in memory: a real one, held to the same contract as etcd, with faults that can be asked for.

For tests and the simulator. It has revisions, multi-version reads, leases on a clock that may be given,
compaction and followers. It draws no random number, starts no thread, and given a clock behaves the same in
every run. A retry does not sleep. Nothing here survives the process, so no service may use it in earnest.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from events.following import TICK_SECONDS, Change, Changes, Follower, KeyValue, Snapshot
from events.keyspace import Keyspace, key_bytes, key_text, prefix_end
from events.leases import LeaseGoneError
from events.store import CompactedError, Compare, Delete, NoAnswerError, Outcome, Page, Put, Store

Fault = Literal["applied_lost", "not_applied", "applied_late"]
"""What becomes of a transaction whose reply is lost: done; never done; done just before the next one."""


class _Version(NamedTuple):
    """A key from revision ``mod`` on; ``value`` None says that it was removed."""

    mod: int
    value: bytes | None
    create: int
    version: int
    lease: int
    item: KeyValue | None
    """As it is given to whoever reads it."""


class _Fault(NamedTuple):
    fault: Fault
    matching: str


class MemoryStore(Store):
    """See the module. Faults: ``fail_next``, ``down``, ``compact``."""

    def __init__(self, keys: Keyspace | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds; leases run out by it."""
        super().__init__(keys if keys is not None else Keyspace())
        self._clock = clock
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._revision = 1
        self._compacted = 0
        self._versions: dict[bytes, list[_Version]] = {}
        self._sorted: list[bytes] = []
        self._log: list[tuple[int, list[Change]]] = []
        self._leases: dict[int, tuple[int, float]] = {}
        self._last_lease = 0
        self._soonest_end = math.inf
        """No lease ends before this, so nobody has to look at them earlier."""
        self._faults: list[_Fault] = []
        self._late: list[tuple[Sequence[Compare], Sequence[Put | Delete]]] = []
        self._waiting = 0
        """Followers that want to be woken by the next change."""
        self._down = False
        self._closed = False

    # --- faults --------------------------------------------------------------------------------

    def fail_next(self, fault: Fault, *, times: int = 1, matching: str = "") -> None:
        """Lose the replies of the next ``times`` transactions that write a key containing ``matching``."""
        with self._changed:
            self._faults += [_Fault(fault, matching)] * times

    @property
    def down(self) -> bool:
        """While True every call goes unanswered, and followers see nothing. Leases keep running."""
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        with self._changed:
            self._down = value
            self._changed.notify_all()

    def compact(self, revision: int | None = None) -> None:
        """Forget what lies before ``revision`` (None: the newest), except the present value of each key."""
        with self._changed:
            self._compacted = min(self._revision if revision is None else revision, self._revision)
            del self._log[: bisect_right(self._log, self._compacted, key=lambda entry: entry[0])]
            for key in list(self._versions):
                versions = self._versions[key]
                del versions[: max(bisect_right(versions, self._compacted, key=lambda v: v.mod) - 1, 0)]
                if len(versions) == 1 and versions[0].value is None and versions[0].mod <= self._compacted:
                    del self._versions[key]
                    del self._sorted[bisect_left(self._sorted, key)]

    # --- primitives ----------------------------------------------------------------------------

    @property
    def cluster_id(self) -> int | None:
        return 1

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _now(self) -> float:
        return self._clock()

    def _pause(self, seconds: float) -> None:
        """Not at all: the clock may be one that only moves when the simulator says so."""

    def _page(self, start: bytes, end: bytes, limit: int, revision: int, keys_only: bool) -> Page:
        with self._lock:
            self._admit()
            if 0 < revision < self._compacted:
                raise CompactedError(f"revision {revision} is compacted")
            at = revision if revision else self._revision
            if start and limit > 0 and end == start + b"\0":  # one key
                item = self._item(start, at) if start in self._versions else None
                one = [] if item is None else [item._replace(value=b"") if keys_only else item]
                return Page(one, False, self._revision)
            first = bisect_left(self._sorted, start)
            last = len(self._sorted) if end == b"\0" else bisect_left(self._sorted, end, first)
            if limit >= last - first and at >= self._revision and not keys_only:  # all of it, as it is now
                versions = self._versions
                newest = [versions[key][-1].item for key in self._sorted[first:last]]
                return Page([item for item in newest if item is not None], False, self._revision)
            items: list[KeyValue] = []
            for key in self._sorted[first:last]:
                item = self._item(key, at)
                if item is None:
                    continue
                if len(items) == limit:
                    return Page(items, True, self._revision)
                items.append(item._replace(value=b"") if keys_only else item)
            return Page(items, False, self._revision)

    def _get_once(self, key: str) -> KeyValue | None:
        with self._lock:
            self._admit()
            newest = self._newest(key_bytes(key))
            return None if newest is None else newest.item

    def _transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        with self._lock:
            self._admit()
            if self._late:
                late, self._late = self._late, []
                for pending in late:
                    self._apply(*pending)
            fault = self._fault_for(operations) if self._faults else None
            if fault == "not_applied":
                raise NoAnswerError("the request was lost")
            if fault == "applied_late":
                self._late.append((compares, operations))
                raise NoAnswerError("the request is late")
            outcome = self._apply(compares, operations)
            if fault == "applied_lost":
                raise NoAnswerError("the reply was lost")
            return outcome

    def _grant(self, ttl_seconds: int) -> tuple[int, int]:
        with self._lock:
            self._admit()
            self._last_lease += 1
            ends = self._clock() + ttl_seconds
            self._leases[self._last_lease] = (ttl_seconds, ends)
            self._soonest_end = min(self._soonest_end, ends)
            return self._last_lease, ttl_seconds

    def _keep_alive(self, lease_id: int) -> int:
        with self._lock:
            self._admit()
            if lease_id not in self._leases:
                return 0
            ttl_seconds, _ = self._leases[lease_id]
            self._leases[lease_id] = (ttl_seconds, self._clock() + ttl_seconds)
            return ttl_seconds

    def _revoke(self, lease_id: int) -> None:
        with self._lock:
            self._admit()
            self._end_lease(lease_id)

    def follow(
        self,
        prefixes: str | Sequence[str],
        *,
        stop: threading.Event | None = None,
        tick_seconds: float = TICK_SECONDS,
        contents: bool = True,
    ) -> MemoryFollower:
        names = [prefixes] if isinstance(prefixes, str) else list(prefixes)
        return MemoryFollower(self, names, stop, tick_seconds, contents)

    # --- inside, with the lock held ------------------------------------------------------------

    def _admit(self) -> None:
        if self._clock() >= self._soonest_end:
            self._expire()
        if self._down or self._closed:
            raise NoAnswerError("the store is down")

    def _fault_for(self, operations: Sequence[Put | Delete]) -> Fault | None:
        for index, fault in enumerate(self._faults):
            if any(fault.matching in operation.key for operation in operations):
                del self._faults[index]
                return fault.fault
        return None

    def _newest(self, key: bytes) -> _Version | None:
        versions = self._versions.get(key)
        return None if versions is None or versions[-1].value is None else versions[-1]

    def _item(self, key: bytes, revision: int) -> KeyValue | None:
        versions = self._versions[key]
        found = versions[-1]
        if found.mod > revision:
            index = bisect_right(versions, revision, key=lambda version: version.mod)
            if index == 0:
                return None
            found = versions[index - 1]
        return found.item

    def _apply(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        for compare in compares:
            newest = self._newest(key_bytes(compare.key))
            if (0 if newest is None else getattr(newest, compare.what)) != compare.equals:
                return Outcome(False, self._revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                raise LeaseGoneError(f"the lease of {operation.key} is gone")
        keys = [operation.key for operation in operations]
        if len(set(keys)) != len(keys):
            raise ValueError("a transaction may write each key only once")
        changes = [change for operation in operations if (change := self._write(operation)) is not None]
        self._record(changes)
        return Outcome(True, self._revision, sum(change.value is None for change in changes))

    def _write(self, operation: Put | Delete) -> Change | None:
        key, revision = key_bytes(operation.key), self._revision + 1
        newest = self._newest(key)
        if isinstance(operation, Delete):
            if newest is None:
                return None
            self._versions[key].append(_Version(revision, None, 0, 0, 0, None))
            return Change(operation.key, None, revision)
        if key not in self._versions:
            self._versions[key] = []
            insort(self._sorted, key)
        create, version = (revision, 1) if newest is None else (newest.create, newest.version + 1)
        item = KeyValue(key_text(key), operation.value, revision, create, operation.lease)
        self._versions[key].append(_Version(revision, operation.value, create, version, operation.lease, item))
        return Change(operation.key, operation.value, revision)

    def _record(self, changes: list[Change]) -> None:
        if changes:
            self._revision += 1
            self._log.append((self._revision, sorted(changes)))
            if self._waiting:
                self._changed.notify_all()

    def _expire(self) -> None:
        now = self._clock()
        if now < self._soonest_end:
            return
        for lease_id in [lease for lease, (_, ends) in self._leases.items() if ends <= now]:
            self._end_lease(lease_id)
        self._soonest_end = min((ends for _, ends in self._leases.values()), default=math.inf)

    def _end_lease(self, lease_id: int) -> None:
        if self._leases.pop(lease_id, None) is None:
            return
        keys = [key for key in self._sorted if (kv := self._newest(key)) is not None and kv.lease == lease_id]
        changes = [change for key in keys if (change := self._write(Delete(key_text(key)))) is not None]
        self._record(changes)


class MemoryFollower(Follower):
    """Reads the store's own log. ``poll(0)`` never waits, which is how a simulator drives it."""

    def __init__(
        self,
        store: MemoryStore,
        prefixes: list[str],
        stop: threading.Event | None,
        tick_seconds: float,
        contents: bool,
    ) -> None:
        super().__init__(stop, tick_seconds)
        self._store = store
        self._contents = contents
        self._cursors: dict[str, int | None] = dict.fromkeys(prefixes)

    @property
    def trouble(self) -> str:
        return "the store is down" if self._store.down else ""

    def close(self) -> None:
        with self._store._changed:
            self.closed = True
            self._store._changed.notify_all()

    def poll(self, timeout_seconds: float) -> Snapshot | Changes | None:
        store = self._store
        give_up_at = time.monotonic() + timeout_seconds if timeout_seconds > 0 else 0.0
        with store._lock:
            while not self.closed and not store._closed:
                if store._clock() >= store._soonest_end:
                    store._expire()
                if not store._down:
                    for prefix, cursor in self._cursors.items():
                        item = self._next(prefix, cursor)
                        if item is not None:
                            return item
                remaining = give_up_at - time.monotonic() if timeout_seconds > 0 else 0.0
                if remaining <= 0:
                    return None
                # Woken at least this often: a lease may run out without anybody calling.
                store._waiting += 1
                try:
                    store._changed.wait(min(remaining, 0.05 if store._leases else remaining))
                finally:
                    store._waiting -= 1
            self.closed = True
            return None

    def _next(self, prefix: str, cursor: int | None) -> Snapshot | Changes | None:
        store = self._store
        if cursor is None or cursor < store._compacted:
            self._cursors[prefix] = store._revision
            items: list[KeyValue] = []
            if self._contents:
                start = key_bytes(prefix)
                items = store._page(start, prefix_end(start), len(store._sorted) + 1, 0, False).items
            return Snapshot(prefix, items, store._revision, resync=cursor is not None)
        log = store._log
        if not log or log[-1][0] <= cursor:
            return None
        for index in range(max(cursor + 1 - log[0][0], 0), len(log)):  # each revision that is kept has one entry
            revision, changes = log[index]
            mine = [change for change in changes if change.key.startswith(prefix)]
            if mine:
                self._cursors[prefix] = revision
                return Changes(prefix, mine, revision)
        self._cursors[prefix] = log[-1][0]
        return None
