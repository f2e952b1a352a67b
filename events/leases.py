"""Being present, and being the one who acts: a lease, a registration kept under it, and the election.

All of it is advice. A lease may outlive its holder or die under a living one (FAULTS B12, E21-E24), so
nothing here ever starts or stops a container; what makes a late leader harmless is the ``LeaderGuard`` that
each of its appends compares. Stands beside the services' loops; talks to the store only.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from events.errors import CargoError, StoreUnavailableError

if TYPE_CHECKING:
    from events.following import KeyValue
    from events.store import Store

REFRESHES_PER_TTL = 3
"""Two refreshes may be lost before a lease runs out."""
CLOSE_SECONDS = 5.0
"""How long closing waits for a turn that is under way."""
SOONEST_RETRY_SECONDS = 0.5
"""Pause before the next attempt when the store did not answer."""


class LeaseGoneError(CargoError):
    """The lease that a key was to be put under does not exist any more."""


class LeaderGuard(NamedTuple):
    """Leadership as a condition: the leadership key still is the one that was created at this revision."""

    key: str
    create_revision: int


class Lease:
    """A promise to show up within ``ttl_seconds``. Only a hint for others, never proof of death.

    Not refreshed by itself: call ``refresh`` well within the TTL, or use ``events.leases.Registration``.
    """

    def __init__(self, store: Store, lease_id: int, ttl_seconds: int) -> None:
        self._store = store
        self.id = lease_id
        self.ttl_seconds = ttl_seconds
        self.alive = True
        """False once the store said that the lease is gone. It never comes back."""

    def refresh(self) -> bool:
        """Start the TTL anew. False when the lease is gone. Raises StoreUnavailableError."""
        if self.alive:
            self.alive = self._store.keep_alive(self.id) > 0
        return self.alive

    def revoke(self) -> None:
        """End the lease and remove its keys; harmless when it is gone. Raises StoreUnavailableError."""
        self.alive = False
        self._store.revoke(self.id)


class _Keeper:
    """A background thread that calls ``turn`` every third of the TTL, sooner when woken or after trouble."""

    def __init__(self, name: str, ttl_seconds: int) -> None:
        self.trouble = ""
        """Why the last turn failed, in words; empty when all is well."""
        self._period_seconds = ttl_seconds / REFRESHES_PER_TTL
        self._turned_at = 0.0
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._name = name
        self._thread: threading.Thread | None = None

    def turn(self) -> None:
        """One round of keeping. Raises StoreUnavailableError or LeaseGoneError."""
        raise NotImplementedError

    def _start(self) -> None:
        """Keep in the background from now on."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self.turn()
            except (StoreUnavailableError, LeaseGoneError) as error:
                self.trouble = str(error)
                self._wake.wait(min(SOONEST_RETRY_SECONDS, self._period_seconds))
                continue
            self.trouble = ""
            self._turned_at = time.monotonic()
            while (left := self._turned_at + self._period_seconds - time.monotonic()) > 0:
                if self._wake.wait(left):
                    break

    def _stop_and_revoke(self, lease: Lease | None) -> None:
        """End the thread, then the lease; what cannot be revoked now ends when the lease runs out."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        if lease is None or self._running:
            return
        try:
            lease.revoke()
        except StoreUnavailableError as error:
            self.trouble = str(error)


class Registration(_Keeper):
    """Keeps one key present, under a live lease, whatever happens to the lease or to the key.

    ``value`` may be changed with ``update``; None means that there is nothing to show yet. With
    ``background`` a thread does the keeping; without, whoever owns it calls ``turn`` (the simulator). A
    lease's life is judged by reading the key, not by the keep-alive's answer, which has been wrong (E23).
    """

    def __init__(
        self, store: Store, key: str, ttl_seconds: int, value: bytes | None = None, *, background: bool = True
    ) -> None:
        super().__init__(f"registration {key}", ttl_seconds)
        self._store = store
        self._key = key
        self._ttl_seconds = ttl_seconds
        self._value = value
        self._lock = threading.Lock()
        self.lease: Lease | None = None
        """The present lease, for further keys that should vanish together with this one."""
        if background:
            self._start()

    def update(self, value: bytes, *, soon: bool = True) -> None:
        """Show ``value`` from now on. Returns at once; the next turn writes it, which comes ``soon`` or in its own time."""
        self._value = value
        if soon:
            self._wake.set()

    def turn(self) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            if self.lease is None or not self.lease.refresh():
                self.lease = self._store.lease(self._ttl_seconds)
            value = self._value
            if value is None:
                return
            stored = self._store.get(self._key)
            if stored is None or stored.value != value or stored.lease != self.lease.id:
                try:
                    self._store.put(self._key, value, self.lease)
                except LeaseGoneError:
                    self.lease = None
                    raise

    def turn_along(self, stored: KeyValue | None) -> None:
        """Do what is usually the next turn, because the caller asks the store anyhow and has just read the key as ``stored``:
        calls at one moment cost far less than at two (docs/performance.md). Waits for one call at most: if anything is
        not as it should be, the background takes its turn now.
        """
        lease, kept = self.lease, False
        if lease is not None and stored is not None and (stored.value, stored.lease) == (self._value, lease.id):
            with suppress(StoreUnavailableError):
                kept = lease.refresh()
        if kept:
            self._turned_at = time.monotonic()
        else:
            self._wake.set()

    def close(self) -> None:
        """Stop keeping and take the key away. What cannot be taken away now goes when the lease runs out."""
        self._closing.set()
        self._stop_and_revoke(self.lease)


class Election(_Keeper):
    """One of several candidates holds ``key``; the others wait until it goes.

    ``attempt`` tries once, ``campaign`` until it succeeds. From then on the key is kept, by a thread with
    ``background``, else by calling ``turn``. ``guard`` is the leadership as a condition for appends, None as
    soon as it is known to be lost. A leader that does not know yet is harmless: its guarded appends fail.
    """

    def __init__(self, store: Store, key: str, name: str, ttl_seconds: int, *, background: bool = True) -> None:
        super().__init__(f"election {name}", ttl_seconds)
        self._store = store
        self._key = key
        self._ttl_seconds = ttl_seconds
        self._value = msgspec.json.encode({"name": name, "candidate": str(uuid.uuid4())})
        self._background = background
        self._lease: Lease | None = None
        self._lock = threading.Lock()
        self.guard: LeaderGuard | None = None

    def attempt(self) -> LeaderGuard | None:
        """Try once to become the leader. None while another one is. Raises StoreUnavailableError."""
        with self._lock:
            if self.guard is not None:
                return self.guard
            stored = self._store.get(self._key)
            if stored is None:
                if self._lease is None or not self._lease.refresh():
                    self._lease = self._store.lease(self._ttl_seconds)
                try:
                    self._store.put_if_absent(self._key, self._value, self._lease)
                except LeaseGoneError:
                    self._lease = None
                    return None
                stored = self._store.get(self._key)
            elif self._lease is not None:
                self._lease.refresh()
            if stored is None or stored.value != self._value:
                return None
            self.guard = LeaderGuard(self._key, stored.create_revision)
        if self._background and not self._running:
            self._start()
        return self.guard

    def campaign(self, stop: threading.Event) -> LeaderGuard | None:
        """Try until it succeeds; None when ``stop`` was set. Waits out an unreachable store."""
        while not stop.is_set():
            try:
                guard = self.attempt()
            except StoreUnavailableError as error:
                self.trouble = str(error)
            else:
                self.trouble = ""
                if guard is not None:
                    return guard
            stop.wait(min(1.0, self._period_seconds))
        return None

    def turn(self) -> None:
        """Refresh the lease, and learn from the store whether we still lead."""
        with self._lock:
            guard = self.guard
            if guard is None:
                return
            alive = self._lease is not None and self._lease.refresh()
            stored = self._store.get(self._key)
            if not alive or stored is None or stored.create_revision != guard.create_revision:
                self.guard = None
                self._lease = None

    def resign(self) -> None:
        """Let another candidate lead, at once if the store can be reached. The object is spent."""
        self.guard = None
        self._stop_and_revoke(self._lease)
