"""Targets: what comes over the bus, from people, agents and coordinators, and from files that hold histories."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec

from coordinator import admission, controls, lifecycle, narrate, recording
from coordinator.audit import audit
from coordinator.recording import Recording
from coordinator.replay import frames
from coordinator.timeline import printable
from events import records, schema
from events.errors import CargoError
from events.failpoints import parse as parse_failpoints
from events.keyspace import Keyspace, key_bytes, key_text, safe_id_for, valid_migration_id
from events.schema import GENESIS, Event, Requested, SourceStopped, Stamp, check_chain, decode_event, next_event
from hostd import remainder, source, target
from hostd.effects.manifests import unpacked
from hostd.manifest import decode_manifest
from hostd.plan import Plan
from tests.fuzz.campaign import Target
from tests.support.histories import HAPPY_PATH, SAMPLES, History

HISTORIES = Path(__file__).parents[1] / "replay" / "histories"
STAMP = Stamp(uuid="u", at="2030-01-01T00:00:00.000Z", by="coordinator/c1", boot="b", epoch=2**40)
PORT = schema.PortBinding(container_port="80/tcp", host_ip="", host_port=8080)
MOUNT = records.MountRecord(
    kind="volume", name="data", destination="/data", tree="/v/data/_data", size_bytes=5, files=1
)
CONTAINER = records.ContainerRecord(
    id="c" * 64, name="web", image="web:1", image_id="sha256:1", running=True, ports=(PORT,), mounts=(MOUNT,), networks=("bridge",),
    warnings=("w",), refusals=("r",),
)  # fmt: skip
HOST = records.HostRecord(
    host="alpha",
    address="10.0.0.1",
    capabilities=("overlay",),
    volumes=("data",),
    free_bytes=10**12,
    networks=("bridge",),
)
PLACEMENT = records.PlacementRecord(
    container="web",
    container_id="d" * 64,
    host="beta",
    address="10.0.0.2",
    networks={"bridge": "172.17.0.2"},
    ports=(PORT,),
    migration="m",
)
REQUESTS = (
    {"container": "web", "source": "alpha", "target": "beta"},
    {
        "container": "web", "source": "alpha", "target": "beta", "strategy": "auto", "max_rounds": 3, "bwlimit_kib": 9, "rootfs": True, "without": ["gpu"],
        "downtime_budget_seconds": 1.5, "stop_timeout_seconds": None, "on_release": "remove", "image": "pull", "remote": "nfs", "start": "cold",
    },
)  # fmt: skip


def _known_world() -> admission.World:
    records_of = {"web": CONTAINER}
    beta = msgspec.structs.replace(HOST, host="beta", address="10.0.0.2")
    return admission.World(hosts={"alpha": HOST, "beta": beta}, containers={"alpha": records_of, "beta": {}})


def run_request(raw: bytes) -> None:
    """An answer that can be appended, whatever was put; under whatever name."""
    name = raw[:80].decode("utf-8", "surrogateescape")
    for migration in ("m", safe_id_for(name), name):
        answer = admission.examine(migration, raw, _known_world())
        event = next_event(None, answer, cause=0, stamp=STAMP)
        shown = " ".join(answer.reasons) if isinstance(answer, schema.Rejected) else ""
        assert shown.isprintable() or "\n" in shown, "a reason that would change a terminal"
        _told(event)


def _states() -> tuple[Event, list[lifecycle.Lifecycle]]:
    """Every state on the straight way, and one with a failure that has much to say."""
    history = History()
    states = [lifecycle.Lifecycle()]
    for name in HAPPY_PATH:
        states.append(lifecycle.apply(states[-1], history.add(name)))
    stamp = msgspec.structs.replace(STAMP, by="hostd/alpha")
    long = schema.StepFailed(step="prepare", reason="x" * 50_000, retrying=True, attempt=1, advice="y")
    states.append(lifecycle.apply(states[2], next_event(history.events[1], long, cause=1, stamp=stamp)))
    return history.events[-1], states


LAST, STATES = _states()


def run_control(raw: bytes) -> None:
    """In every state there is: an event that can be appended, or none."""
    control = controls.parse(raw)
    for state in STATES:
        answer = controls.answer(control, state)
        if answer is not None:
            _told(next_event(LAST, answer, cause=1, stamp=STAMP))


def _told(event: Event) -> None:
    printable(narrate.words(event.data))
    schema.plain(event.data)


def run_records(raw: bytes) -> None:
    """What is read can be written again, within its bounds."""
    for decode, encode in (
        (records.decode_host, records.encode_host),
        (records.decode_container, records.encode_container),
        (records.decode_placement, records.encode_placement),
    ):
        with contextlib.suppress(CargoError):
            record = decode(raw)  # type: ignore[operator]
            assert len(encode(record)) <= records.MAX_RECORD_BYTES  # type: ignore[operator]
            _weigh(record)


def _weigh(record: Any) -> None:
    """Admission with this record in the world."""
    world = _known_world()
    if isinstance(record, records.ContainerRecord):
        for containers in (
            {"alpha": {"web": record}, "beta": {}},
            {"alpha": {"web": CONTAINER}, "beta": {"other": record}},
        ):
            answer = admission.examine("m", json.dumps(REQUESTS[0]).encode(), admission.World(world.hosts, containers))
            next_event(None, answer, cause=0, stamp=STAMP)
    if isinstance(record, records.HostRecord):
        answer = admission.examine(
            "m", json.dumps(REQUESTS[0]).encode(), admission.World({**world.hosts, "beta": record}, world.containers)
        )
        next_event(None, answer, cause=0, stamp=STAMP)


def run_event(raw: bytes) -> None:
    """One stored event, and a head: as what they are and as one another."""
    with contextlib.suppress(CargoError):
        schema.decode_head(raw)
    event = decode_event(raw)
    check_again = decode_event(event.raw)
    assert check_again == event
    _told(event)


def run_history(raw: bytes) -> None:
    """A chain of any events by any authors: every machine has a state for it or refuses it, and what they decide can be written.

    ``raw`` is a list of ``[type, by, epoch, boot, cause, data]``; numbers and hashes are made to fit, since whoever may write
    to the bus can do that.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return
    events = chained(document if isinstance(document, list) else [])
    check_chain(events)
    state, walked = lifecycle.Lifecycle(), 0
    with contextlib.suppress(CargoError):
        for event in events:
            state = lifecycle.apply(state, event)
            walked += 1
            _told(event)
            for draft in lifecycle.decide(state).append:
                next_event(event, draft.data, cause=draft.cause, stamp=STAMP)
    lifecycle.waiting_for(state)
    for plan in (source.PLAN, target.PLAN):
        with contextlib.suppress(CargoError):
            _walk(plan, events)
    with contextlib.suppress(CargoError):
        for frame in frames(events):
            assert frame.sentence
    texts = tuple((event.seq, event.raw) for event in events)
    audit(Recording("m", texts, None))


