"""What the protocol promises, as rules over a recorded history. Each is stated here anew, not derived from the
machines' tables, so that a mistake in a table is found too.

``REQUIRES`` says what must have happened before, ``FORBIDS`` what must not have; the functions below hold what takes
more than names: who may run the container, rounds, pauses, what became of each mount.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from coordinator.findings import Finding
from events import schema
from events.schema import Event

MOST_EXTRA_ROUNDS = 5
"""Beyond the request's limit, for trackers that were lost: no policy so far has ordered more."""

REQUIRES: dict[str, tuple[tuple[str, ...], ...]] = {
    "prepare_ordered": (("requested",),),
    "source_prepared": (("prepare_ordered",),),
    "image_wanted": (("source_prepared",),),
    "image_packed": (("image_wanted",),),
    "target_prepared": (("source_prepared",),),
    "sync_ordered": (("source_prepared",), ("target_prepared",)),
    "sync_armed": (("sync_ordered",),),
    "sync_finished": (("sync_armed",),),
    "brace_ordered": (("target_prepared",),),
    "target_braced": (("brace_ordered",),),
    "cutover_ordered": (("target_prepared",),),
    "source_stopped": (("cutover_ordered",),),
    "target_claimed": (("source_stopped",),),
    "target_started": (("source_stopped",), ("target_claimed",)),
    "source_digested": (("source_stopped",), ("target_claimed",)),
    "health_reported": (("target_started",),),
    "fill_finished": (("target_started",),),
    "verified": (("fill_finished",), ("source_digested",)),
    "release_ordered": (("verified",),),
    "source_released": (("verified",), ("release_ordered",)),
    "completed": (("verified",), ("source_released",)),
    "finalise_ordered": (("completed",),),
    "finalised": (("completed",),),
    "source_restored": (("abort_ordered", "target_stopped", "target_asserted_off"),),
    "target_cleaned": (("abort_ordered", "source_restored"),),
    "aborted": (("abort_ordered",), ("source_restored",), ("target_cleaned",)),
    "rollback_ordered": (("target_claimed",),),
    "target_asserted_off": (("rollback_ordered",),),
    "target_stopped": (("rollback_ordered",),),
    "carried_back": (("rollback_ordered",), ("target_stopped", "target_asserted_off")),
    "rolled_back": (
        ("rollback_ordered",),
        ("carried_back",),
        ("source_restored",),
        ("target_cleaned", "target_asserted_off"),
    ),
    "resumed": (("requested",),),
}
"""Before an event: of each group, at least one."""

FORBIDS: dict[str, tuple[str, ...]] = {
    "requested": ("requested", "rejected"),
    "rejected": ("requested", "rejected"),
    "prepare_ordered": ("prepare_ordered", "abort_ordered"),
    "sync_ordered": ("source_stopped", "abort_ordered"),
    "brace_ordered": ("source_stopped", "abort_ordered"),
    "target_braced": ("source_stopped", "abort_ordered"),
    "cutover_ordered": ("source_stopped", "abort_ordered"),
    "source_stopped": ("source_stopped", "abort_ordered"),
    "target_claimed": ("target_claimed", "abort_ordered", "source_restored"),
    "target_started": ("target_started", "abort_ordered", "rollback_ordered", "source_restored"),
    "abort_ordered": ("abort_ordered", "target_claimed"),
    "fill_finished": ("fill_finished", "rollback_ordered"),
    "source_digested": ("source_digested", "source_released", "rollback_ordered"),
    "verified": ("verified", "rollback_ordered"),
    "release_ordered": ("release_ordered", "abort_ordered", "rollback_ordered"),
    "source_released": ("source_released", "rollback_ordered"),
    "completed": ("abort_ordered", "rollback_ordered"),
    "finalise_ordered": ("finalise_ordered", "rollback_ordered"),
    "finalised": ("rollback_ordered",),
    "rollback_ordered": ("rollback_ordered", "abort_ordered"),
    "carried_back": ("carried_back",),
    "source_restored": ("source_restored",),
    "target_stopped": ("target_stopped", "target_asserted_off"),
    "target_cleaned": ("target_cleaned",),
}
"""Before an event: none of these."""


def check(events: Sequence[Event]) -> Iterator[Finding]:
    """Every rule that ``events`` break."""
    seen: set[str] = set()
    for event in events:
        for group in REQUIRES.get(event.type, ()):
            if seen.isdisjoint(group):
                yield Finding(event.seq, "order", f"{event.type} without {' or '.join(group)} before it")
        for other in FORBIDS.get(event.type, ()):
            if other in seen:
                yield Finding(event.seq, "order", f"{event.type} after {other}")
        seen.add(event.type)
    for rule in _RULES:
        yield from rule(events)


def _one_runner(events: Sequence[Event]) -> Iterator[Finding]:
    """Invariant 1: who may run the container is handed on, never shared, and never by a lease or a clock."""
    holder = "source"
    for event in events:
        if event.type == "source_stopped":
            holder = "nobody"
        elif event.type == "target_claimed":
            if holder != "nobody":
                yield Finding(event.seq, "one runner", "the target claims the container while the source may run it")
            holder = "target"
        elif event.type == "target_started" and holder != "target":
            yield Finding(event.seq, "one runner", f"the target starts the container while it belongs to the {holder}")
        elif event.type in ("target_stopped", "target_asserted_off"):
            holder = "nobody"
        elif event.type == "source_restored":
            if holder == "target":
                yield Finding(event.seq, "one runner", "the source has its container back while the target may run it")
            holder = "source"


