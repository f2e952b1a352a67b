"""After the stop: make the arrived trees equal to the frozen source, contents of stale files excepted.

Where the remainder is small, or the request wants no union, these are brought here as well, the least of it through the view
that is open: then nothing is stale any more, and the tree takes its place as a plain directory. So are those of the container's writable layer always:
overlayfs takes no overlay as its upper directory, so there can be no union beneath it.
"""

from __future__ import annotations

import time
from typing import ClassVar

import msgspec

from events.errors import PermanentError
from hostd import remainder
from hostd.at_hand import read_at_hand
from hostd.effects.arrival import Arrival, arrivals, layer_arrival, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.limited import pull
from hostd.effects.manifests import entries_of
from hostd.effects.open_layer import ensure_layer, withdraw_layer
from hostd.effects.pull_round import teller
from hostd.manifest import Entry
from hostd.placement import Giver
from hostd.verification import remember_dirty_directories


class ApplyDirty(Effect):
    """Costs time in proportion to what changed, whatever the size of the data."""

    name: ClassVar[str] = "apply_dirty"

    def run(self, context: Context) -> Outcome:
        ensure_layer(context)
        decision = remainder.decide(context.view)
        published = {dirty.destination: dirty for dirty in context.view.dirty()}
        began = time.monotonic()
        at_hand = _AtHand()
        asked_all, missing = True, 0
        for arrival in arrivals(context):
            dirty = published.get(arrival.mount.destination)
            if dirty is None:
                raise PermanentError(f"the source published no list of changes of {arrival.mount.destination}")
            entries = list(entries_of(context, dirty))
            if arrival.union.layer and entries:
                withdraw_layer(context, "what the container wrote outside of its mounts changed until it stopped")
                arrival = layer_arrival(context) or arrival  # noqa: PLW2901 (it may have another place now)
            state = arrival.union.state()
            if state.settled or state.placed:
                asked_all = False
                missing += state.placed
                continue
            if arrival.mount.single_file and entries:
                self._pull_again(context, arrival)
            elif arrival.union.layer or (decision.kind == "finished" and not decision.at_hand):
                entries = _bring(context, arrival, entries)
            asked = decision.at_hand and arrival.union.federable
            giver = at_hand.giver(arrival) if asked else None
            applied = arrival.union.apply(entries, everything=dirty.everything, contents=giver)
            missing += len(applied.placeholders)
            if asked and applied.placeholders and decision.kind == "finished":
                entries = _bring(context, arrival, entries)
                arrival.union.apply(entries, everything=dirty.everything)
            remember_dirty_directories(arrival.union, entries)
        kind, why = decision.kind, decision.why
        # After a crash it lies there already; unless a last round was decided, nothing else can have brought it.
        if decision.at_hand and not missing and (asked_all or kind == "federated"):
            kind, why = "finished", f"{decision.amount} were read through the open view while the container was stopped"
        context.log.info("remainder", kind=kind, reason=why, seconds=round(time.monotonic() - began, 3))
        return {"remainder": kind, "remainder_why": why}

    @staticmethod
    def _pull_again(context: Context, arrival: Arrival) -> None:
        union = arrival.union
        context.bench.transport.rsync_pull(
            peer_of_source(context),
            arrival.mount.tree,
            union.upper_tree,
            temp_dir=union.incoming,
            single_file=True,
            reread=True,
            cancelled=context.cancelled,
        )


class _AtHand:
    """Asks the view of each tree, for no more than a moment in all."""

    def __init__(self) -> None:
        self._seconds = remainder.AT_HAND_SECONDS

    def giver(self, arrival: Arrival) -> Giver:
        """For ``Union.apply``."""

        def give(wanted: list[tuple[bytes, int]]) -> dict[bytes, bytes]:
            began = time.monotonic()
            try:
                return read_at_hand(arrival.union.stage, wanted, began + self._seconds)
            finally:
                self._seconds = max(0.0, self._seconds - (time.monotonic() - began))

        return give


def _bring(context: Context, arrival: Arrival, entries: list[Entry]) -> list[Entry]:
    """The last round, from a source that stands still: contents of what is stale. Returns the entries, none of it stale."""
    wanted = [entry.path for entry in entries if entry.kind != "-" and (entry.kind != "f" or entry.stale)]
    tell = teller(context, arrival, "last round, the container is stopped")
    if not any(entry.kind == "f" and entry.stale for entry in entries):
        pass  # names and metadata are in the list itself
    elif not context.view.rounds:
        pull(
            context,
            arrival,
            arrival.union.upper_tree,
            expect_entries=1 if any(entry.path for entry in entries) else 0,
            on_progress=tell,
        )
    else:
        arrival.union.prune(entries)
        pull(
            context,
            arrival,
            arrival.union.upper_tree,
            files_from=wanted,
            reread=True,
            on_progress=tell,
        )
    return [msgspec.structs.replace(entry, stale=False) if entry.kind == "f" else entry for entry in entries]