def chained(rows: list[Any]) -> list[Event]:
    """Those of ``rows`` that are events at all, as a sound chain."""
    events: list[Event] = []
    for row in rows[:60]:
        if not isinstance(row, list) or len(row) != 6:
            continue
        kind, by, epoch, boot, cause, data = row
        previous = events[-1] if events else None
        envelope = {
            "v": 1, "seq": len(events) + 1, "uuid": f"u{len(events)}", "prev": previous.digest if previous else GENESIS, "type": kind,
            "at": "2030-01-01T00:00:00.000Z", "by": by, "boot": boot, "cause": cause, "epoch": epoch, "data": data,
        }  # fmt: skip
        with contextlib.suppress(CargoError):
            events.append(decode_event(json.dumps(envelope).encode("utf-8", "surrogatepass")))
    return events


def _walk(plan: Plan, events: list[Event]) -> None:
    view = plan.start()
    for event in events:
        view = plan.apply(view, event)
        for author in ("hostd/alpha", "hostd/beta"):
            assert plan.decide(view, author).sentence
    if (
        plan is target.PLAN
        and isinstance(view.facts.get("source_stopped"), SourceStopped)
        and "source_prepared" in view.facts
    ):
        if isinstance(view.facts.get("requested"), Requested):
            remainder.decide(view)
        for dirty in view.dirty():
            with contextlib.suppress(CargoError):
                list(decode_manifest(unpacked(dirty)))


