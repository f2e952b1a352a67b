"""The store: what coordinator and agents share, as an interface and as the rules both stores obey.

``Store`` holds everything that does not depend on what lies beneath: how an event is appended, how a
history is read and checked, how a lost reply is settled. A concrete store (``events/etcd.py`` for etcd,
``events/memory.py`` for tests and the simulator) adds five primitives and a ``Follower``.

The flow: a loop follows a prefix (``follow``), is woken, reads the whole history (``read``), decides, and
appends (``append``) before it acts. Nothing here may ever turn trouble into absence: an unreachable store,
a refused permission or a history that was cut is an error, never "no migration". All methods may be called
from several threads. Calls block, but not for much longer than their deadline.

``events/following.py`` and ``events/leases.py`` hold the rest of the vocabulary; users import it from here.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from events import history
from events.errors import (
    CargoError,
    ChainError,
    ConflictError,
    LostLeadershipError,
    SchemaError,
    StoreUnavailableError,
)
from events.following import TICK_SECONDS, Change, Changes, Follower, Item, KeyValue, Snapshot, Tick
from events.keyspace import Keyspace, key_bytes, prefix_end, valid_migration_id
from events.leases import Election, LeaderGuard, Lease, LeaseGoneError, Registration
from events.schema import (
    Data,
    Event,
    Head,
    Stamp,
    decode_event,
    decode_head,
    encode_head,
    head_after,
    next_event,
)

if TYPE_CHECKING:
    from events.trust import Trust

__all__ = [
    "Change",
    "Changes",
    "CompactedError",
    "Compare",
    "Delete",
    "Election",
    "Follower",
    "HeadsResult",
    "Histories",
    "Item",
    "KeyValue",
    "LeaderGuard",
    "Lease",
    "LeaseGoneError",
    "NoAnswerError",
    "Outcome",
    "Page",
    "Put",
    "Registration",
    "RightsChangedError",
    "Snapshot",
    "Store",
    "Tick",
]

PAGE_KEYS = 500
"""Keys asked for at once. 500 events of the largest size are 32 MiB, half of what a connection accepts."""
MAX_TRANSACTION_OPERATIONS = 128
"""etcd's default ``--max-txn-ops``; a larger transaction is refused (etcd.io, op-guide/configuration)."""
MAX_REQUEST_BYTES = 1_500_000
"""Below etcd's default ``--max-request-bytes`` of 1,572,864, with room for framing (dev-guide/limit)."""
DELETE_BATCH = 100
"""Deletions in one transaction: under the limit above."""
DEADLINE_SECONDS = 10.0
"""An election in etcd takes about a second, a slow disk several; ten outlasts both."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
MOST_ATTEMPTS = 200
"""Bounds a retry loop even where the clock is a simulated one that stands still."""
_Result = TypeVar("_Result")


class NoAnswerError(StoreUnavailableError):
    """No usable answer came. A read may be repeated; a write may or may not have been applied."""


class RightsChangedError(NoAnswerError):
    """etcd's users or roles were changed between a call's coming and its turn: it was not applied."""


class CompactedError(CargoError):
    """The revision asked for is no longer kept. Read again from the present."""


class Page(NamedTuple):
    """Part of a range: ``more`` says that the range goes on after the last item."""

    items: list[KeyValue]
    more: bool
    revision: int


class Compare(NamedTuple):
    """One condition of a transaction. A key that does not exist has 0 for each of the three."""

    key: str
    what: Literal["version", "mod", "create"]
    equals: int


class Put(NamedTuple):
    """Write ``value`` to ``key`` within a transaction, under the lease of that id (0: none)."""

    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Remove ``key`` within a transaction; not an error when it is absent."""

    key: str


class Outcome(NamedTuple):
    """What became of a transaction."""

    succeeded: bool
    """All conditions held, and the operations were done at ``revision``."""
    revision: int
    deleted: int = 0


class HeadsResult(NamedTuple):
    """All migrations at one revision. ``broken`` says, per migration (or strange key), why it has no head."""

    heads: dict[str, Head]
    broken: dict[str, str]
    revision: int


class Histories(NamedTuple):
    """All migrations at one revision, with the events of those under way. ``broken`` says why others cannot be used."""

    heads: dict[str, Head]
    events: dict[str, list[Event]]
    broken: dict[str, str]


