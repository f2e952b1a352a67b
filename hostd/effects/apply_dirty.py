"""After the stop: make the arrived trees equal to the frozen source, contents of stale files excepted.

Where the remainder is small, or the request wants no union, these are brought here as well: then nothing is stale
any more, and the tree takes its place as a plain directory.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from events.errors import PermanentError
from hostd import remainder
from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.limited import pull
from hostd.effects.manifests import entries_of
from hostd.effects.pull_round import teller
from hostd.manifest import Entry
from hostd.verification import remember_dirty_directories


class ApplyDirty(Effect):
    """Costs time in proportion to what changed, whatever the size of the data."""

    name: ClassVar[str] = "apply_dirty"

    def run(self, context: Context) -> Outcome:
        decision = remainder.decide(context.view)
        context.log.info("remainder", kind=decision.kind, reason=decision.why)
        published = {dirty.destination: dirty for dirty in context.view.dirty()}
        for arrival in arrivals(context):
            dirty = published.get(arrival.mount.destination)
            if dirty is None:
                raise PermanentError(f"the source published no list of changes of {arrival.mount.destination}")
            state = arrival.union.state()
            if state.settled or state.placed:
                continue
            entries = list(entries_of(context, dirty))
            if arrival.mount.single_file and entries:
                self._pull_again(context, arrival)
            elif decision.kind == "finished":
                entries = _bring(context, arrival, entries)
            arrival.union.apply(entries, everything=dirty.everything)
            remember_dirty_directories(arrival.union, entries)
        return {"remainder": decision.kind, "remainder_why": decision.why}

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


def _bring(context: Context, arrival: Arrival, entries: list[Entry]) -> list[Entry]:
    """The last round, from a source that stands still: contents of what is stale. Returns the entries, none of it stale."""
    wanted = [entry.path for entry in entries if entry.kind != "f" or entry.stale]
    tell = teller(context, arrival, "last round, the container is stopped")
    if not context.view.rounds:
        pull(
            context,
            arrival,
            arrival.union.upper_tree,
            expect_entries=1 if any(entry.path for entry in entries) else 0,
            on_progress=tell,
        )
    elif any(entry.kind == "f" and entry.stale for entry in entries):
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
