"""Events survive storage unchanged, and nothing that is not exactly one of them passes for one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.errors import ChainError, SchemaError
from events.schema import (
    ENVELOPE_VERSION,
    EVENT_TYPES,
    GENESIS,
    MAX_EVENT_BYTES,
    TERMINAL_PHASES,
    TYPE_OF,
    Data,
    Event,
    Head,
    PrepareOrdered,
    Request,
    Requested,
    Stamp,
    StepFailed,
    check_chain,
    decode_event,
    decode_head,
    encode_head,
    head_after,
    next_event,
    plain,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
STAMPS = st.builds(Stamp, uuid=TEXT, at=TEXT, by=TEXT, boot=TEXT, epoch=st.integers(0, 2**62))


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Anything that the type ``kind`` of a payload's field allows."""
    info = msgspec.inspect
    if isinstance(kind, info.StructType):
        return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})
    if isinstance(kind, info.VarTupleType):
        return st.lists(values(kind.item_type), max_size=2).map(tuple)
    if isinstance(kind, info.DictType):
        return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=2)
    if isinstance(kind, info.UnionType):
        return st.one_of([values(member) for member in kind.types])
    if isinstance(kind, info.LiteralType):
        return st.sampled_from(kind.values)
    simple: dict[type, st.SearchStrategy[Any]] = {
        info.StrType: TEXT,
        info.IntType: st.integers(-(2**63), 2**63 - 1),
        info.BoolType: st.booleans(),
        info.FloatType: st.floats(allow_nan=False, allow_infinity=False),
        info.NoneType: st.none(),
    }
    return simple[type(kind)]


PAYLOADS = st.one_of([values(msgspec.inspect.type_info(row.data)) for row in EVENT_TYPES.values()])


def stamp(number: int = 1) -> Stamp:
    return Stamp(uuid=f"uuid-{number}", at="2031-05-04T12:00:00.000Z", by="hostd/alpha", boot="b", epoch=3)


def requested() -> Requested:
    return Requested(request=Request(container="web", source="alpha", target="beta"), container_id="c1")


def chain(*payloads: Data) -> list[Event]:
    events: list[Event] = []
    for number, data in enumerate(payloads):
        events.append(next_event(events[-1] if events else None, data, cause=number, stamp=stamp(number)))
    return events


@given(PAYLOADS, STAMPS, st.integers(0, 2**31))
def test_every_event_is_decoded_to_what_was_encoded(data: Data, stamped: Stamp, cause: int) -> None:
    """P5: what is folded later is what was decided."""
    event = next_event(None, data, cause=cause, stamp=stamped)
    again = decode_event(event.raw)
    assert again == event
    assert again.data == data
    assert (again.uuid, again.by, again.epoch) == (stamped.uuid, stamped.by, stamped.epoch)
    assert next_event(None, data, cause=cause, stamp=stamped).raw == event.raw
    json.dumps(plain(data))


@given(st.lists(PAYLOADS, min_size=1, max_size=6), st.data())
@settings(max_examples=50)
def test_a_chain_accepts_exactly_what_was_appended(payloads: list[Data], choose: st.DataObject) -> None:
    """P6, B15: a missing, repeated, swapped or edited event is noticed."""
    events = chain(*payloads)
    check_chain(events)
    check_chain(events[1:], events[0])
    at = choose.draw(st.integers(0, len(events) - 1))
    with pytest.raises(ChainError):
        check_chain([*events[: at + 1], events[at], *events[at + 1 :]])
    if at < len(events) - 1:
        with pytest.raises(ChainError):
            check_chain(events[:at] + events[at + 1 :])
        edited = decode_event(events[at].raw.replace(b'"epoch":3', b'"epoch":4'))
        with pytest.raises(ChainError):
            check_chain([*events[:at], edited, *events[at + 1 :]])


def test_the_first_event_continues_nothing() -> None:
    (first,) = chain(requested())
    assert (first.seq, first.prev) == (1, GENESIS)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_never_crash(raw: bytes) -> None:
    """F2: whatever lies in the store."""
    with pytest.raises(SchemaError):
        decode_event(raw)
    with pytest.raises(SchemaError):
        decode_head(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    )
)
def test_arbitrary_json_is_refused_and_never_crashes(value: Any) -> None:
    with pytest.raises(SchemaError):
        decode_event(json.dumps(value).encode())


def envelope(**changes: Any) -> bytes:
    (event,) = chain(PrepareOrdered())
    fields = json.loads(event.raw)
    for name, value in changes.items():
        if value is ...:
            del fields[name]
        else:
            fields[name] = value
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"v": ENVELOPE_VERSION + 1},
        {"v": "1"},
        {"type": "teleport_ordered"},
        {"type": 7},
        {"surprise": 1},
        {"data": {"surprise": 1}},
        {"data": []},
        {"seq": "1"},
        {"seq": 1.5},
        {"epoch": None},
        {"uuid": ...},
        {"prev": ...},
        {"data": ...},
    ],
)
def test_what_is_not_exactly_an_event_is_refused(changes: dict[str, Any]) -> None:
    """A17: unknown versions, types and fields are refused, never guessed at."""
    decode_event(envelope())
    with pytest.raises(SchemaError):
        decode_event(envelope(**changes))


@pytest.mark.parametrize("raw", [b"", b"{", b"null", b"[" * 5000, b'{"data":' * 5000, b"\xff\xfe", b"NaN"])
def test_malformed_text_is_refused(raw: bytes) -> None:
    with pytest.raises(SchemaError):
        decode_event(raw)


def test_an_event_may_be_64_kib_and_not_one_byte_more() -> None:
    """B8: at the limit and one above."""

    def failed(size: int) -> StepFailed:
        return StepFailed(step="s", reason="x" * size, retrying=False, attempt=1, advice="a")

    (empty,) = chain(failed(0))
    room = MAX_EVENT_BYTES - len(empty.raw)
    (largest,) = chain(failed(room))
    assert len(largest.raw) == MAX_EVENT_BYTES
    with pytest.raises(SchemaError, match="limit"):
        chain(failed(room + 1))
    with pytest.raises(SchemaError, match="limit"):
        decode_event(largest.raw + b" ")


def test_what_is_no_payload_cannot_be_appended() -> None:
    with pytest.raises(SchemaError, match="payload"):
        next_event(None, Request(container="c", source="a", target="b"), cause=0, stamp=stamp())


def test_every_payload_has_one_name_and_every_name_one_payload() -> None:
    assert len(TYPE_OF) == len(EVENT_TYPES)
    assert all(row.data.__doc__ for row in EVENT_TYPES.values())
    assert {row.phase for row in EVENT_TYPES.values()} >= TERMINAL_PHASES


def test_the_head_keeps_who_and_where_and_follows_the_phase() -> None:
    first, second, third = chain(
        requested(), PrepareOrdered(), StepFailed(step="s", reason="r", retrying=True, attempt=1, advice="a")
    )
    head = head_after(None, first)
    assert (head.phase, head.container, head.source, head.target) == ("admit", "web", "alpha", "beta")
    head = head_after(head_after(head, second), third)
    assert (head.seq, head.uuid, head.digest) == (3, third.uuid, third.digest)
    assert (head.phase, head.container, head.container_id) == ("prepare", "web", "c1")
    assert not head.terminal


@given(values(msgspec.inspect.type_info(Head)))
def test_a_head_is_decoded_to_what_was_encoded(head: Head) -> None:
    assert decode_head(encode_head(head)) == head
