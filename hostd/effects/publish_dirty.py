"""After the stop: drain the trackers and publish what changed since the last round began."""

from __future__ import annotations

from typing import ClassVar

from events.schema import DirtyManifest, Mount
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.publish import publish
from hostd.effects.track_changes import changed, whole
from hostd.layer_tracker import LayerTracker


class PublishDirty(Effect):
    """If a tracker cannot vouch for its set, the manifest lists the whole tree: slower, never wrong."""

    name: ClassVar[str] = "publish_dirty"

    def run(self, context: Context) -> Outcome:
        return {"dirty": tuple(self._publish(context, mount) for mount in context.view.source_prepared.mounts)}

    def _publish(self, context: Context, mount: Mount) -> DirtyManifest:
        tracker = context.bench.trackers.get((context.migration, mount.destination))
        armed_here = context.view.boots.get("sync_armed") == context.bench.boot
        cold = context.view.strategy == "cold"
        why = "nothing was copied before the stop" if cold else "the agent was restarted during the stop"
        if tracker is not None and armed_here:
            open_files = context.bench.open_files.get(context.migration, {})
            seen = tracker.drain(open_files) if isinstance(tracker, LayerTracker) else tracker.drain()
            if seen.trusted:
                entries = changed(mount, seen, open_files)
                return publish(context, mount, "stopped", entries, everything=False, why="")
            why = seen.why
        entries = whole(mount)
        context.log.warning("listing the whole tree", mount=mount.destination, reason=why)
        return publish(context, mount, "stopped", entries, everything=True, why=why[:500])
