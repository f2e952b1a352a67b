"""After the stop: make the arrived trees equal to the frozen source, contents of stale files excepted."""

from __future__ import annotations

from typing import ClassVar

from events.errors import PermanentError
from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.manifests import entries_of
from hostd.verification import remember_dirty_directories


class ApplyDirty(Effect):
    """Costs time in proportion to what changed, whatever the size of the data."""

    name: ClassVar[str] = "apply_dirty"

    def run(self, context: Context) -> Outcome:
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
            arrival.union.apply(entries, everything=dirty.everything)
            remember_dirty_directories(arrival.union, entries)
        return None

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
