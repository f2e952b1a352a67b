"""Before anything is stopped: can the trackers say what changed since the last round began?"""

from __future__ import annotations

from typing import ClassVar

from events.schema import CutoverOrdered
from hostd.effects.base import Context, Effect, Outcome, TrackingLostError, stop_intended


class VouchForTracking(Effect):
    """Refuses the cut-over while the container still runs, so that another round can mend it.

    Once the stop has been begun it lets everything pass: ``publish_dirty`` then lists the whole tree.
    """

    name: ClassVar[str] = "vouch_for_tracking"

    def run(self, context: Context) -> Outcome:
        order = context.view.facts["cutover_ordered"]
        assert isinstance(order, CutoverOrdered)
        if stop_intended(context) or order.untracked:
            return None
        armed_by = context.view.boots.get("sync_armed")
        if armed_by != context.bench.boot:
            raise TrackingLostError("the agent was restarted since the last round began")
        for mount in context.view.source_prepared.mounts:
            tracker = context.bench.trackers.get((context.migration, mount.destination))
            if tracker is None:
                raise TrackingLostError(f"{mount.destination} is not being watched")
            if not tracker.trusted:
                raise TrackingLostError(f"{mount.destination}: {tracker.why}")
        return None
