"""Open the read-only view of the source's trees, ahead of the stop, so that the outage need not wait for it."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import Arrival, existing_arrivals, volume_arrivals
from hostd.effects.base import Context, Effect, Outcome

WITHOUT_UNION = ("precopy", "cold")
"""Strategies that bring everything before the start, so nothing is ever read through a remote view."""


class AttachRemote(Effect):
    """Nothing is looked up through it before the source has stopped, so nothing stale can be remembered."""

    name: ClassVar[str] = "attach_remote"

    def run(self, context: Context) -> Outcome:
        if context.view.strategy in WITHOUT_UNION:
            call_off_opening(context)  # the order has chosen another strategy than the request left open
            return None
        opening = context.bench.openings.get(context.migration)
        if opening is not None:
            opening.wait(context.check_cancelled)
            context.bench.openings.pop(context.migration, None)
            if (failure := opening.failure) is not None:
                context.log.warning(
                    "the view of the source could not be opened yet", reason=str(failure) or repr(failure)
                )
        if not _just_done(context) or not all(arrival.union.state().remote for arrival in _federable(context)):
            attach_all(context)
        return None

    def undo(self, context: Context) -> Outcome:
        """Take all of this migration's mounts down."""
        detach_all(context)
        return None


def call_off_opening(context: Context) -> None:
    """End what ``open_views`` has begun: afterwards nothing is being mounted any more. Harmless when it has ended."""
    opening = context.bench.openings.pop(context.migration, None)
    if opening is not None:
        opening.call_off()


def attach_all(context: Context) -> None:
    """Open every view that is not open. Raises TransientError, PermanentError, CancelledError."""
    for arrival in _federable(context):
        context.check_cancelled()
        if not arrival.union.state().settled:
            arrival.attach_remote(context)


def detach_all(context: Context) -> None:
    """Take all of this migration's mounts down. Harmless when repeated. Raises TransientError while somebody uses them."""
    if "source_prepared" in context.view.facts:
        for arrival in existing_arrivals(context):
            arrival.union.unmount_all()


def _federable(context: Context) -> list[Arrival]:
    return [arrival for arrival in volume_arrivals(context) if arrival.union.federable]


def _just_done(context: Context) -> bool:
    """It was done before the stop was ordered, by this life of the agent, and nothing has failed since.

    Asking whether it answers would take time that the container is down. If it has broken in this moment, reads wait until
    ``supervise_container`` has opened it again.
    """
    view = context.view
    later = view.state in ("ready", "bracing", "uniting") and view.boots.get("target_braced") == context.bench.boot
    return later and f"hostd/{context.host}" not in view.failing
