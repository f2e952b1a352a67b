"""Put each tree into its place: on the union where contents are missing, plain where nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hostd.effects.arrival import Arrival, arrivals, existing_arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.graft import Graft
from hostd.standing import note
from hostd.verification import mark_mount


def grafts(here: Sequence[Arrival]) -> list[Graft]:
    """What a container that waits at its gate still has to be given; its layer is there already."""
    return [Graft(a.union.place, a.mount.destination) for a in here if not a.union.layer]


def just_mounted(context: Context) -> bool:
    """Whether this life of the agent mounted everything right before the claim, and nothing has failed since."""
    view = context.view
    fresh = view.boots.get("target_claimed") == context.bench.boot and f"hostd/{context.host}" not in view.failing
    return fresh and all(state.placed or state.settled for state in (a.union.state() for a in arrivals(context)))


class MountUnion(Effect):
    """Only after the source has stopped: what a union shows as its lower layer must never change."""

    name: ClassVar[str] = "mount_union"

    def run(self, context: Context) -> Outcome:
        here = arrivals(context)
        for arrival in here:
            union = arrival.union
            state = union.state()
            if state.settled or (union.layer and not union.place.is_dir()):
                continue  # a layer whose container has gone is put into the next one by ``start_container``
            if not state.placed and "target_claimed" not in context.view.facts:
                mark_mount(union)  # later, what the container changed must stay younger than the mark
            if not state.placed and not union.remaining(first_only=True):
                union.place_plain(untouched="target_claimed" not in context.view.facts)
                continue
            # A reboot takes it away, also where ``cargo-hostd mounts`` has mounted the union since.
            if not state.remote and (not state.placed or union.remaining(first_only=True)):
                arrival.attach_remote(context)
            union.mount_lower()
            union.mount_merged()
        note(context.directory, [arrival.union for arrival in here])
        warm = context.bench.warm.get(context.migration)
        if warm is not None and "target_claimed" not in context.view.facts:
            warm.prepare(grafts(here))  # while the claim is appended; nothing runs before that
        return None

    def undo(self, context: Context) -> Outcome:
        """Take the unions down. No data is touched."""
        if "source_prepared" in context.view.facts:
            for arrival in existing_arrivals(context):
                arrival.union.unmount_all()
        return None
