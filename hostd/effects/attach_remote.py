"""Open the read-only view of the source's trees, ahead of the stop, so that the outage need not wait for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import ClassVar

from events.errors import CancelledError, CargoError
from hostd.effects.arrival import arrivals, existing_arrivals
from hostd.effects.base import Context, Effect, Outcome

WITHOUT_UNION = ("precopy", "cold")
"""Strategies that bring everything before the start, so nothing is ever read through a remote view."""


class AttachRemote(Effect):
    """Nothing is looked up through it before the source has stopped, so nothing stale can be remembered."""

    name: ClassVar[str] = "attach_remote"

    def run(self, context: Context) -> Outcome:
        if context.view.strategy in WITHOUT_UNION:
            return None
        if context.view.state == "synced" and not context.view.rounds:
            return None  # the first round does it beside what it copies, and shall not wait for it
        here = arrivals(context)
        if _just_done(context) and all(arrival.union.state().remote for arrival in here if arrival.union.federable):
            return None
        for arrival in here:
            context.check_cancelled()
            if arrival.union.federable and not arrival.union.state().settled:
                arrival.attach_remote(context)
        return None

    def undo(self, context: Context) -> Outcome:
        """Take all of this migration's mounts down."""
        if "source_prepared" in context.view.facts:
            for arrival in existing_arrivals(context):
                arrival.union.unmount_all()
        return None


@contextlib.contextmanager
def attached_meanwhile(context: Context) -> Iterator[None]:
    """Open the views beside a round, which takes longer. Whatever fails is told, and done again by ``get_ready``."""

    def attach() -> None:
        try:
            AttachRemote().run(context)
        except CancelledError:
            pass
        except CargoError as error:
            context.log.warning("the view of the source could not be opened yet", reason=str(error))

    beside = threading.Thread(target=attach, name=f"attach:{context.migration}", daemon=True)
    beside.start()
    try:
        yield
    finally:
        beside.join()


def _just_done(context: Context) -> bool:
    """It was done before the stop was ordered, by this life of the agent, and nothing has failed since.

    Asking whether it answers would take time that the container is down. If it has broken in this moment, reads wait until
    ``supervise_container`` has opened it again.
    """
    view = context.view
    later = view.state in ("ready", "bracing", "uniting") and view.boots.get("target_braced") == context.bench.boot
    return later and f"hostd/{context.host}" not in view.failing
