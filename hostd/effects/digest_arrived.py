"""Read everything that has arrived, while the source reads what it had: the comparison then need not."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from events.errors import CancelledError, CargoError
from hostd.effects.arrival import arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.priority import in_background
from hostd.verification import list_arrived


class DigestArrived(Effect):
    """Only saves time: what it does not get done is done by ``verify_trees``, which also tells what cannot be read."""

    name: ClassVar[str] = "digest_arrived"

    def run(self, context: Context) -> Outcome:
        for arrival in arrivals(context):
            if arrival.union.layer and arrival.union.layer_root() is None:
                continue
            try:
                in_background(partial(list_arrived, arrival.union, check=context.check_cancelled))
            except CancelledError:
                raise
            except CargoError as error:
                context.log.warning("what has arrived could not be described ahead", reason=str(error))
        return None
