"""Keep the container running the way its own restart policy says, while Docker's is disarmed.

A host that rebooted has lost its mounts: they come back first, the container second, never the other way
round.
"""

from __future__ import annotations

from typing import Any, ClassVar

from events.errors import TransientError
from hostd.effects.arrival import arrivals, our_container, peer_of_source
from hostd.effects.base import Context, Effect, Outcome

RESTART_DELAY_SECONDS = 1.0
"""Between two starts of a container that ends by itself, so that a crash loop does not eat the host."""
STOPPED_BY_US = "stopped-by-us"
REPAIR_DELAY_SECONDS = 5.0
"""Between two attempts to open the view of a source that cannot be reached."""


class SuperviseContainer(Effect):
    """Looks, mounts what is missing, repairs what has died, starts what should run."""

    name: ClassVar[str] = "supervise_container"

    def run(self, context: Context) -> Outcome:
        engine = context.bench.engine
        container_id = our_container(context)
        if container_id is None:
            context.log.warning("the container is gone from this host; somebody removed it")
            return None
        inspected = engine.inspect(container_id)
        if inspected is None:
            return None
        if inspected["State"]["Running"]:
            if not _a_server_has_died(context):
                _repair_views(context)
                return None
            # Every look at its data is an error by now, and a union can be mounted anew only without the container.
            context.log.warning("the lower layer has died under the container, which is restarted on a new one")
            note_our_stop(context)
            engine.stop(container_id)
        _mount_again(context)
        if not (stopped_by_us(context) or should_run(context, container_id, inspected["State"])):
            return None
        context.log.warning("starting the container again", exit_code=inspected["State"].get("ExitCode"))
        engine.start(container_id)
        forget_our_stop(context)
        context.poke_after = RESTART_DELAY_SECONDS
        return None


def note_our_stop(context: Context) -> None:
    """Evidence for the next life: it was us who stopped the container, so it has to run again."""
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (context.directory / STOPPED_BY_US).touch()


def stopped_by_us(context: Context) -> bool:
    """Whether ``note_our_stop`` has not been followed by a start."""
    return (context.directory / STOPPED_BY_US).exists()


def forget_our_stop(context: Context) -> None:
    """It runs again."""
    (context.directory / STOPPED_BY_US).unlink(missing_ok=True)


def _a_server_has_died(context: Context) -> bool:
    """D14: whether a union that the container stands on has lost the process that serves its lower layer."""
    for arrival in arrivals(context):
        state = arrival.union.state()
        if not arrival.mount.single_file and state.placed and state.lower and not arrival.union.serves():
            return True
    return False


def _mount_again(context: Context) -> None:
    for arrival in arrivals(context):
        state = arrival.union.state()
        if state.settled or arrival.mount.single_file or (state.placed and arrival.union.serves()):
            continue
        if arrival.union.fill_list():
            arrival.union.attach_remote(context.bench.transport, peer_of_source(context), arrival.mount.tree)
        arrival.union.mount_lower()
        arrival.union.mount_merged()


def _repair_views(context: Context) -> None:
    """D14: a view of the source that died is replaced under the running container, whose reads wait meanwhile."""
    for arrival in arrivals(context):
        union = arrival.union
        if arrival.mount.single_file or not union.state().placed or not union.remaining(first_only=True):
            continue
        try:
            union.attach_remote(context.bench.transport, peer_of_source(context), arrival.mount.tree)
        except TransientError as error:
            context.log.warning("reads of what has not arrived wait for the source", reason=str(error))
            context.poke_after = REPAIR_DELAY_SECONDS
            return
        if not union.remaining(first_only=True):  # the fill, which has a thread of its own, has just brought the rest
            union.detach_remote()


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
