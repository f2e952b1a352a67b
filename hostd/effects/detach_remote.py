"""Cut the link: afterwards nothing on this host refers to the source, which may be switched off."""

from __future__ import annotations

import time
from typing import ClassVar

from events.errors import TransientError
from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome

PATIENCE_SECONDS = 10.0
"""Longer than that, somebody really holds it, and a person should know."""
LOOK_AGAIN_SECONDS = 0.1


class DetachRemote(Effect):
    """The union goes on with what is local; the container notices nothing."""

    name: ClassVar[str] = "detach_remote"

    def run(self, context: Context) -> Outcome:
        for arrival in arrivals(context):
            if arrival.union.federable:
                _detach(context, arrival)
        context.bench.transport.let_go(peer_of_source(context))
        context.progress(
            {"step": "compared", "remaining_bytes": 0, "safe_to_switch_off_source": True, "finished": True}
        )
        return None


def _detach(context: Context, arrival: Arrival) -> None:
    """The kernel gives a file of the remote back a moment after its last reader has let go of it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            arrival.union.put_away()
            arrival.union.detach_remote()
        except TransientError:
            context.check_cancelled()
            if time.monotonic() > deadline:
                raise
            context.cancelled.wait(LOOK_AGAIN_SECONDS)
        else:
            return
