"""Put each tree into its place: on the union where contents are missing, plain where nothing is."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import arrivals, existing_arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.verification import mark_mount


class MountUnion(Effect):
    """Only after the source has stopped: what a union shows as its lower layer must never change."""

    name: ClassVar[str] = "mount_union"

    def run(self, context: Context) -> Outcome:
        for arrival in arrivals(context):
            union = arrival.union
            state = union.state()
            if state.settled or (union.layer and not union.place.is_dir()):
                continue  # a layer whose container has gone is put into the next one by ``start_container``
            if not state.placed and "target_claimed" not in context.view.facts:
                mark_mount(union)  # later, what the container changed must stay younger than the mark
            if not state.placed and not union.remaining(first_only=True):
                if union.federable:
                    union.unmount_all()
                union.place_plain()
                continue
            if not state.placed and not state.remote:  # a reboot has taken it away
                arrival.attach_remote(context)
            union.mount_lower()
            union.mount_merged()
        return None

    def undo(self, context: Context) -> Outcome:
        """Take the unions down. No data is touched."""
        if "source_prepared" in context.view.facts:
            for arrival in existing_arrivals(context):
                arrival.union.unmount_all()
        return None