class Store(ABC):
    """The bus. ``keys`` is its keyspace. Every method may raise StoreUnavailableError."""

    def __init__(self, keys: Keyspace) -> None:
        self.keys = keys
        self.trust: Trust | None = None
        """In a secured fleet: who signs what is appended here, and who proves what is read. None trusts the bus."""

    # --- the primitives of a concrete store ------------------------------------------------------

    @abstractmethod
    def _page(self, start: bytes, end: bytes, limit: int, revision: int, keys_only: bool) -> Page:
        """Up to ``limit`` keys in [start, end), ascending, as of ``revision`` (0: now), linearizable.

        One attempt. Raises NoAnswerError, CompactedError, StoreUnavailableError (lasting), WrongClusterError.
        """

    @abstractmethod
    def _transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        """One attempt at: if all ``compares`` hold, do all ``operations``, at one revision.

        Raises NoAnswerError (it may have been applied), LeaseGoneError, StoreUnavailableError (lasting, not
        applied), WrongClusterError.
        """

    @abstractmethod
    def _grant(self, ttl_seconds: int) -> tuple[int, int]:
        """A new lease: its id, and the TTL in seconds that the store granted. One attempt."""

    @abstractmethod
    def _keep_alive(self, lease_id: int) -> int:
        """Refresh; the TTL in seconds, 0 when the lease is gone. One attempt."""

    @abstractmethod
    def _revoke(self, lease_id: int) -> None:
        """End the lease; harmless when it is gone. One attempt."""

    @abstractmethod
    def follow(
        self,
        prefixes: str | Sequence[str],
        *,
        stop: threading.Event | None = None,
        tick_seconds: float = TICK_SECONDS,
        contents: bool = True,
    ) -> Follower:
        """Subscribe to ``prefixes``; see Follower. Without ``contents`` a Snapshot's items stay empty."""

    @property
    @abstractmethod
    def cluster_id(self) -> int | None:
        """The cluster that answered first, which every later answer must come from; None before that."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections, and the followers. Harmless when repeated."""

    def _now(self) -> float:
        """Monotonic seconds, for deadlines."""
        return time.monotonic()

    def _pause(self, seconds: float) -> None:
        """Wait between two attempts."""
        time.sleep(seconds)

    # --- histories -------------------------------------------------------------------------------

    def read(self, migration: str, after_seq: int = 0, *, after: Event | None = None) -> list[Event]:
        """The events of ``migration`` that follow number ``after_seq``, or ``after``, oldest first.

        One linearizable view. The chain is checked from the event before on, and its end against the head,
        so a missing tail is noticed too. Empty means that the migration does not exist, or has nothing newer.
        Raises SchemaError (an event this version does not understand), ChainError (edited, cut or wiped), and in a
        secured fleet UntrustedError (an author who cannot be proven).
        """
        first = after.seq if after is not None else after_seq
        start, head_key = self.keys.event(migration, max(first, 1)), self.keys.head(migration)
        items, _ = self._collect(key_bytes(start), key_bytes(head_key) + b"\0")
        return self._checked(migration, items, first, after)

    def _checked(self, migration: str, items: list[KeyValue], first: int, after: Event | None) -> list[Event]:
        """The events among a migration's ``items``, which are all its keys from event ``first`` on."""
        head_key = self.keys.head(migration)
        head: Head | None = None
        events: list[Event] = []
        for item in items:
            if item.key == head_key:
                head = decode_head(item.value)
                continue
            place = self.keys.parse(item.key)
            if place is not None and place.kind == "event":
                event = decode_event(item.value)
                if event.seq != int(place.parts[1]):
                    raise ChainError(f"migration {migration}: the key of event {place.parts[1]} holds another event")
                events.append(event)
            elif item.key.startswith(self.keys.events(migration)):
                raise ChainError(f"migration {migration}: the key {item.key!r} is no event; remove it by hand")
        fresh = history.continued(migration, events, head, first, after)
        if self.trust is not None:
            self.trust.check(migration, fresh, lambda: self._first(migration))
        return fresh

    def _first(self, migration: str) -> Event:
        """How the history began. Raises ChainError."""
        stored = self._get_once(self.keys.event(migration, 1))
        if stored is None:
            raise ChainError(f"migration {migration}: event 1, which was there, is missing")
        return decode_event(stored.value)

    def head(self, migration: str) -> Head | None:
        """The head of ``migration``, None when it does not exist. Raises SchemaError."""
        stored = self.get(self.keys.head(migration))
        return None if stored is None else decode_head(stored.value)

    def heads(self) -> HeadsResult:
        """The heads of all migrations, at one revision, without reading their events."""
        return self._reading(self._heads)

    def histories(self) -> Histories:
        """All heads, and the whole history of every migration that has not ended, at one revision.

        In a few large reads, where ``heads`` and a ``read`` each would take two small ones for every migration. A
        history that cannot be used is in ``broken``, with the same words that ``read`` raises.
        """
        return self._reading(self._histories)

    def append(
        self,
        migration: str,
        previous: Event | None,
        data: Data,
        *,
        cause: int,
        stamp: Stamp,
        notify: Iterable[str] = (),
        guard: LeaderGuard | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> Event:
        """Append ``data`` right after ``previous`` (None: as the first event) and return the event.

        One transaction: the event, the head, and a pointer in the inbox of every host in ``notify``. A lost
        reply is settled by reading the event back. Raises ConflictError (somebody else was first),
        LostLeadershipError (``guard`` no longer holds), ChainError (the history that ``previous`` came from
        was cut or wiped), SchemaError (too large; nothing was written), StoreUnavailableError (the text says
        when the outcome is unknown).
        """
        sign = None if self.trust is None else partial(self.trust.sign, migration, stamp.by)
        event = next_event(previous, data, cause=cause, stamp=stamp, sign=sign)
        head_key = self.keys.head(migration)
        try:
            stored = self._settled(lambda: self._get_once(head_key), lambda: None, deadline_seconds)
        except NoAnswerError as error:
            raise StoreUnavailableError(f"{event.type} of migration {migration} was not recorded: {error}") from error
        head = None if stored is None else decode_head(stored.value)
        history.check_continues(migration, previous, head)
        event_key = self.keys.event(migration, event.seq)
        compares = [
            Compare(event_key, "version", 0),
            Compare(head_key, "mod", 0 if stored is None else stored.mod_revision),
        ]
        if guard is not None:
            compares.append(Compare(guard.key, "create", guard.create_revision))
        pointer = b'{"seq":%d}' % event.seq
        operations = [Put(event_key, event.raw), Put(head_key, encode_head(head_after(head, event)))]
        operations += [Put(self.keys.inbox_pointer(host, migration), pointer) for host in sorted(set(notify))]
        _check_size(compares, operations)

        def attempt() -> Event:
            if self._transact(compares, operations).succeeded:
                return event
            return self._settle(migration, event, guard)

        def read_back() -> Event | None:
            newest = self._get_once(event_key)
            return None if newest is None else self._settle(migration, event, guard)

        try:
            return self._settled(attempt, read_back, deadline_seconds)
        except NoAnswerError as error:
            raise StoreUnavailableError(
                f"whether event {event.seq} ({event.type}) of migration {migration} was recorded is unknown: "
                f"{error}. Nothing that follows from it may be done; read the history again "
                "once the store answers"
            ) from error

    def _settle(self, migration: str, event: Event, guard: LeaderGuard | None) -> Event:
        """Why the transaction's conditions failed: our own earlier attempt, lost leadership or a rival."""
        stored = self._get_once(self.keys.event(migration, event.seq))
        if stored is not None and stored.value == event.raw:
            return event
        if guard is not None:
            leader = self._get_once(guard.key)
            if leader is None or leader.create_revision != guard.create_revision:
                raise LostLeadershipError(
                    f"event {event.seq} ({event.type}) of migration {migration} was not recorded: "
                    "another coordinator leads now"
                )
        raise ConflictError(
            f"event {event.seq} ({event.type}) of migration {migration} was not recorded: somebody else appended first"
        )

    def _heads(self) -> HeadsResult:
        """Hop from head to head: each request gives one head and the first key of the next migration."""
        heads: dict[str, Head] = {}
        broken: dict[str, str] = {}
        root = self.keys.migrations
        end = prefix_end(key_bytes(root))
        page = self._page(key_bytes(root), end, 1, 0, True)
        revision = page.revision
        while page.items:
            key = page.items[0].key
            migration = key[len(root) :].partition("/")[0]
            if not valid_migration_id(migration) or key == root + migration:
                broken[key] = "this key belongs to no migration; remove it by hand"
                page = self._page(key_bytes(key) + b"\0", end, 1, revision, True)
                continue
            head_key = self.keys.head(migration)
            page = self._page(key_bytes(head_key), end, 2, revision, False)
            if page.items and page.items[0].key == head_key:
                try:
                    heads[migration] = decode_head(page.items[0].value)
                except SchemaError as error:
                    broken[migration] = str(error)
            else:
                broken[migration] = "its head is missing although other keys of it exist: the history was cut"
            own = self.keys.migration(migration)
            others = [item for item in page.items if not item.key.startswith(own)]
            if others or not page.items or len(page.items) == 1:
                page = Page(others[:1], False, revision)
            else:
                page = self._page(prefix_end(key_bytes(own)), end, 1, revision, True)
        return HeadsResult(heads, broken, revision)

    def _histories(self) -> Histories:
        """Page by page: what is kept is one migration's keys, and the events of those under way."""
        found = Histories({}, {}, {})
        root = self.keys.migrations
        own: list[KeyValue] = []
        name = ""
        for item in self._pages(key_bytes(root), prefix_end(key_bytes(root))):
            migration = item.key[len(root) :].partition("/")[0]
            if not valid_migration_id(migration) or item.key == root + migration:
                found.broken[item.key] = "this key belongs to no migration; remove it by hand"
                continue
            if migration != name:
                self._sort_in(found, name, own)
                name, own = migration, []
            own.append(item)
        self._sort_in(found, name, own)
        return found

    def _sort_in(self, found: Histories, migration: str, items: list[KeyValue]) -> None:
        """Add one migration, given all of its keys, to ``found``."""
        if not items:
            return
        stored = [item for item in items if item.key == self.keys.head(migration)]
        if not stored:
            found.broken[migration] = "its head is missing although other keys of it exist: the history was cut"
            return
        try:
            head = found.heads[migration] = decode_head(stored[0].value)
            if not head.terminal:
                found.events[migration] = self._checked(migration, items, 0, None)
        except SchemaError as error:
            found.broken[migration] = str(error)

    def _pages(self, start: bytes, end: bytes) -> Iterator[KeyValue]:
        """Every key of a range, at the revision of the first page. One attempt."""
        page = self._page(start, end, PAGE_KEYS, 0, False)
        revision = page.revision
        yield from page.items
        while page.more:
            page = self._page(key_bytes(page.items[-1].key) + b"\0", end, PAGE_KEYS, revision, False)
            yield from page.items

    # --- plain keys ------------------------------------------------------------------------------

    def get(self, key: str) -> KeyValue | None:
        """The stored key, or None when it does not exist."""
        return self._reading(lambda: self._get_once(key))

    def range(self, prefix: str) -> list[KeyValue]:
        """Every key under ``prefix``, ascending, all as of one revision."""
        return self.snapshot(prefix)[0]

    def snapshot(self, prefix: str) -> tuple[list[KeyValue], int]:
        """As ``range``, with the revision that it shows."""
        start = key_bytes(prefix)
        return self._collect(start, prefix_end(start))

    def look(self, *places: str) -> list[list[KeyValue]]:
        """What is there now, place by place: below a prefix if it ends with a slash, else that one key.

        For those who look around again and again: what it costs is one call, where the store can do that.
        """
        return [self.range(place) if place.endswith("/") else self._present(place) for place in places]

    def _present(self, key: str) -> list[KeyValue]:
        stored = self.get(key)
        return [] if stored is None else [stored]

    def revision(self) -> int:
        """The store's newest revision."""
        nowhere = key_bytes(self.keys.root)
        return self._reading(lambda: self._page(nowhere, nowhere + b"\0", 1, 0, True)).revision

    def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        """Write ``key``; the revision it got. Raises LeaseGoneError."""
        return self.transact((), (Put(key, value, lease.id if lease else 0),)).revision

    def put_if_absent(self, key: str, value: bytes, lease: Lease | None = None) -> bool:
        """Write ``key`` unless it exists; whether it was written. Raises LeaseGoneError."""
        try:
            self.compare_and_put(key, value, 0, lease)
        except ConflictError:
            return False
        return True

    def compare_and_put(self, key: str, value: bytes, expected_mod_revision: int, lease: Lease | None = None) -> int:
        """Write ``key`` if it still is as of ``expected_mod_revision`` (0: absent); the revision it got.

        Raises ConflictError when it is not, LeaseGoneError. After a lost reply, the same value under the same
        lease counts as ours.
        """
        compares = (Compare(key, "mod", expected_mod_revision),)
        operations = (Put(key, value, lease.id if lease else 0),)
        _check_size(compares, operations)

        uncertain = False

        def attempt() -> int:
            outcome = self._transact(compares, operations)
            if outcome.succeeded:
                return outcome.revision
            found = read_back() if uncertain else None
            if found is None:
                raise ConflictError(f"{key} was changed by somebody else")
            return found

        def read_back() -> int | None:
            nonlocal uncertain
            uncertain = True
            stored = self._get_once(key)
            found = 0 if stored is None else stored.mod_revision
            if found == expected_mod_revision:
                return None
            if stored is not None and (stored.value, stored.lease) == (value, operations[0].lease):
                return stored.mod_revision
            raise ConflictError(f"{key} was changed by somebody else")

        return self._settled(attempt, read_back, DEADLINE_SECONDS)

    def delete(self, key: str, expected_mod_revision: int | None = None) -> bool:
        """Remove ``key``, if given only as of that revision; whether it went.

        After a lost reply it may say False although it did.
        """
        compares = () if expected_mod_revision is None else (Compare(key, "mod", expected_mod_revision),)
        outcome = self.transact(compares, (Delete(key),))
        return outcome.succeeded and outcome.deleted > 0

    def delete_prefix(self, prefix: str) -> int:
        """Remove every key under ``prefix``, which must lie in the keyspace, in batches; how many went."""
        if not prefix.startswith(self.keys.root):
            raise ValueError(f"{prefix!r} does not lie under {self.keys.root!r}; nothing was removed")
        start, deleted = key_bytes(prefix), 0
        while True:
            items = self._reading(lambda: self._page(start, prefix_end(start), DELETE_BATCH, 0, True)).items
            if not items:
                return deleted
            deleted += self.transact((), [Delete(item.key) for item in items]).deleted

    def transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        """Do ``operations`` if all ``compares`` hold. Repeated on a lost reply, so they must bear repetition.

        Raises SchemaError when it is larger than the store takes, LeaseGoneError.
        """
        _check_size(compares, operations)
        return self._settled(lambda: self._transact(compares, operations), lambda: None, DEADLINE_SECONDS)

    # --- leases ----------------------------------------------------------------------------------

    def lease(self, ttl_seconds: int) -> Lease:
        """A new lease. The store may grant a longer TTL than asked for (etcd: at least 2 s)."""
        lease_id, granted = self._reading(lambda: self._grant(ttl_seconds))
        return Lease(self, lease_id, granted)

    def keep_alive(self, lease_id: int) -> int:
        """Refresh a lease; the TTL in seconds that it has now, 0 when it is gone."""
        return self._keep_alive(lease_id)

    def revoke(self, lease_id: int) -> None:
        """End a lease and remove its keys; harmless when it is gone."""
        self._revoke(lease_id)

    # --- repetition ------------------------------------------------------------------------------

    def _get_once(self, key: str) -> KeyValue | None:
        raw = key_bytes(key)
        items = self._page(raw, raw + b"\0", 1, 0, False).items
        return items[0] if items else None

    def _collect(self, start: bytes, end: bytes, keys_only: bool = False) -> tuple[list[KeyValue], int]:
        """All pages of a range, at the revision of the first page."""

        def collect() -> tuple[list[KeyValue], int]:
            page = self._page(start, end, PAGE_KEYS, 0, keys_only)
            items, revision = page.items, page.revision
            while page.more:
                page = self._page(key_bytes(items[-1].key) + b"\0", end, PAGE_KEYS, revision, keys_only)
                items = items + page.items
            return items, revision

        return self._reading(collect)

    def _reading(self, read: Callable[[], _Result]) -> _Result:
        """Repeat ``read``, which changes nothing that matters, until it is answered or time is up."""
        return self._settled(read, lambda: None, DEADLINE_SECONDS)

    def _settled(
        self, attempt: Callable[[], _Result], read_back: Callable[[], _Result | None], deadline_seconds: float
    ) -> _Result:
        """The result of ``attempt``, or of ``read_back`` when an answer was lost and turns out to be there.

        Raises the last NoAnswerError once ``deadline_seconds`` have passed.
        """
        give_up_at = self._now() + deadline_seconds
        pause = FIRST_PAUSE_SECONDS
        for remaining in reversed(range(MOST_ATTEMPTS)):
            try:
                return attempt()
            except CompactedError as compacted:
                trouble: Exception = compacted
            except NoAnswerError as unanswered:
                trouble = unanswered
                try:
                    found = read_back()
                except NoAnswerError:
                    found = None
                if found is not None:
                    return found
            if remaining == 0 or self._now() + pause >= give_up_at:
                if isinstance(trouble, NoAnswerError):
                    raise trouble
                raise NoAnswerError(f"the store compacts faster than it can be read: {trouble}") from trouble
            self._pause(pause)
            if not isinstance(trouble, RightsChangedError):  # who waits longer is overtaken by the next change
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        raise AssertionError("the loop above returns or raises")


def _check_size(compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> None:
    """Raise SchemaError for what etcd would refuse, before it is sent."""
    count = max(len(compares), len(operations))
    if count > MAX_TRANSACTION_OPERATIONS:
        raise SchemaError(f"a transaction of {count} operations is over the limit of {MAX_TRANSACTION_OPERATIONS}")
    size = sum(len(item.key) for item in compares)
    size += sum(len(item.key) + (len(item.value) if isinstance(item, Put) else 0) for item in operations)
    if size > MAX_REQUEST_BYTES:
        raise SchemaError(f"a request of {size} bytes is over the limit of {MAX_REQUEST_BYTES}; nothing was written")
