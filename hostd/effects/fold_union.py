"""Turn the union into a plain volume."""

from __future__ import annotations

import time
from typing import ClassVar

from events.schema import FinaliseOrdered
from hostd.effects.arrival import Arrival, arrivals, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.return_policy import note_policy_due
from hostd.effects.shared import require_shares
from hostd.effects.supervise_container import note_our_stop, see_that_it_runs
from hostd.rootfs import remove_empty_stages
from hostd.verification import keep_evidence

LOOK_AGAIN_SECONDS = 30.0


class FoldUnion(Effect):
    """At the container's next stop, or now when a person ordered it; at once when nothing needs folding.

    Returns nothing while it has to wait, so that no event says it was done.
    """

    name: ClassVar[str] = "fold_union"

    def run(self, context: Context) -> Outcome:
        here = arrivals(context)
        federated = [arrival for arrival in here if arrival.union.federable and not arrival.union.state().settled]
        container_id = our_container(context)
        outage = 0.0
        if federated:
            running = container_id is not None and context.bench.engine.pid(container_id) is not None
            if running and not _ordered(context):
                context.poke_after = LOOK_AGAIN_SECONDS
                return None
            began = time.monotonic()
            if running:
                assert container_id is not None
                for arrival in federated:  # or it would be down for as long as another container uses its data
                    arrival.union.require_alone(container_id)
                note_our_stop(context)
                context.bench.engine.stop(container_id)
            for arrival in federated:
                _fold(arrival)
            if running:
                assert container_id is not None
                require_shares(context)
                context.bench.engine.start(container_id)
                outage = time.monotonic() - began
        for arrival in here:
            if arrival.union.stage.exists():
                arrival.union.put_away()
                keep_evidence(arrival.union, context.directory)
                gone_with_container = arrival.union.layer and arrival.union.layer_root() is None
                arrival.union.remove(abandon=gone_with_container)
                remove_empty_stages(arrival.union.stage)
        if container_id is not None and context.bench.engine.inspect(container_id) is not None:
            see_that_it_runs(context, container_id)
            note_policy_due(context, container_id)
        return {"outage_seconds": round(outage, 3)}


def _ordered(context: Context) -> bool:
    order = context.view.facts.get("finalise_ordered")
    return isinstance(order, FinaliseOrdered) and order.stop_now


def _fold(arrival: Arrival) -> None:
    arrival.union.unmount_all()
    arrival.union.fold()