def _rounds(events: Sequence[Event]) -> Iterator[Finding]:
    """Rounds count up from one; nothing is copied before the source has armed that round; no cut-over in between, and
    without any round only where the stopped source is copied as a whole."""
    ordered = armed = finished = 0
    limit: int | None = None
    for event in events:
        match event.data:
            case schema.Requested() as data:
                limit = data.request.max_rounds + MOST_EXTRA_ROUNDS
            case schema.SyncOrdered() as data:
                if data.round != ordered + 1:
                    yield Finding(event.seq, "rounds", f"round {data.round} is ordered after round {ordered}")
                if limit is not None and data.round > limit:
                    yield Finding(event.seq, "rounds", f"round {data.round} is over the request's limit")
                ordered = data.round
            case schema.SyncArmed() as data:
                if data.round != ordered:
                    yield Finding(event.seq, "rounds", f"round {data.round} is armed, round {ordered} was ordered")
                armed = data.round
            case schema.SyncFinished() as data:
                if data.round != armed:
                    yield Finding(
                        event.seq, "rounds", f"round {data.round} is finished, but the source had armed round {armed}"
                    )
                finished = data.round
            case schema.CutoverOrdered() as data:
                if finished != ordered:
                    yield Finding(event.seq, "rounds", f"the cut-over is ordered while round {ordered} is under way")
                if not ordered and not data.untracked:
                    yield Finding(event.seq, "rounds", "the cut-over is ordered before anything was copied")


def _pauses(events: Sequence[Event]) -> Iterator[Finding]:
    """While a person's pause lasts, and the container still runs on the source, nothing new is ordered."""
    paused = stopped = False
    for event in events:
        if event.type in ("paused", "resumed"):
            paused = event.type == "paused"
        elif event.type == "source_stopped":
            stopped = True
        elif (
            paused
            and not stopped
            and event.type
            in (
                "prepare_ordered",
                "sync_ordered",
                "brace_ordered",
                "cutover_ordered",
            )
        ):
            yield Finding(event.seq, "pause", f"{event.type} during a pause")


def _mounts(events: Sequence[Event]) -> Iterator[Finding]:
    """Invariants 2 and 4: no mount is forgotten on the way, neither by the stop nor by the comparison."""
    wanted: set[str] | None = None
    for event in events:
        match event.data:
            case schema.SourcePrepared() as data:
                wanted = {mount.destination for mount in data.mounts}
                continue
            case schema.SourceStopped() as data:
                given = [dirty.destination for dirty in data.dirty]
            case schema.SourceDigested() as data:
                given = [tree.destination for tree in data.trees]
            case schema.Verified() as data:
                given = list(data.digests)
            case _:
                continue
        if wanted is None:
            continue
        for destination in sorted(wanted - set(given)):
            yield Finding(event.seq, "mounts", f"{event.type} says nothing of the mount {destination!r}")
        for destination in sorted(set(given) - wanted):
            yield Finding(event.seq, "mounts", f"{event.type} speaks of {destination!r}, which is no mount of it")


def _container(events: Sequence[Event]) -> Iterator[Finding]:
    """What is moved is what was asked for, and the source's copy goes only where the request says so."""
    container_id = ""
    on_release = "keep"
    for event in events:
        match event.data:
            case schema.Requested() as data:
                container_id, on_release = data.container_id, data.request.on_release
                if data.request.source == data.request.target:
                    yield Finding(event.seq, "request", "source and target are the same host")
            case schema.SourcePrepared() as data if container_id and data.container_id != container_id:
                yield Finding(event.seq, "request", "the source prepared another container than was asked for")
            case schema.SourceReleased() as data if data.kept_as is None and on_release == "keep":
                yield Finding(event.seq, "source kept", "the source's copy was removed, the request says: keep")


def _writes(events: Sequence[Event]) -> Iterator[Finding]:
    """Invariant 2, on the way back: what the target wrote is given up only when a person said so, by name."""
    discard = False
    for event in events:
        match event.data:
            case schema.RollbackOrdered() as data:
                discard = data.discard_target_writes
                if discard and not data.by_person:
                    yield Finding(event.seq, "writes", "the target's writes are given up, and no person asked for it")
            case schema.TargetAssertedOff() as data:
                if not data.who.strip():
                    yield Finding(event.seq, "writes", "the target is said to be off, and nobody vouches for it")
            case schema.TargetStopped() as data:
                if not discard and not data.trees and _has_mounts(events):
                    yield Finding(event.seq, "writes", "the target does not say what the container wrote there")


def _has_mounts(events: Sequence[Event]) -> bool:
    return any(isinstance(event.data, schema.SourcePrepared) and event.data.mounts for event in events)


def _reversible(events: Sequence[Event]) -> Iterator[Finding]:
    """A roll-back needs the source's copy."""
    gone = False
    for event in events:
        if isinstance(event.data, schema.SourceReleased):
            gone = event.data.kept_as is None
        elif event.type == "rollback_ordered" and gone:
            yield Finding(event.seq, "source kept", "a roll-back is ordered although the source's copy is gone")


_RULES: tuple[Callable[[Sequence[Event]], Iterator[Finding]], ...] = (
    _one_runner,
    _rounds,
    _pauses,
    _mounts,
    _container,
    _writes,
    _reversible,
)
