"""Watch every data mount of the container, before the first byte is copied."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.shared import moving_mounts
from hostd.tracker import Tracker


class TrackChanges(Effect):
    """Starts one tracker a mount. Trackers die with the process; ``arm_tracking`` then starts new ones."""

    name: ClassVar[str] = "track_changes"

    def run(self, context: Context) -> Outcome:
        inspected = context.bench.engine.inspect(context.view.requested.container_id) or {}
        for mount in moving_mounts(context, inspected):
            ensure_tracker(context, mount.destination, mount.tree)
            context.check_cancelled()
        return None

    def undo(self, context: Context) -> Outcome:
        """Stop watching."""
        for key in [key for key in context.bench.trackers if key[0] == context.migration]:
            context.bench.trackers.pop(key).stop()
        return None


def ensure_tracker(context: Context, destination: str, tree: str) -> tuple[Tracker, bool]:
    """The tracker of one mount, and whether it had to be started just now."""
    key = (context.migration, destination)
    tracker = context.bench.trackers.get(key)
    if tracker is not None:
        return tracker, False
    tracker = Tracker(Path(tree), name=f"{context.migration}:{destination}")
    tracker.start()
    context.bench.trackers[key] = tracker
    return tracker, True
