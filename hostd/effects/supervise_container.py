"""Keep the container running the way its own restart policy says, while Docker's is disarmed.

A host that rebooted has lost its mounts: they come back first, the container second, never the other way
round.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hostd.effects.arrival import arrivals, our_container, peer_of_source
from hostd.effects.base import Context, Effect, Outcome

RESTART_DELAY_SECONDS = 1.0
"""Between two starts of a container that ends by itself, so that a crash loop does not eat the host."""


class SuperviseContainer(Effect):
    """Looks, mounts what is missing, starts what should run."""

    name: ClassVar[str] = "supervise_container"

    def run(self, context: Context) -> Outcome:
        engine = context.bench.engine
        container_id = our_container(context)
        if container_id is None:
            context.log.warning("the container is gone from this host; somebody removed it")
            return None
        inspected = engine.inspect(container_id)
        if inspected is None or inspected["State"]["Running"]:
            return None
        _mount_again(context)
        if not should_run(context, container_id, inspected["State"]):
            return None
        context.log.warning("starting the container again", exit_code=inspected["State"].get("ExitCode"))
        engine.start(container_id)
        context.poke_after = RESTART_DELAY_SECONDS
        return None


def _mount_again(context: Context) -> None:
    for arrival in arrivals(context):
        state = arrival.union.state()
        if state.settled or state.placed or arrival.mount.single_file:
            continue
        if arrival.union.fill_list():
            arrival.union.attach_remote(context.bench.transport, peer_of_source(context), arrival.mount.tree)
        arrival.union.mount_lower()
        arrival.union.mount_merged()


def should_run(context: Context, container_id: str, state: dict[str, Any]) -> bool:
    """What Docker would decide by the container's own policy."""
    prepared = context.view.source_prepared
    if container_id in context.bench.manual_stops:
        return False
    match prepared.restart_policy:
        case "always" | "unless-stopped":
            return True
        case "on-failure":
            return int(state.get("ExitCode") or 0) != 0
    return False
