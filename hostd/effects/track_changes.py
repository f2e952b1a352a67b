"""Watch every tree of the container's data, before the first byte is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import msgspec

from events.schema import Mount
from hostd.dirty import DirtySet, dirty_manifest, everything
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.measure_mounts import trees_of
from hostd.layer import ROOTFS, carried
from hostd.layer_tracker import LayerTracker
from hostd.manifest import Entry
from hostd.openfiles import FileKey, OpenFile
from hostd.tracker import Tracker


class TrackChanges(Effect):
    """Starts one tracker a tree. Trackers die with the process; ``arm_tracking`` then starts new ones."""

    name: ClassVar[str] = "track_changes"

    def run(self, context: Context) -> Outcome:
        for mount in trees_of(context):
            ensure_tracker(context, mount)
            context.check_cancelled()
        return None

    def undo(self, context: Context) -> Outcome:
        """Stop watching."""
        for key in [key for key in context.bench.trackers if key[0] == context.migration]:
            context.bench.trackers.pop(key).stop()
        return None


def ensure_tracker(context: Context, mount: Mount) -> tuple[Tracker | LayerTracker, bool]:
    """The tracker of one tree, and whether it had to be started just now."""
    key = (context.migration, mount.destination)
    tracker = context.bench.trackers.get(key)
    if tracker is not None:
        return tracker, False
    kind = LayerTracker if mount.kind == ROOTFS else Tracker
    tracker = kind(Path(mount.tree), name=f"{context.migration}:{mount.destination}")
    tracker.start()
    context.bench.trackers[key] = tracker
    return tracker, True


def changed(mount: Mount, seen: DirtySet, open_files: Mapping[FileKey, OpenFile]) -> list[Entry]:
    """What the tracker of ``mount`` saw, as it belongs into a manifest. ``open_files``: at the generation's end."""
    if mount.kind == ROOTFS:
        found = carried(mount, dirty_manifest(Path(mount.tree), seen))  # open files: weighed by its tracker already
        return [
            msgspec.structs.replace(entry, stale=True) if entry.kind == "d" and entry.path in seen.named else entry
            for entry in _as_looked_at(found, seen)
        ]
    return dirty_manifest(Path(mount.tree), seen, open_files)


def _as_looked_at(entries: Iterable[Entry], seen: DirtySet) -> Iterator[Entry]:
    """``entries``, of which what the look did not find counts as gone, though it may have come since: the next one will
    find it. So a copy of what is listed takes no name of which the tracker does not know.
    """
    below: bytes | None = None
    for entry in entries:
        if below is not None and entry.path.startswith(below):
            continue
        if seen.known is not None and entry.kind != "-" and entry.path not in seen.known:
            below = entry.path + b"/"
            yield Entry(path=entry.path, kind="-")
        else:
            yield entry


def whole(mount: Mount) -> list[Entry]:
    """The whole tree of ``mount``, all contents stale."""
    found: Iterable[Entry] = everything(Path(mount.tree))
    return list(carried(mount, found))
