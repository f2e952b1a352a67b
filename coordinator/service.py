"""The coordinator's loop: watch requests, controls and histories; append orders.

    while leading:
        for item in follower:                        # watches only wake
            note which requests, controls and migrations it concerns
            for each: read, fold, decide, append     # guarded by the leadership key

It never calls an agent, never decides on time or on a lease, and never acts on a history that it
cannot fold: that one is reported and left alone while all others go on. One thread does all the work;
several coordinators may run, one leads, and an append by one that lost its leadership fails.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field

import structlog

from coordinator import admission, controls, lifecycle
from coordinator.access import Access
from coordinator.fault_watch import FaultWatch
from coordinator.lifecycle import Lifecycle
from coordinator.recording import ARCHIVABLE_PHASES
from events.errors import (
    ConflictError,
    LostLeadershipError,
    SchemaError,
    StoreUnavailableError,
    TransientError,
)
from events.failpoints import Failpoints
from events.keyspace import Place, safe_id_for, valid_migration_id
from events.leases import Election, LeaderGuard
from events.records import ContainerRecord, HostRecord, decode_container, decode_host
from events.schema import TYPE_OF, Data, Event, Head, Rejected, Requested
from events.stamp import Stamper
from events.store import Changes, Follower, Item, Snapshot, Store, Tick

LOOK_AROUND_SECONDS = 5.0
"""A watch may be silent although something happened (B9), so everything under way is looked at this often."""
LOOK_AROUND_SHARE = 20.0
"""With so much under way that a look takes long, it is taken at most for this part of the time: 1 in 20."""
LEADER_TTL_SECONDS = 5
"""How long others wait for a leader that died without a word."""
INVENTORY_GRACE_SECONDS = 2.0
"""A request may arrive a moment before the agent has told of a container that was just started: one that
fails only for what an inventory says is looked at again until this has passed."""
GRACE_POLL_SECONDS = 0.2
TICK_SECONDS = 15.0
MAX_CONFLICTS = 100
"""An append that loses this often in a row to other authors is not contention but a defect."""


@dataclass
class Tracked:
    """One migration under way."""

    state: Lifecycle = field(default_factory=Lifecycle)
    last: Event | None = None
    digests: list[str] = field(default_factory=list)
    """Of every event folded so far: a history that is edited behind our back is noticed."""
    sentence: str = ""

    def extend(self, events: list[Event]) -> None:
        """Fold further events. Raises SchemaError."""
        self.state = lifecycle.fold(events, self.state)
        self.digests += [event.digest for event in events]
        self.last = events[-1] if events else self.last


class Service:
    """One coordinator process."""

    def __init__(
        self,
        store: Store,
        name: str,
        failpoints: Failpoints,
        log: structlog.stdlib.BoundLogger,
        access: Access | None = None,
    ) -> None:
        """``access`` keeps the hosts' permissions in a secured fleet."""
        self._store = store
        self._access = access
        self._keys = store.keys
        self._name = name
        self._stamper = Stamper(f"coordinator/{name}")
        self._failpoints = failpoints
        self._log = log
        self._guard: LeaderGuard | None = None
        self._tracked: dict[str, Tracked] = {}
        self._heads: dict[str, Head] = {}
        self._heads_known = False
        """They have been read since this leadership began; from then on nobody else admits anything."""
        self._halted: dict[str, str] = {}
        self._look_around_at = 0.0
        self._waiting: dict[str, tuple[bytes, float]] = {}
        """Requests in their inventory grace: raw value and deadline, by id."""

    def run(self, stop: threading.Event) -> None:
        """Campaign and lead, again and again, until ``stop``. Raises WrongClusterError."""
        faults = FaultWatch(self._store, self._failpoints, self._log)
        faults.start()
        try:
            self._campaign_and_lead(stop)
        finally:
            faults.close()
        self._log.info("stopped")

    def _campaign_and_lead(self, stop: threading.Event) -> None:
        while not stop.is_set():
            election = Election(self._store, self._keys.leader, self._name, LEADER_TTL_SECONDS)
            self._log.info("campaigning for leadership")
            guard = election.campaign(stop)
            if guard is None:
                break
            self._guard = guard
            self._log.info("leading", epoch=guard.create_revision)
            try:
                self._lead(election, stop)
            except LostLeadershipError as error:
                self._log.warning("leadership lost", reason=str(error))
            finally:
                self._guard = None
                election.resign()

    # --- leading -------------------------------------------------------------------------------

    def _begin(self) -> None:
        """A leadership begins: others may have led since whatever is still known here."""
        self._tracked.clear()
        self._halted.clear()
        self._waiting.clear()
        self._heads_known = False
        self._look_around_at = 0.0
        if self._access is not None:
            self._access.forget()

    def _lead(self, election: Election, stop: threading.Event) -> None:
        self._begin()
        prefixes = (self._keys.migrations, self._keys.requests, self._keys.controls)
        with self._store.follow(prefixes, stop=stop, tick_seconds=TICK_SECONDS, contents=False) as follower:
            while not stop.is_set():
                if election.guard is None:
                    raise LostLeadershipError("the leadership key is not ours any more")
                item = self._next(follower)
                try:
                    self._take(item, follower)
                    self._look_again()
                except (StoreUnavailableError, TransientError) as error:
                    # The store does not answer, or a failpoint asked for an error: look at everything again.
                    self._log.warning("holding", reason=str(error))
                    stop.wait(1.0)
                    self._resync_when_possible(stop)

    def _next(self, follower: Follower) -> Item:
        item = follower.poll(GRACE_POLL_SECONDS if self._waiting else 1.0)
        return item if item is not None else Tick(follower.trouble)

    def _take(self, item: Item, follower: Follower | None = None) -> None:
        match item:
            case Snapshot(prefix=prefix):
                self._resync(prefix)
            case Changes(changes=changes):
                for change in changes:
                    self._changed(change.key, change.value)
            case Tick():
                self._look_around(follower)

    def _look_around(self, follower: Follower | None = None) -> None:
        """Now and then: what a watch should have told, had it not been lost without a word."""
        if time.monotonic() < self._look_around_at:
            return
        began = time.monotonic()
        for migration in list(self._tracked):
            self._advance(migration)
        for prefix in (self._keys.requests, self._keys.controls):
            revision = self._resync(prefix)
            if follower is not None:
                follower.expect(prefix, revision)
        self._take_back_access()
        ended = time.monotonic()
        self._look_around_at = ended + max(LOOK_AROUND_SECONDS, LOOK_AROUND_SHARE * (ended - began))

    def _take_back_access(self) -> None:
        if self._access is None or not self._heads_known:
            return
        for words in self._access.sweep(
            self._heads, self._halted, lambda: {item.key for item in self._store.range(self._keys.inboxes)}
        ):
            self._log.info("access taken back", what=words)

    def _changed(self, key: str, value: bytes | None) -> None:
        if key.startswith(self._keys.requests):
            if value is not None:
                request_id = key[len(self._keys.requests) :]
                if request_id in self._heads:
                    self._log.info("asked again: there is a migration of that name already", migration=request_id)
                self._request(request_id, value)
            return
        place = self._keys.parse(key)
        if place is None:
            return
        if place.kind == "control" and value is not None:
            self._control(place.parts[0], key)
        elif place.kind in ("head", "event"):
            self._history_changed(place, value)

    def _history_changed(self, place: Place, value: bytes | None) -> None:
        migration = place.parts[0]
        tracked = self._tracked.get(migration)
        if value is None:
            self._keys_removed(migration)
        elif place.kind == "event":
            number = int(place.parts[1])
            if tracked is None or number > len(tracked.digests):
                self._advance(migration)
            elif hashlib.sha256(value).hexdigest() != tracked.digests[number - 1]:
                self._halt(migration, f"its event {number} was changed after it had been read")

    def _keys_removed(self, migration: str) -> None:
        """A finished history that is gone as a whole was archived; any other loss is an alarm, never an absence."""
        head = self._heads.get(migration)
        archivable = migration not in self._tracked if head is None else head.phase in ARCHIVABLE_PHASES
        if not archivable or self._store.range(self._keys.migration(migration)):
            self._halt(migration, "keys of its history were deleted")
            return
        if self._heads.pop(migration, None) is not None:
            self._log.info("a finished history was archived", migration=migration)
        self._halted.pop(migration, None)
        self._tracked.pop(migration, None)

    def _resync_when_possible(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                for prefix in (self._keys.migrations, self._keys.requests, self._keys.controls):
                    self._resync(prefix)
            except (StoreUnavailableError, TransientError):
                stop.wait(1.0)
            else:
                return

    def _resync(self, prefix: str) -> int:
        """Look at everything below ``prefix``. The follower's watch begins at the revision of its snapshot, so
        what is read here after it came cannot miss anything that the watch does not tell.

        Returns the newest revision among requests or controls; 0 for histories, which are known one by one.
        """
        if prefix == self._keys.migrations:
            self._read_all()
            return 0
        found = self._store.range(prefix)
        for item in found:
            if prefix == self._keys.requests:
                self._request(item.key[len(prefix) :], item.value)
            else:
                self._control(item.key[len(prefix) :], item.key)
        return max((item.mod_revision for item in found), default=0)

    def _read_all(self) -> None:
        """Fold every history that is under way, and go on with each."""
        began = time.monotonic()
        found = self._store.histories()
        for where, why in found.broken.items():
            self._halt(where, why)
        self._heads, self._heads_known = found.heads, True
        for migration, events in found.events.items():
            tracked = self._tracked.get(migration)
            if tracked is None and migration not in self._halted:
                tracked = Tracked()
                try:
                    tracked.extend(events)
                except SchemaError as error:
                    self._halt(migration, str(error))
                    continue
                self._tracked[migration] = tracked
            newest = tracked.last if tracked is not None else None
            self._advance(migration, read=newest is None or newest.digest != found.heads[migration].digest)
        seconds = round(time.monotonic() - began, 3)
        self._log.info("caught up", migrations=len(found.heads), under_way=len(found.events), seconds=seconds)

    # --- requests ------------------------------------------------------------------------------

    def _request(self, request_id: str, raw: bytes) -> None:
        legal = valid_migration_id(request_id)
        migration = request_id if legal else safe_id_for(request_id)
        if not self._heads_known:  # a watch promises no order between requests and migrations (E19)
            self._resync(self._keys.migrations)
        if migration in self._heads or migration in self._waiting:
            return
        if self._store.head(migration) is not None:
            return  # the same request, put again: there is one migration
        answer = self._examine(request_id, raw)
        if isinstance(answer, Rejected) and admission.understand(request_id, raw)[0] is not None:
            self._waiting[migration] = (raw, time.monotonic() + INVENTORY_GRACE_SECONDS)
            return
        self._admit(migration, answer)

    def _look_again(self) -> None:
        for migration, (raw, deadline) in list(self._waiting.items()):
            answer = self._examine(migration, raw)
            if isinstance(answer, Rejected) and time.monotonic() < deadline:
                continue
            del self._waiting[migration]
            self._admit(migration, answer)

    def _examine(self, request_id: str, raw: bytes) -> Data:
        request, _ = admission.understand(request_id, raw)
        if request is None:
            return admission.examine(request_id, raw, admission.World())
        unreadable: list[str] = []
        hosts = self._hosts()
        containers = {
            host: self._containers(host, unreadable) for host in (request.source, request.target) if host in hosts
        }
        active = {
            head.container_id: other
            for other, head in self._heads.items()
            if head.container_id and not head.terminal and other != request_id
        }
        found = containers.get(request.source, {}).get(request.container)
        federated_by = self._federated_by(found.migration) if found is not None else ""
        world = admission.World(hosts, containers, active, federated_by, tuple(unreadable))
        return admission.examine(request_id, raw, world)

    def _federated_by(self, migration: str) -> str:
        """``migration``, if it still supervises the container that it has made."""
        head = self._store.head(migration) if valid_migration_id(migration) else None
        return migration if head is not None and head.phase in ("completed", "finalise") else ""

    def _hosts(self) -> dict[str, HostRecord]:
        hosts: dict[str, HostRecord] = {}
        for item in self._store.range(self._keys.hosts):
            place = self._keys.parse(item.key)
            if place is None:
                continue
            try:
                hosts[place.parts[0]] = decode_host(item.value)
            except SchemaError as error:
                self._log.warning("a host's record cannot be read", host=place.parts[0], reason=str(error))
        return hosts

    def _containers(self, host: str, unreadable: list[str]) -> dict[str, ContainerRecord]:
        found: dict[str, ContainerRecord] = {}
        for item in self._store.range(self._keys.inventory(host)):
            place = self._keys.parse(item.key)
            if place is None:
                continue
            try:
                found[place.parts[1]] = decode_container(item.value)
            except SchemaError as error:
                unreadable.append(f"what {host} says of its container {place.parts[1]!r} cannot be read: {error}")
        return found

    def _admit(self, migration: str, answer: Data) -> None:
        log = self._log.bind(migration=migration)
        try:
            event = self._append(migration, Tracked(), answer, cause=0)
        except ConflictError as error:
            if isinstance(error, LostLeadershipError):
                raise
            log.info("the request was admitted already")
            return
        except SchemaError as error:
            log.error("the request cannot be answered", reason=str(error))
            return
        if isinstance(answer, Rejected):
            log.info("rejected", seq=event.seq, reasons=list(answer.reasons))
            return
        assert isinstance(answer, Requested)
        log.info("admitted", seq=event.seq, container=answer.request.container)
        self._advance(migration)

    # --- controls ------------------------------------------------------------------------------

    def _control(self, migration: str, key: str) -> None:
        stored = self._store.get(key)
        if stored is None:
            return
        control = controls.parse(stored.value)
        log = self._log.bind(migration=migration, control=control.name)
        if valid_migration_id(migration) and migration not in self._halted:
            for _ in range(MAX_CONFLICTS):
                tracked = self._read(migration)
                if tracked is None or tracked.last is None:
                    log.warning("a control for a migration that does not exist; ignored")
                    break
                seen = bool(control.target_off) and self._target_seen(migration, tracked, stored.mod_revision)
                data = controls.answer(control, tracked.state, target_seen=seen)
                if data is None:
                    break
                try:
                    event = self._append(migration, tracked, data, cause=tracked.state.seq)
                except LostLeadershipError:
                    raise
                except ConflictError:
                    continue
                except SchemaError as error:
                    log.error("the control cannot be answered", reason=str(error))
                    break
                log.info("control answered", answer=event.type, seq=event.seq)
                if event.type in ("control_refused", "resumed"):
                    break  # answered; the others are asked again, because their answer may take a second event
        self._store.delete(key, stored.mod_revision)
        if valid_migration_id(migration):
            self._advance(migration)

    def _target_seen(self, migration: str, tracked: Tracked, since: int) -> bool:
        """Whether the target's agent has registered, or written into the history, after the revision ``since``."""
        request = tracked.state.request
        if request is None:
            return False
        written = [event.seq for event in self._store.read(migration) if event.by == f"hostd/{request.target}"]
        keys = [self._keys.host(request.target), *(self._keys.event(migration, seq) for seq in written[-1:])]
        return any((found := self._store.get(key)) is not None and found.mod_revision > since for key in keys)

    # --- migrations ----------------------------------------------------------------------------

    def _advance(self, migration: str, *, read: bool = True) -> None:
        """Give whatever orders the history calls for now. Without ``read``: what is tracked has just been read.

        An append that follows from what is no longer the end of the history conflicts, and everything is read then.
        """
        if migration in self._halted:
            return
        for attempt in range(MAX_CONFLICTS):
            tracked = self._read(migration) if read or attempt else self._tracked.get(migration)
            if tracked is None or tracked.last is None:
                return
            decision = lifecycle.decide(tracked.state)
            if decision.sentence != tracked.sentence:
                tracked.sentence = decision.sentence
                self._log.info("turn", migration=migration, seq=tracked.state.seq, outcome=decision.sentence)
            if not decision.append:
                if tracked.state.terminal:
                    self._tracked.pop(migration, None)
                return
            draft = decision.append[0]
            try:
                self._append(migration, tracked, draft.data, cause=draft.cause)
            except LostLeadershipError:
                raise
            except ConflictError:
                continue
            except SchemaError as error:
                self._halt(migration, str(error))
                return
        raise StoreUnavailableError(f"appending to {migration} lost {MAX_CONFLICTS} times in a row")

    def _read(self, migration: str) -> Tracked | None:
        tracked = self._tracked.setdefault(migration, Tracked())
        try:
            fresh = self._store.read(migration, after=tracked.last)
            tracked.extend(fresh)
        except SchemaError as error:
            self._halt(migration, str(error))
            return None
        if fresh:
            self._remember_head(migration, tracked)
        return tracked

    def _append(self, migration: str, tracked: Tracked, data: Data, *, cause: int) -> Event:
        guard = self._guard
        if guard is None:
            raise LostLeadershipError("not leading")
        name = TYPE_OF[type(data)]
        request = data.request if isinstance(data, Requested) else tracked.state.request
        if self._access is not None and request is not None:
            self._access.grant(migration, request.container, request.source, request.target)
        self._failpoints.hit(f"coordinator.{name}:before_event")
        event = self._store.append(
            migration,
            tracked.last,
            data,
            cause=cause,
            stamp=self._stamper.stamp(guard.create_revision),
            notify=[] if request is None else [request.source, request.target],
            guard=guard,
        )
        self._failpoints.hit(f"coordinator.{name}:after_event")
        kept = self._tracked.setdefault(migration, tracked)
        kept.extend([event])
        self._remember_head(migration, kept)
        return event

    def _remember_head(self, migration: str, tracked: Tracked) -> None:
        assert tracked.last is not None
        request = tracked.state.request
        self._heads[migration] = Head(
            seq=tracked.last.seq,
            uuid=tracked.last.uuid,
            digest=tracked.last.digest,
            phase=tracked.state.state,
            container=request.container if request else "",
            container_id=tracked.state.container_id,
            source=request.source if request else "",
            target=request.target if request else "",
        )

    def _halt(self, migration: str, why: str) -> None:
        if migration not in self._halted:
            self._log.error("refusing to act on this migration", migration=migration, reason=why)
        self._halted[migration] = why
        self._tracked.pop(migration, None)
