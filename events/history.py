"""Whether a stored history is whole: no gap, no edit, no missing tail, nothing wiped (FAULTS B13, B15).

Pure. ``Store.read`` and ``Store.append`` ask here before anybody acts on what was read. A hole in a history
is always an error and never an absence.
"""

from __future__ import annotations

from events.errors import ChainError, ConflictError
from events.schema import Event, Head, check_chain


def continued(migration: str, events: list[Event], head: Head | None, first: int, after: Event | None) -> list[Event]:
    """``events`` without the one before, after checking that they run unbroken from there to ``head``."""
    if head is None:
        if events or after is not None or first > 0:
            raise ChainError(f"migration {migration}: the head is missing although it has events: the history was cut")
        return []
    previous = after
    if first > 0:
        if not events or events[0].seq != first:
            raise ChainError(f"migration {migration}: event {first}, which was there, is missing")
        if after is not None and events[0].raw != after.raw:
            raise ChainError(f"migration {migration}: event {first} is not what it was: the history was changed")
        previous, events = events[0], events[1:]
    try:
        check_chain(events, previous)
    except ChainError as error:
        raise ChainError(f"migration {migration}: {error}") from error
    newest = events[-1] if events else previous
    if newest is None or newest.seq != head.seq or newest.digest != head.digest:
        raise ChainError(
            f"migration {migration}: the newest event is {newest.seq if newest else 0} "
            f"but the head says {head.seq}: the history was cut or changed"
        )
    return events


def check_continues(migration: str, previous: Event | None, head: Head | None) -> None:
    """Raise unless ``head`` is the head that ``previous`` left."""
    if previous is None:
        if head is not None:
            raise ConflictError(f"migration {migration} exists already, with {head.seq} events")
        return
    if head is None:
        raise ChainError(
            f"migration {migration}: the head is missing although event {previous.seq} was read before: "
            "the history was wiped or cut, so nobody may act on it"
        )
    if head.seq > previous.seq:
        raise ConflictError(f"migration {migration} has gone on to event {head.seq}; we knew {previous.seq}")
    if head.seq < previous.seq or head.digest != previous.digest:
        raise ChainError(
            f"migration {migration}: the head says event {head.seq} "
            f"but event {previous.seq} was read before: the history was cut or changed"
        )
