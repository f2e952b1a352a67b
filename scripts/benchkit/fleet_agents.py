"""Many agents reduced to their cores: the product's own machines and turns, with effects that only say what they found.

Drives ``hostd.turn`` as ``hostd/runner.py`` does, without threads for each migration, and without failures: what is
measured is the bus and the coordinator. A state that is *held* is left unanswered, which is how migrations are kept
in flight.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from events import schema
from events.errors import ConflictError
from events.records import ContainerRecord, HostRecord, encode_container, encode_host
from events.schema import FileRef, Requested
from events.stamp import Stamper
from events.store import Changes, Store
from hostd import source, target
from hostd.turn import Append, Perform, Read, Turns

ADDRESS = "192.0.2.1"
_REF = FileRef(path="/var/lib/cargo/spec", size_bytes=4000, sha256="0" * 64)
_MOUNT = schema.Mount(
    kind="volume", name="data", destination="/data", tree="/v/data/_data", size_bytes=10**9, files=1000
)


def outcome(effect: str, container: str) -> dict[str, Any]:
    """What an effect would have found; effects whose outcome nobody reports find nothing."""
    found: dict[str, dict[str, Any]] = {
        "describe_container": {
            "container_id": container,
            "container_name": container,
            "spec": _REF,
            "image_id": "sha256:1",
            "image_tags": ("web:1",),
            "ports": (),
            "restart_policy": "always",
            "address": ADDRESS,
        },
        "measure_mounts": {"mounts": (_MOUNT,)},
        "create_container": {"container_id": container + "-there"},
        "pull_round": {"bytes_moved": 1000, "files": 10, "duration_seconds": 0.1},
        "stop_container": {"exit_code": 0, "unclean": False, "stopped_at": "2030-01-01T00:00:00Z"},
        "publish_dirty": {"dirty": ()},
        "start_container": {"container_id": container + "-there", "started_at": "2030-01-01T00:00:00Z"},
        "fill_replica": {"bytes_moved": 0, "files": 0, "duration_seconds": 0.1},
        "digest_trees": {"trees": ()},
        "verify_trees": {"files": 1000, "size_bytes": 10**9, "changed_by_container": 0},
        "retire_container": {"kept_as": None},
    }
    return found.get(effect, {})


def container_of(migration: str) -> str:
    """Name and id of the container that a migration of the benchmark moves."""
    return f"c-{migration}"


class Agents:
    """``hosts`` agents on one connection each for watching and for working, shared by ``workers`` threads."""

    def __init__(self, store: Store, hosts: int, workers: int = 4) -> None:
        self._store = store
        self.hosts = [f"h{number:03d}" for number in range(hosts)]
        self.held: frozenset[str] = frozenset()
        """Steps that are not answered for now."""
        self._stampers = {host: Stamper(f"hostd/{host}") for host in self.hosts}
        self._turns: dict[tuple[str, str], Turns] = {}
        self._locks: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()
        self._work: queue.Queue[tuple[str, str] | None] = queue.Queue()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        self._threads += [threading.Thread(target=self._run, daemon=True) for _ in range(workers)]

    def start(self) -> None:
        """Register every host, and begin to listen."""
        for host in self.hosts:
            record = HostRecord(host=host, address=ADDRESS, agent_version="0", free_bytes=10**12, free_inodes=10**6)
            self._store.put(self._store.keys.host(host), encode_host(record))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(10)

    def lists(self, host: str, migration: str) -> None:
        """Tell the fleet of the container of a migration."""
        name = container_of(migration)
        record = ContainerRecord(
            id=name,
            name=name,
            image="web:1",
            image_id="sha256:1",
            status="running",
            running=True,
            network_mode="bridge",
        )
        self._store.put(self._store.keys.inventory_item(host, name), encode_container(record))

    def look_again(self) -> None:
        """Answer what was held."""
        with self._lock:
            for pair in self._turns:
                self._work.put(pair)

    def _watch(self) -> None:
        root = self._store.keys.inbox(self.hosts[0]).removesuffix(self.hosts[0] + "/")
        with self._store.follow(root, stop=self._stop, contents=False) as follower:
            for item in follower:
                if isinstance(item, Changes):
                    for change in item.changes:
                        place = self._store.keys.parse(change.key)
                        if place is not None and place.kind == "inbox" and change.value is not None:
                            self._work.put((place.parts[0], place.parts[1]))

    def _run(self) -> None:
        while (pair := self._work.get()) is not None and not self._stop.is_set():
            with self._lock:
                lock = self._locks.setdefault(pair, threading.Lock())
            with lock:
                self._advance(*pair)

    def _advance(self, host: str, migration: str) -> None:
        turns = self._turns.get((host, migration))
        if turns is None:
            first = self._store.read(migration)[0].data
            assert isinstance(first, Requested)
            turns = Turns(source.PLAN if first.request.source == host else target.PLAN, host)
            with self._lock:
                self._turns[(host, migration)] = turns
        try:
            while self._turn(turns, migration):
                pass
        except ConflictError:
            self._work.put((host, migration))

    def _turn(self, turns: Turns, migration: str) -> bool:
        operations = turns.turn()
        result: Any = None
        try:
            operation = next(operations)
            while True:
                trouble: ConflictError | None = None
                match operation:
                    case Read():
                        result = turns.learn(self._store.read(migration, after=turns.last))
                        if result.step in self.held:
                            operations.close()
                            return False
                    case Perform(name, _):
                        result = outcome(name, container_of(migration))
                    case Append(data, decision):
                        try:
                            self._append(turns, migration, data, decision)
                        except ConflictError as error:
                            trouble = error
                    case _:
                        result = None
                operation = operations.throw(trouble) if trouble is not None else operations.send(result)
        except StopIteration as done:
            return bool(done.value)

    def _append(self, turns: Turns, migration: str, data: Any, decision: Any) -> None:
        draft = turns.draft(data, decision)
        stamp = self._stampers[turns.host].stamp(draft.epoch)
        event = self._store.append(
            migration, draft.previous, draft.data, cause=draft.cause, stamp=stamp, notify=draft.notify
        )
        turns.appended(event)
