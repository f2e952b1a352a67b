"""The coordinator's loop on the in-memory store: requests, controls, hand-over, histories it must not touch."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import structlog

from coordinator import service as service_module
from coordinator.service import Service
from events import schema
from events.errors import ChainError
from events.failpoints import Failpoints
from events.memory import MemoryStore
from events.records import ContainerRecord, HostRecord, MountRecord, encode_container, encode_host
from events.schema import Event
from events.stamp import Stamper
from events.store import Follower, Snapshot
from tests.support.histories import History, prepared

REQUEST = json.dumps({"container": "web", "source": "alpha", "target": "beta"}).encode()
DEADLINE_SECONDS = 20.0


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for ``condition``, bounded."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        threading.Event().wait(0.005)


class Fleet:
    """A store, one or more coordinators, and agents played by the test."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.stops: list[tuple[threading.Event, threading.Thread]] = []
        self.agents = {host: Stamper(f"hostd/{host}") for host in ("alpha", "beta")}
        for host in self.agents:
            record = HostRecord(host=host, address="10.0.0.1", free_bytes=10**9)
            self.store.put(self.store.keys.host(host), encode_host(record))
        self.tell_of("web")

    def tell_of(self, name: str, **fields: object) -> None:
        mount = MountRecord(kind="volume", name=f"{name}-data", destination="/data", tree="/v", size_bytes=1)
        base: dict[str, object] = {"id": name, "name": name, "image": "i", "image_id": "i", "running": True}
        record = ContainerRecord(**(base | {"mounts": (mount,)} | fields))  # type: ignore[arg-type]
        self.store.put(self.store.keys.inventory_item("alpha", name), encode_container(record))

    def start(self, name: str = "c1") -> threading.Event:
        stop = threading.Event()
        service = Service(self.store, name, Failpoints(), structlog.get_logger())
        thread = threading.Thread(target=service.run, args=(stop,), daemon=True)
        thread.start()
        self.stops.append((stop, thread))
        return stop

    def close(self) -> None:
        for stop, _ in self.stops:
            stop.set()
        for _, thread in self.stops:
            thread.join(10)
            assert not thread.is_alive()

    def put(self, migration: str, value: bytes = REQUEST) -> None:
        self.store.put(self.store.keys.requests + migration, value)

    def types(self, migration: str) -> list[str]:
        return [event.type for event in self.store.read(migration)]

    def until(self, migration: str, last: str) -> list[Event]:
        until(lambda: self.types(migration)[-1:] == [last], f"{migration} reaches {last}")
        return self.store.read(migration)

    def act(self, host: str, migration: str, data: schema.Data) -> None:
        events = self.store.read(migration)
        stamp = self.agents[host].stamp(events[-1].epoch)
        self.store.append(migration, events[-1], data, cause=events[-1].seq, stamp=stamp, notify=())


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.close()


def test_a_request_is_admitted_and_the_hosts_are_ordered_to_prepare(fleet: Fleet) -> None:
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")


def test_a_request_from_before_the_start_is_admitted_too(fleet: Fleet) -> None:
    fleet.put("web-1")
    fleet.start()
    fleet.until("web-1", "prepare_ordered")


def test_the_same_request_put_twice_makes_one_migration(fleet: Fleet) -> None:
    """P16, F1: a duplicate request is the same migration."""
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.put("web-1")
    fleet.put("web-2", b"garbage")
    fleet.until("web-2", "rejected")
    assert fleet.types("web-1") == ["requested", "prepare_ordered"]


def test_a_second_migration_of_a_container_that_is_being_moved_is_rejected(fleet: Fleet) -> None:
    """P16: one migration a container."""
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.put("web-2")
    rejected = fleet.until("web-2", "rejected")[0].data
    assert isinstance(rejected, schema.Rejected)
    assert "web-1" in rejected.reasons[0]


