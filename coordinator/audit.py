"""Is a recorded history what it should be? The form: keys, schema, chain, authors, epochs, machines, answers, ends.

``audit`` never stops at the first trouble and never raises for a broken history: it looks at the exact texts, decodes
what can be decoded, and returns one Finding for everything that is wrong. What the promises of the protocol demand of a
well-formed history stands in ``coordinator/invariants.py``; both are run on recorded histories by ``cargoctl verify``, by
``archive`` before anything is removed, and by tests.

It trusts nothing but the texts: neither the clocks of the writers, nor the head, which it recomputes.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from coordinator import invariants, lifecycle
from coordinator.findings import Finding
from coordinator.recording import Recording
from coordinator.replay import AgentWalk
from events.agent_tables import AGENTS
from events.errors import IllegalEventError, SchemaError
from events.schema import (
    EVENT_TYPES,
    GENESIS,
    TERMINAL_PHASES,
    Event,
    Head,
    Request,
    Requested,
    decode_event,
    decode_head,
    head_after,
)

ENDS_AFTER_COMPLETED = frozenset({"finalised", "rolled_back"})
FORMER_STEPS: Mapping[str, frozenset[str]] = {"source": frozenset(), "target": frozenset({"synced"})}
"""By role, states in which agents of earlier versions had a step, of whose failure a history may tell."""


def audit(recorded: Recording) -> list[Finding]:
    """Everything that is wrong with ``recorded``, by event number. Empty: nothing is."""
    found = list(_keys(recorded))
    events: list[Event] = []
    for number, text in recorded.texts:
        try:
            event = decode_event(text)
        except SchemaError as error:
            found.append(Finding(number, "schema", str(error)))
            continue
        if event.seq != number:
            found.append(Finding(number, "sequence", f"the key of event {number} holds event {event.seq}"))
        events.append(event)
    found += _chain(recorded.texts)
    found += _head(recorded, events)
    if events:
        found += _authors(events)
        found += _identities(events)
        found += _epochs(events)
        found += _walk_lifecycle(events)
        found += _walk_agents(events)
        found += _orders(events)
        found += _ends(events)
        found += invariants.check(events)
    return sorted(set(found))


def audit_together(recordings: Iterable[Recording], heads: Mapping[str, Head]) -> list[Finding]:
    """What can only be seen across migrations: an event's id used twice, one container in two migrations."""
    found: list[Finding] = []
    seen: dict[str, str] = {}
    for recorded in recordings:
        own: set[str] = set()
        for number, raw in recorded.texts:
            try:
                own.add(decode_event(raw).uuid)
            except SchemaError:
                continue
            for uuid in own & seen.keys():
                found.append(
                    Finding(number, "uuid", f"{recorded.migration} and {seen[uuid]} share the event id {uuid}")
                )
        seen |= dict.fromkeys(own, recorded.migration)
    busy: dict[str, str] = {}
    for migration, head in sorted(heads.items()):
        if head.terminal or not head.container_id:
            continue
        other = busy.setdefault(head.container_id, migration)
        if other != migration:
            text = f"{other} and {migration} are both under way for the container {head.container_id[:12]}"
            found.append(Finding(0, "one migration a container", text))
    return sorted(set(found))


# --- keys, texts, chain --------------------------------------------------------------------------


def _keys(recorded: Recording) -> Iterator[Finding]:
    for key in recorded.strange:
        yield Finding(0, "key", f"the key {key!r} belongs to no history; remove it by hand")
    if not recorded.texts:
        what = "there is a head but not one event" if recorded.head is not None else "there is no event"
        yield Finding(0, "sequence", f"{what}: the history was cut")
    expected = 1
    for number, _ in recorded.texts:
        if number != expected:
            missing = f"event {expected}" if number == expected + 1 else f"events {expected} to {number - 1}"
            yield Finding(number, "sequence", f"{missing} missing before event {number}: the history was cut")
        expected = number + 1


def _chain(texts: Sequence[tuple[int, bytes]]) -> Iterator[Finding]:
    """``prev`` of each text against the text before, whatever else is wrong with either."""
    before: tuple[int, bytes] | None = None
    for number, text in texts:
        prev = _prev_of(text)
        if before is None:
            expected = GENESIS if number == 1 else None
        else:
            expected = hashlib.sha256(before[1]).hexdigest() if before[0] == number - 1 else None
        if prev is not None and expected is not None and prev != expected:
            whom = f"event {number - 1}" if number > 1 else "the beginning"
            yield Finding(
                number, "chain", f"event {number} does not continue {whom} as it is now: one of them was changed"
            )
        before = (number, text)


class _Link(msgspec.Struct):
    prev: str


_link_decoder = msgspec.json.Decoder(_Link)


def _prev_of(text: bytes) -> str | None:
    try:
        return _link_decoder.decode(text).prev
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _head(recorded: Recording, events: list[Event]) -> Iterator[Finding]:
    if recorded.head is None:
        if recorded.texts:
            yield Finding(0, "head", "the head is missing although there are events: the history was cut")
        return
    try:
        head = decode_head(recorded.head)
    except SchemaError as error:
        yield Finding(0, "head", str(error))
        return
    if not recorded.texts:
        return
    number, text = recorded.texts[-1]
    digest = hashlib.sha256(text).hexdigest()
    if head.seq != number:
        yield Finding(0, "head", f"the head says event {head.seq}, the newest one is {number}: the history was cut")
    elif head.digest != digest:
        yield Finding(number, "head", f"event {number} is not the one that the head was written with: it was changed")
    if len(events) != len(recorded.texts):
        return
    folded: Head | None = None
    for event in events:
        folded = head_after(folded, event)
    assert folded is not None
    for name in head.__struct_fields__:
        said, is_so = getattr(head, name), getattr(folded, name)
        if name not in ("seq", "digest") and said != is_so:
            yield Finding(0, "head", f"the head says {name} {str(said)[:80]!r}; the events say {str(is_so)[:80]!r}")


