"""Begin a new tracking generation, and list what the one before saw."""

from __future__ import annotations

from typing import ClassVar

from events.schema import DirtyManifest, SyncOrdered
from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome
from hostd.effects.publish import publish
from hostd.effects.track_changes import changed, ensure_tracker, whole
from hostd.entry import plain
from hostd.layer_tracker import LayerTracker
from hostd.openfiles import writable_files
from hostd.tracker import Tracker


class ArmTracking(Effect):
    """From its return on, every change belongs to the new generation; so the target may begin to copy."""

    name: ClassVar[str] = "arm_tracking"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        number = context.view.round
        order = context.view.facts["sync_ordered"]
        assert isinstance(order, SyncOrdered)
        if context.bench.engine.inspect(prepared.container_id) is None:  # its writable layer went with it
            raise ContainerChangedError(f"the container {prepared.container_name!r} has been removed")
        pid = context.bench.engine.pid(prepared.container_id)
        dirty: list[DirtyManifest] = []
        distrust: list[str] = []
        all_plain: list[str] = []
        layers: list[LayerTracker] = []
        # A step that is repeated finds the tracker that its first attempt started: only the life that armed the round
        # before can have watched since then.
        same_life = context.view.boots.get("sync_armed") == context.bench.boot
        for mount in prepared.mounts:
            tracker, fresh = ensure_tracker(context, mount)
            layers += [tracker] if isinstance(tracker, LayerTracker) else []
            open_files = writable_files(pid) if pid else {}
            seen = tracker.arm(number, open_files)
            if not order.contents:
                entries = whole(mount)
                dirty.append(publish(context, mount, f"round-{number}", entries, everything=True, why=order.why))
                continue
            if number == 1:  # copies everything anyway
                # Since before the look at the whole tree nothing was missed, and what was seen is looked at once more.
                known = isinstance(tracker, Tracker) and tracker.plain and seen.trusted
                if known and all(map(plain, changed(mount, seen, open_files))):
                    all_plain.append(mount.destination)
                continue
            if fresh or not same_life or not seen.trusted:
                distrust.append(f"{mount.destination}: {seen.why or 'the agent was restarted'}")
                continue
            entries = changed(mount, seen, open_files)
            dirty.append(publish(context, mount, f"round-{number}", entries, everything=False, why=""))
        for layer in layers:
            layer.copy_takes(everything=number == 1 or not order.contents or bool(distrust))
        if distrust:
            return {"compare": True, "why": "; ".join(distrust)[:1000], "dirty": ()}
        return {"dirty": tuple(dirty), **({"plain": tuple(all_plain)} if all_plain else {})}
