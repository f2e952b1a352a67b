"""Make the places where the data will arrive: volumes, bind directories, stages."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from events.errors import TransientError
from hostd import mounts
from hostd.effects.arrival import NOT_EMPTY_MARK, Arrival, existing_arrivals, labels, volume_arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import load_spec


class CreateVolumes(Effect):
    """Creates volumes under our labels, and every mount's stage; finds out whether a union works here."""

    name: ClassVar[str] = "create_volumes"

    def run(self, context: Context) -> Outcome:
        spec = load_spec(context)
        for mount in context.view.source_prepared.mounts:
            if mount.kind == "volume":
                own = spec.volume_labels.get(mount.name)
                context.bench.engine.volume_create(mount.name, labels(context), own)
        for place in spec.shared:
            if place.kind == "volume":
                context.bench.engine.volume_attach(place, labels(context))
        for arrival in volume_arrivals(context):
            arrival.union.create()
            if not arrival.mount.single_file and not arrival.union.state().settled:
                (arrival.union.place / NOT_EMPTY_MARK).touch()
        return None

    def undo(self, context: Context) -> Outcome:
        """Remove what was created here. Refuses while anything is still mounted below it."""
        if "source_prepared" not in context.view.facts:
            return None
        for arrival in existing_arrivals(context):
            if not _ours(context, arrival):
                continue
            _remove_mark(arrival)
            arrival.union.remove(abandon=True, place_too=True)
            if arrival.mount.kind == "volume":
                _require_no_mounts(arrival.union.place.parent)
                context.bench.engine.volume_remove(arrival.mount.name)
        for shared in context.view.source_prepared.shared:
            if shared.kind == "volume":
                _forget_share(context, shared.name)
        return None


def _forget_share(context: Context, name: str) -> None:
    """Remove a volume that was made here for a share. What lies on the share is not touched: it is not mounted."""
    volume = context.bench.engine.volume_inspect(name) or {}
    theirs = volume.get("Labels") or {}
    if all(theirs.get(key) == value for key, value in labels(context).items()):
        _require_no_mounts(Path(volume["Mountpoint"]))
        context.bench.engine.volume_remove(name)


def _ours(context: Context, arrival: Arrival) -> bool:
    if arrival.mount.kind == "bind":
        return arrival.union.stage.exists()
    volume = context.bench.engine.volume_inspect(arrival.mount.name) or {}
    theirs = volume.get("Labels") or {}
    return all(theirs.get(key) == value for key, value in labels(context).items())


def _remove_mark(arrival: Arrival) -> None:
    if not arrival.mount.single_file and not mounts.is_mounted(arrival.union.place):
        (arrival.union.place / NOT_EMPTY_MARK).unlink(missing_ok=True)


def _require_no_mounts(directory: Path) -> None:
    """Docker removes a volume's directory with everything below it, mounted or not."""
    if below := mounts.mounts_below(directory):
        raise TransientError(f"{below[0].point!r} is still mounted; the volume was not removed")