# --- who wrote it --------------------------------------------------------------------------------


def request_of(events: Sequence[Event]) -> Request | None:
    """The request that a history began with; None when it has none."""
    first = events[0].data if events else None
    return first.request if isinstance(first, Requested) else None


def _authors(events: list[Event]) -> Iterator[Finding]:
    request = request_of(events)
    for event in events:
        roles = EVENT_TYPES[event.type].authors
        allowed = {"coordinator/": "coordinator" in roles}
        if request is not None:
            allowed[f"hostd/{request.source}"] = "source" in roles
            allowed[f"hostd/{request.target}"] = allowed.get(f"hostd/{request.target}", False) or "target" in roles
        author = "coordinator/" if event.by.startswith("coordinator/") else event.by
        if not allowed.get(author, False):
            yield Finding(event.seq, "author", f"{event.type} may not be written by {event.by[:80]!r}")


def _identities(events: list[Event]) -> Iterator[Finding]:
    """Each event has an id of its own; a life of a process that has ended does not write again."""
    for uuid, times in Counter(event.uuid for event in events).items():
        if times > 1:
            last = [event.seq for event in events if event.uuid == uuid][-1]
            yield Finding(last, "uuid", f"the event id {uuid[:80]} is used {times} times")
    lives: dict[str, list[str]] = {}
    for event in events:
        known = lives.setdefault(event.by, [])
        if event.boot in known[:-1]:
            yield Finding(
                event.seq, "boot", f"{event.by} wrote as the life {event.boot[:40]}, which a later one had replaced"
            )
        elif not known or known[-1] != event.boot:
            known.append(event.boot)


def _epochs(events: list[Event]) -> Iterator[Finding]:
    newest = 0
    for event in events:
        if event.by.startswith("coordinator/"):
            if event.epoch < newest:
                yield Finding(
                    event.seq, "epoch", f"{event.type} is of epoch {event.epoch}, after an order of epoch {newest}"
                )
            newest = max(newest, event.epoch)
        elif event.epoch != newest:
            yield Finding(
                event.seq, "epoch", f"{event.by} answers in epoch {event.epoch}, but epoch {newest} was in force"
            )


# --- the machines --------------------------------------------------------------------------------


def _walk_lifecycle(events: list[Event]) -> Iterator[Finding]:
    state = lifecycle.TABLE.initial
    for event in events:
        try:
            state = lifecycle.TABLE.next(state, event.type)
        except IllegalEventError as error:
            yield Finding(event.seq, "legality", str(error))
            state = EVENT_TYPES[event.type].phase or state  # go on from where the event says it is


def _walk_agents(events: list[Event]) -> Iterator[Finding]:
    """Each agent's events end a step that its machine asks for, and answer the event that asked for it."""
    request = request_of(events)
    if request is None:
        return
    hosts = {"source": f"hostd/{request.source}", "target": f"hostd/{request.target}"}
    for role in AGENTS:
        walk = AgentWalk.start(role)
        for event in events:
            if event.by == hosts[role]:
                yield from _answer(walk, event)
            try:
                walk = walk.after(event.type, event.seq)
            except IllegalEventError as error:
                yield Finding(event.seq, "legality", str(error))
                break  # where this machine stands from here on cannot be known


def _answer(walk: AgentWalk, event: Event) -> Iterator[Finding]:
    busy = walk.step is not None or walk.state in FORMER_STEPS[walk.role]
    aside = event.type in AGENTS[walk.role].table.ignored and busy  # a failure, a report on the way
    if not aside and event.type not in walk.outcomes:
        yield Finding(
            event.seq, "pairing", f"nobody asked the {walk.role} for {event.type}: its machine was {walk.state!r}"
        )
    elif event.cause != walk.cause:
        yield Finding(
            event.seq,
            "pairing",
            f"{event.type} says it answers event {event.cause}, but what asked for it was event {walk.cause}",
        )


def _orders(events: list[Event]) -> Iterator[Finding]:
    """The coordinator writes in answer to the newest event that it has read, which the store's lock makes the last."""
    for place, event in enumerate(events):
        before = events[place - 1].seq if place else 0
        if event.by.startswith("coordinator/") and event.cause != before:
            yield Finding(
                event.seq, "pairing", f"{event.type} says it answers event {event.cause}, it was written after {before}"
            )
        elif not event.by.startswith("coordinator/") and not 0 < event.cause < event.seq:
            yield Finding(
                event.seq, "pairing", f"{event.type} says it answers event {event.cause}, which is not before it"
            )


def _ends(events: list[Event]) -> Iterator[Finding]:
    ended = ""
    for event in events:
        if event.type not in TERMINAL_PHASES:
            continue
        later_end = ended in ("completed", "finalised") and event.type in ENDS_AFTER_COMPLETED and event.type != ended
        if ended and not later_end:
            yield Finding(event.seq, "terminal", f"{event.type}, although the migration had ended with {ended}")
        ended = event.type