def test_a_container_that_is_told_of_a_moment_later_is_still_admitted(fleet: Fleet) -> None:
    fleet.start()
    fleet.put("late-1", REQUEST.replace(b'"web"', b'"late"'))
    fleet.put("x", b"garbage")
    fleet.until("x", "rejected")
    fleet.tell_of("late")
    fleet.until("late-1", "prepare_ordered")


def test_an_illegal_id_gets_its_rejection_under_a_safe_one(fleet: Fleet) -> None:
    fleet.start()
    fleet.put("../../etc", REQUEST)
    until(lambda: len(fleet.store.heads().heads) == 1, "a rejection")
    (migration,) = fleet.store.heads().heads
    assert migration.startswith("invalid-")
    rejected = fleet.store.read(migration)[0].data
    assert isinstance(rejected, schema.Rejected)
    assert rejected.request_key == "../../etc"


def test_a_burst_of_garbage_leaves_the_coordinator_healthy(fleet: Fleet) -> None:
    """F2: 1,000 requests that cannot work, then one that can."""
    fleet.start()
    for number in range(1000):
        fleet.put(f"bad-{number}", b"\x00\xff{" * (number % 50))
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    assert sum(head.phase == "rejected" for head in fleet.store.heads().heads.values()) == 1000


def test_an_abort_is_obeyed_and_its_key_is_taken_away(fleet: Fleet) -> None:
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.store.put(fleet.store.keys.control("web-1"), b"abort")
    fleet.until("web-1", "abort_ordered")
    until(lambda: fleet.store.get(fleet.store.keys.control("web-1")) is None, "the control is gone")
    fleet.act("alpha", "web-1", schema.SourceRestored(running=True))
    fleet.act("beta", "web-1", schema.TargetCleaned())
    fleet.until("web-1", "aborted")


def test_a_refusal_by_an_agent_aborts_and_its_reasons_are_kept(fleet: Fleet) -> None:
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.act("alpha", "web-1", prepared())
    failed = schema.StepFailed(
        step="prepare", reason="no", retrying=False, attempt=1, advice="", code="refused", reasons=("disk full",)
    )
    fleet.act("beta", "web-1", failed)
    order = fleet.until("web-1", "abort_ordered")[-1].data
    assert isinstance(order, schema.AbortOrdered)
    assert "disk full" in order.reason


def test_another_coordinator_takes_over_where_the_first_one_stopped(fleet: Fleet) -> None:
    """A1, B5: the successor folds the history and goes on; nothing is ordered twice."""
    first = fleet.start("c1")
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.start("c2")
    first.set()
    fleet.act("alpha", "web-1", prepared())
    fleet.act("beta", "web-1", schema.TargetPrepared(container_id="d"))
    events = fleet.until("web-1", "sync_ordered")
    assert [event.type for event in events].count("sync_ordered") == 1
    until(lambda: events[-1].by in ("coordinator/c1", "coordinator/c2"), "an author")


def test_a_history_that_was_tampered_with_is_left_alone_and_others_go_on(fleet: Fleet) -> None:
    """B15: an edited or cut history is refused, never read as 'no migration'."""
    fleet.start()
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    keys = fleet.store.keys
    stored = fleet.store.get(keys.event("web-1", 1))
    assert stored is not None
    last = fleet.store.read("web-1")[-1]
    fleet.store.put(keys.event("web-1", 1), stored.value.replace(b'"alpha"', b'"gamma"'))
    for host, data in (("alpha", prepared()), ("beta", schema.TargetPrepared(container_id="d"))):
        stamp = fleet.agents[host].stamp(last.epoch)
        last = fleet.store.append("web-1", last, data, cause=last.seq, stamp=stamp)
    fleet.tell_of("db")
    fleet.put("db-1", REQUEST.replace(b'"web"', b'"db"'))
    fleet.until("db-1", "prepare_ordered")
    fleet.act("alpha", "db-1", prepared(container_name="db"))
    fleet.act("beta", "db-1", schema.TargetPrepared(container_id="e"))
    fleet.until("db-1", "sync_ordered")
    with pytest.raises(ChainError):
        fleet.store.read("web-1")
    assert fleet.store.get(keys.event("web-1", 5)) is None


