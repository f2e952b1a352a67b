"""Tells the fleet what runs here: ``hosts/<host>`` and ``inventory/<host>/…``, refreshed on Docker's events.

Hints for listing and admission only. It also passes on that a container was changed, so that the runner
that supervises it looks at once. It must never act on a container itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from events.errors import CargoError
from events.keyspace import valid_container_name
from events.leases import Registration
from events.records import ContainerRecord, HostRecord, encode_container, encode_host
from events.store import Store
from events.version import version
from hostd import moves
from hostd.effects.base import Workbench
from hostd.engine_calls import ContainerSummary
from hostd.inventory import Sizer, container_records, host_record
from hostd.settings import HostSettings

REFRESH_SECONDS = 30.0
"""Without any event of Docker: free space changes silently, and an event may be lost."""
SETTLE_SECONDS = 0.05
"""Docker's events come in bursts; one look serves them all."""
RETRY_SECONDS = 2.0
FORGIVEN_SECONDS = 30.0
"""A daemon that shuts down stops its containers by itself just before its event stream breaks: such stops
are not a person's."""
MANUAL_ACTIONS = ("kill", "stop", "pause")
UNRELATED_ACTIONS = frozenset(
    {"exec_create", "exec_start", "exec_detach", "exec_die", "top", "attach", "detach", "resize"}
)
"""What they change is not in any record. Every look of every health check makes three of them."""


def _with_refusals(record: ContainerRecord, settings: HostSettings) -> ContainerRecord:
    """``record`` with what this host's configuration says against its being moved, so that a request is rejected at once."""
    places = [moves.Place(mount.kind, mount.name) for mount in record.mounts]
    found = moves.refusals(settings.moves, settings.name, record.name, places)
    return msgspec.structs.replace(record, refusals=(*record.refusals, *found)) if found else record


class Telling:
    """Three threads: Docker's events, the publisher, and the sizer's."""

    def __init__(
        self,
        store: Store,
        registration: Registration,
        bench: Workbench,
        container_changed: Callable[[str], None],
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._store = store
        self._keys = store.keys
        self._registration = registration
        self._bench = bench
        self._host = bench.settings.name
        self._container_changed = container_changed
        self._log = log
        self._stop = threading.Event()
        self._dirty = threading.Event()
        self._sizer = Sizer(measured=self._dirty.set)
        self._listed = b""
        """Docker's list of containers at the last whole look."""
        self._record: HostRecord | None = None
        """Of the host, as of then; None when there has to be another."""
        self._data_root = ""
        self._trees: tuple[str, ...] = ()
        """Of the containers' data: whose sizes are asked about at every look, lest they be forgotten."""
        self._migrations: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._listen, name="docker events", daemon=True),
            threading.Thread(target=self._publish, name="inventory", daemon=True),
        ]

    def start(self) -> None:
        """Begin telling."""
        self._sizer.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End within a moment; what was told goes when the lease does."""
        self._stop.set()
        self._dirty.set()
        self._sizer.stop()
        for thread in self._threads:
            thread.join(5)

    # --- listening -----------------------------------------------------------------------------

    def _listen(self) -> None:
        for event in self._bench.engine.events(self._stop):
            now = time.monotonic()
            stops = self._bench.manual_stops
            if event.kind == "lost":
                # How long the daemon is away afterwards says nothing about who stopped them.
                for name in [name for name, at in stops.items() if now - at < FORGIVEN_SECONDS]:
                    del stops[name]
                continue
            if event.kind == "resync":
                for migration in {*self._migrations.values(), *self._bench.guarded.values()}:
                    self._container_changed(migration)
            elif event.kind == "container":
                if event.action in MANUAL_ACTIONS:
                    stops[event.id] = now
                elif event.action in ("start", "unpause", "destroy"):
                    stops.pop(event.id, None)
                action = event.action.partition(":")[0]  # Docker writes "health_status: unhealthy" for one
                if action in UNRELATED_ACTIONS:
                    continue
                moved_by = self._migrations.get(event.id) or self._bench.guarded.get(event.id)
                if moved_by and action in ("die", "stop", "destroy", "start", "health_status"):
                    self._container_changed(moved_by)
            self._dirty.set()

    # --- publishing ----------------------------------------------------------------------------

    def _publish(self) -> None:
        wait = 0.0
        while not self._stop.is_set():
            woken = self._dirty.wait(wait)
            if self._stop.wait(SETTLE_SECONDS):
                return
            self._dirty.clear()
            try:
                self._publish_once(whole=woken)
                wait = REFRESH_SECONDS
            except CargoError as error:
                self._log.warning("cannot tell what runs here", reason=str(error))
                self._record = None
                wait = RETRY_SECONDS
                self._stop.wait(RETRY_SECONDS)

    def _publish_once(self, *, whole: bool) -> None:
        """Look at Docker and tell what is new. Where nothing woke us, its list of containers says whether anything can be."""
        engine = self._bench.engine
        rows = engine.containers()
        listed = msgspec.json.encode(rows)
        record = self._record
        if record is None or whole or listed != self._listed:
            self._registration.update(encode_host(self._look(rows)))
            self._listed = listed
            return
        for tree in self._trees:
            self._sizer.size(tree)
        free = engine.disk_free(self._data_root)
        record = msgspec.structs.replace(record, free_bytes=free.free_bytes, free_inodes=free.free_inodes)
        self._registration.update(encode_host(record), soon=False)

    def _look(self, rows: Sequence[ContainerSummary]) -> HostRecord:
        """Look at everything, given the list of containers, and tell of them. Returns what is to be told of the host."""
        engine, settings = self._bench.engine, self._bench.settings
        info = engine.info()
        record = host_record(
            engine,
            info,
            host=self._host,
            address=settings.address,
            ssh_port=settings.ssh_port,
            agent_version=version(),
            boot=self._bench.boot,
        )
        told = container_records(engine, self._sizer, settings.shared_file_systems, rows)
        containers = [found for found in told if valid_container_name(found.name)]
        containers = [_with_refusals(found, settings) for found in containers]
        self._migrations = {found.id: found.migration for found in containers if found.migration}
        self._put(containers)
        self._trees = tuple(mount.tree for found in containers for mount in found.mounts if not mount.file_system)
        self._data_root, self._record = info.data_root, record
        return record

    def _put(self, containers: list[ContainerRecord]) -> None:
        told = {self._keys.inventory_item(self._host, found.name): encode_container(found) for found in containers}
        stored = {item.key: item.value for item in self._store.range(self._keys.inventory(self._host))}
        for key, value in told.items():
            if stored.get(key) != value:
                self._store.put(key, value)
        for key in stored.keys() - told.keys():
            self._store.delete(key)
