"""The agent's process: watches its inbox, runs one Runner a migration, tells the fleet what runs here.

    for item in store.follow(inbox/<host>/):        # watches only wake
        runner(migration).kick()                     # reads, folds, decides, performs, appends

Watching only its own inbox, an agent costs the same in a fleet of two and of two hundred. It never acts
on anything but a folded history, and keeps nothing in memory that a restart may not lose.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from events.errors import CargoError, ConflictError, SchemaError, StoreUnavailableError
from events.failpoints import Failpoints
from events.leases import Registration
from events.records import PlacementRecord, encode_placement
from events.schema import Requested
from events.stamp import Stamper
from events.store import Changes, Follower, Item, Snapshot, Store, Tick
from hostd import source, target
from hostd.effects.base import Workbench
from hostd.journal import Journal
from hostd.runner import Runner, RunnerPorts
from hostd.ssh_gatekeeper import Gatekeeper
from hostd.telling import Telling

HOST_TTL_SECONDS = 18
"""How long a host that fell silent is still listed. A hint for people and admission, nothing else. A third of it is
longer than it takes to the next look around, so that the two ask etcd at the same moment."""
TICK_SECONDS = 5.0
"""How often everything is looked at without being woken: a watch may be silent though something happened."""
PROGRESS_INTERVAL_SECONDS = 1.0
STOP_SECONDS = 15.0
"""How long a step under way may take to end after SIGTERM."""


class Service:
    """One agent process."""

    def __init__(
        self,
        store: Store,
        bench: Workbench,
        failpoints: Failpoints,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._store = store
        self._keys = store.keys
        self._bench = bench
        self._host = bench.settings.name
        self._failpoints = failpoints
        self._log = log
        self._runners: dict[str, Runner] = {}
        self._lock = threading.Lock()
        self._progress_at: dict[str, float] = {}
        self._faults = b""
        self._journal = Journal(bench.settings.state_dir / "journal")
        self._gate = Gatekeeper(bench.settings.state_dir, log)
        stamper = Stamper(f"hostd/{self._host}")
        bench.boot = stamper.boot
        bench.place = self._place
        self._ports = RunnerPorts(
            host=self._host,
            store=store,
            stamper=stamper,
            failpoints=failpoints,
            bench=bench,
            progress=self._report_progress,
            log=log,
            ended=self._forget,
            journal=self._journal,
            gate=self._gate,
        )
        self._registration = Registration(store, self._keys.host(self._host), HOST_TTL_SECONDS)
        self._telling = Telling(store, self._registration, bench, self._container_changed, log)

    def run(self, stop: threading.Event, members_changed: Callable[[], None] | None = None) -> None:
        """Serve until ``stop``. Raises WrongClusterError, PermanentError.

        ``members_changed`` is called, in a secured fleet, whenever there is a new record of a member, and must not block.
        """
        self._gate.open()
        self._telling.start()
        try:
            inbox = self._keys.inbox(self._host)
            prefixes = [inbox, self._keys.failpoints(f"hostd/{self._host}")]
            if members_changed is not None:
                prefixes.append(self._keys.members)
            with self._store.follow(prefixes, stop=stop, tick_seconds=TICK_SECONDS) as follower:
                for item in follower:
                    if isinstance(item, Tick) or item.prefix != self._keys.members:
                        self._take(item, inbox, follower)
                    elif members_changed is not None:
                        members_changed()
        finally:
            self._close()

    def bar(self, peers: frozenset[str]) -> None:
        """These hosts were removed from the fleet: what they were admitted to by SSH ends. Raises TransientError."""
        self._gate.bar(peers)

    # --- waking --------------------------------------------------------------------------------

    def _take(self, item: Item, inbox: str, follower: Follower) -> None:
        match item:
            case Snapshot(prefix=prefix, items=items):
                for pair in items:
                    self._woken(prefix, pair.key, pair.value, inbox)
            case Changes(prefix=prefix, changes=changes):
                for change in changes:
                    self._woken(prefix, change.key, change.value, inbox)
            case Tick(trouble=trouble):
                if trouble:
                    self._log.warning("the bus is in trouble, holding", reason=trouble)
                follower.expect(inbox, self._kick_all())

    def _woken(self, prefix: str, key: str, value: bytes | None, inbox: str) -> None:
        if prefix != inbox:
            if key == prefix:  # not those of another host whose name begins like this one's
                self._set_failpoints(value or b"")
            return
        place = self._keys.parse(key)
        if place is not None and place.kind == "inbox" and value is not None:
            self._kick(place.parts[1])

    def _kick(self, migration: str) -> None:
        try:
            runner = self._runner(migration)
        except StoreUnavailableError as error:
            self._log.warning("store unavailable, holding", migration=migration, reason=str(error))
            return
        if runner is not None:
            runner.kick()

    def _set_failpoints(self, value: bytes) -> None:
        self._faults = value
        try:
            self._failpoints.set(value.decode("utf-8", "replace"))
            self._log.info("failpoints taken", failpoints=value.decode("utf-8", "replace")[:200])
        except CargoError as error:
            self._log.warning("failpoints not changed", reason=str(error))

    def _kick_all(self) -> int:
        """Look at everything without having been told (B9). Returns the newest revision that the inbox shows, or 0."""
        self._gate.look()
        for migration in self._gate.unsettled():  # the pointer may be gone, but what was admitted is still there
            self._kick(migration)
        inbox, host = self._keys.inbox(self._host), self._keys.host(self._host)
        try:
            faults, pointers, shown = self._store.look(self._keys.failpoints(f"hostd/{self._host}"), inbox, host)
        except StoreUnavailableError as error:
            self._log.warning("store unavailable, holding", reason=str(error))
            return 0
        value = faults[0].value if faults else b""
        if value != self._faults:
            self._set_failpoints(value)
        for pointer in pointers:
            self._woken(inbox, pointer.key, pointer.value, inbox)
        self._registration.turn_along(shown[0] if shown else None)
        return max((pointer.mod_revision for pointer in pointers), default=0)

    def _container_changed(self, migration: str) -> None:
        """Docker told of a change to a container that a migration brought here."""
        with self._lock:
            runner = self._runners.get(migration)
        if runner is not None:
            runner.kick(poke=True)

    def _runner(self, migration: str) -> Runner | None:
        """The runner of a migration that concerns this host; None when there is nothing (more) to do."""
        with self._lock:
            known = self._runners.get(migration)
        if known is not None:
            if not known.finished:
                return known
            self._forget(migration)
        try:
            events = self._store.read(migration)
        except SchemaError as error:
            self._log.error("refusing to act on this migration", migration=migration, reason=str(error))
            return None
        first = events[0].data if events else None
        if not isinstance(first, Requested):
            return None
        roles = {first.request.source: source.PLAN, first.request.target: target.PLAN}
        plan = roles.get(self._host)
        if plan is None:
            return None
        with self._lock:
            return self._runners.setdefault(migration, Runner(migration, plan, self._ports))

    def _forget(self, migration: str) -> None:
        """The migration is finished for this host, and costs it nothing from now on: no thread, no memory, no pointer.

        A person may still roll it back; that puts a new pointer, and so does everything that was appended meanwhile.
        """
        with self._lock:
            runner = self._runners.pop(migration, None)
        self._progress_at.pop(migration, None)
        if runner is None:
            return
        runner.close(0)  # whoever holds it still and wakes it in this moment wakes nobody; the pointer stays then
        key = self._keys.inbox_pointer(self._host, migration)
        try:
            pointer = self._store.get(key)
            news = not runner.ended and self._store.read(migration, after=runner.last)
            if pointer is not None and not news:
                self._store.delete(key, pointer.mod_revision)
        except (StoreUnavailableError, SchemaError) as error:
            self._log.info("an inbox pointer stays until the next look", migration=migration, reason=str(error))
        self._gate.forget(migration)
        if runner.ended:
            self._journal.forget(migration)

    def _place(self, container: str, record: PlacementRecord) -> None:
        """Say where a container lives. What a restart of the agent or a person's hand has lost is written again."""
        key, value = self._keys.placement(container), encode_placement(record)
        stored = self._store.get(key)
        if stored is not None and stored.value == value:
            return
        # Somebody wrote in between: whoever runs the container looks again at its next turn.
        with contextlib.suppress(ConflictError):
            self._store.compare_and_put(key, value, 0 if stored is None else stored.mod_revision)

    # --- progress ------------------------------------------------------------------------------

    def _report_progress(self, migration: str, fields: dict[str, Any]) -> None:
        """Show how far a transfer is, at most once a second; it may be lost, nothing depends on it."""
        now = time.monotonic()
        due = now - self._progress_at.get(migration, 0.0) >= PROGRESS_INTERVAL_SECONDS
        if not due and not fields.get("finished"):  # the last word of a transfer is not to be missed
            return
        self._progress_at[migration] = now
        try:
            self._store.put(
                self._keys.progress(migration, self._host),
                msgspec.json.encode(fields),
                self._registration.lease,
            )
        except CargoError:
            self._log.debug("progress not shown", migration=migration)

    def _close(self) -> None:
        self._log.info("stopping")
        with self._lock:
            runners = list(self._runners.values())
        deadline = time.monotonic() + STOP_SECONDS
        openings = [*self._bench.connections.values(), *self._bench.openings.values()]
        for opening in openings:
            opening.call_off(0)
        for runner in runners:
            runner.close(0)
        for runner in runners:
            runner.close(max(0.1, deadline - time.monotonic()))
        for opening in openings:
            opening.call_off(max(0.1, deadline - time.monotonic()))
        for warm in list(self._bench.warm.values()):
            with contextlib.suppress(CargoError):
                warm.cool()  # nobody else could open its gate; the next life starts it cold
        for tracker in list(self._bench.trackers.values()):
            tracker.stop()
        self._telling.stop()
        self._registration.close()
        self._bench.transport.close()
        # Views that no step has waited for; last, as Docker may not answer.
        for unused in list(self._bench.openings.values()):
            if time.monotonic() < deadline:
                with contextlib.suppress(CargoError, OSError):
                    unused.close(0.1)
        self._log.info("stopped")