def until_started(fleet: Fleet, migration: str) -> None:
    """A history whose target runs the container."""
    last: Event | None = None
    for event in History().up_to("target_started").events:
        stamp = schema.Stamp(uuid=event.uuid, at=event.at, by=event.by, boot=event.boot, epoch=1)
        last = fleet.store.append(migration, last, event.data, cause=event.cause, stamp=stamp, notify=())


@pytest.mark.parametrize("sign", ["registers", "writes"])
def test_that_a_target_is_off_is_not_believed_any_more_once_its_agent_has_shown_itself(fleet: Fleet, sign: str) -> None:
    """P1: nobody led for a while, and the host was switched on again meanwhile."""
    until_started(fleet, "web-1")
    control = b'{"control":"rollback","discard_target_writes":true,"target_off":"ada"}'
    fleet.store.put(fleet.store.keys.control("web-1"), control)
    if sign == "registers":
        record = HostRecord(host="beta", address="10.0.0.1", free_bytes=10**9, boot="another")
        fleet.store.put(fleet.store.keys.host("beta"), encode_host(record))
    else:
        fleet.act("beta", "web-1", schema.FillFinished(bytes_moved=0, files=0, duration_seconds=0.0))
    fleet.start()
    refused = fleet.until("web-1", "control_refused")[-1].data
    assert isinstance(refused, schema.ControlRefused)
    assert "beta" in refused.reason
    assert "ada" in refused.reason
    until(lambda: fleet.store.get(fleet.store.keys.control("web-1")) is None, "the control is taken away")
    assert "rollback_ordered" not in fleet.types("web-1")


def test_that_a_target_is_off_is_believed_while_nothing_is_heard_of_it(fleet: Fleet) -> None:
    """A registration from before may still be there: its lease has not run out yet."""
    until_started(fleet, "web-1")
    control = b'{"control":"rollback","discard_target_writes":true,"target_off":"ada"}'
    fleet.store.put(fleet.store.keys.control("web-1"), control)
    fleet.start()
    fleet.until("web-1", "target_asserted_off")


def test_a_control_for_no_migration_is_cleared_without_harm(fleet: Fleet) -> None:
    fleet.start()
    fleet.store.put(fleet.store.keys.control("nothing"), b"abort")
    until(lambda: fleet.store.get(fleet.store.keys.control("nothing")) is None, "the control is gone")
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")


class _DeafFollower:
    """A subscription whose changes are lost without a word."""

    def __init__(self, real: Follower) -> None:
        self._real = real

    def __enter__(self) -> _DeafFollower:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    @property
    def trouble(self) -> str:
        return ""

    def poll(self, timeout_seconds: float) -> object:
        item = self._real.poll(min(timeout_seconds, 0.01))
        return item if isinstance(item, Snapshot) else None

    def expect(self, prefix: str, revision: int) -> None:
        self._real.expect(prefix, revision)


def test_what_a_watch_loses_without_a_word_is_found_by_looking_around(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9: watches only wake; they never carry the only copy of anything."""
    monkeypatch.setattr(service_module, "LOOK_AROUND_SECONDS", 0.05)
    follow = fleet.store.follow

    def deaf(prefixes: object, **options: object) -> object:
        real = follow(prefixes, **options)  # type: ignore[arg-type]
        return _DeafFollower(real) if isinstance(prefixes, tuple) else real

    monkeypatch.setattr(fleet.store, "follow", deaf)
    fleet.start()
    until(lambda: fleet.store.get(fleet.store.keys.leader), "a leader")
    fleet.put("web-1")
    fleet.until("web-1", "prepare_ordered")
    fleet.act("alpha", "web-1", prepared())
    fleet.act("beta", "web-1", schema.TargetPrepared(container_id="d"))
    fleet.until("web-1", "sync_ordered")
    fleet.store.put(fleet.store.keys.control("web-1"), b"abort")
    fleet.until("web-1", "abort_ordered")