def run_failpoints(raw: bytes) -> None:
    """What a tester put; numbers that could be waited for."""
    for fault in parse_failpoints(raw.decode("utf-8", "replace")).values():
        if fault.action == "delay":
            assert 0 <= float(fault.argument) <= 10**9, fault.argument


def run_keys(raw: bytes) -> None:
    """A key of the store, and names that become keys."""
    keys = Keyspace("/cargo")
    text = key_text(raw)
    assert key_bytes(text) == raw
    for key in (text, f"/cargo/{text}", f"/cargo/migrations/{text}", f"/cargo/inbox/alpha/{text}"):
        place = keys.parse(key)
        if place is not None and place.kind not in (
            "request",
            "control",
            "failpoints",
        ):  # the others become names of files
            assert not any("/" in part or part in ("", ".", "..") for part in place.parts), place
    safe = safe_id_for(raw)
    assert valid_migration_id(safe), safe
    if valid_migration_id(text):
        assert "/" not in text and text not in (".", ".."), text


def run_export(raw: bytes) -> None:
    """A file of histories, of another installation or of an enemy."""
    for one in recording.parse(raw.split(b"\n")).values():
        audit(one)
        with contextlib.suppress(CargoError):
            one.events()
        list(recording.lines(one, "2030-01-01T00:00:00.000Z"))


def _rows(events: list[Event]) -> bytes:
    rows = [[e.type, e.by, e.epoch, e.boot, e.cause, schema.plain(e.data)] for e in events]
    return json.dumps(rows).encode()


def _histories() -> list[list[Event]]:
    found = [
        one.events()
        for file in sorted(HISTORIES.glob("*.jsonl"))
        for one in recording.parse(file.read_bytes().rstrip(b"\n").split(b"\n")).values()
    ]
    rich = History().up_to("completed").events
    return [*found, rich]


_EVENTS = [
    History().add(data, by="coordinator/c1" if kind == "requested" else None).raw for kind, data in SAMPLES.items()
]
_HEADS = [schema.encode_head(schema.head_after(None, decode_event(raw))) for raw in _EVENTS[:2]]
_SMALL = [file.read_bytes().rstrip(b"\n") for file in sorted(HISTORIES.glob("*.jsonl"))]
FAILPOINTS = (
    b"target.start_container:after_effect=kill; source.stop:before_event=delay(2)@3", b"a.b:c=error(some words)@12", b"a.b:c=pause;;", b"a.b:c=delay(0.5)",
)  # fmt: skip
CONTROLS = (
    *(name.encode() for name in controls.CONTROLS), b'{"control":"bwlimit","kib":100}', b'{"control":"abort","reason":"because"}',
    b'{"control":"rollback","reason":"x","discard_target_writes":true,"target_off":"ada"}',
)  # fmt: skip
KEYS = (
    b"/cargo/requests/web-7",
    b"/cargo/migrations/web-7/ev/00000001",
    b"migrations/web-7/head",
    b"inventory/alpha/web",
    b"web-7",
    b"failpoints/hostd/beta",
)

TARGETS = (
    Target("request", run_request, [json.dumps(one).encode() for one in REQUESTS], "json", 6),
    Target("control", run_control, CONTROLS, "bytes"),
    Target("control-json", run_control, CONTROLS[len(controls.CONTROLS) :], "json"),
    Target(
        "records",
        run_records,
        [records.encode_host(HOST), records.encode_container(CONTAINER), records.encode_placement(PLACEMENT)],
        "json",
    ),
    Target("event", run_event, [*_EVENTS, *_HEADS], "json", 8),
    Target("history", run_history, [_rows(events) for events in _histories()], "json", 2),
    Target("failpoints", run_failpoints, FAILPOINTS, weight=6),
    Target("keys", run_keys, KEYS, weight=6),
    Target("export", run_export, _SMALL, weight=1),
)
