"""Keep the container running the way its own restart policy says, while Docker's is disarmed.

A host that rebooted has lost its mounts: they come back first, the container second, never the other way
round.
"""

from __future__ import annotations

from typing import Any, ClassVar

from events.errors import TransientError
from hostd.effects.arrival import arrivals, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.shared import require_shares
from hostd.standing import note

RESTART_DELAY_SECONDS = 1.0
"""Between two starts of a container that ends by itself, so that a crash loop does not eat the host."""
STOPPED_BY_US = "stopped-by-us"
REPAIR_DELAY_SECONDS = 5.0
"""Between two attempts to open the view of a source that cannot be reached."""
PAUSED_FOR_REPAIR = "paused-for-repair"
"""A file that says: the container was paused by us, because its data cannot be read before it is mounted anew."""


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
            _keep_served(context, container_id)
            _repair_views(context)
            return None
        _mount_again(context)
        ours = (context.directory / PAUSED_FOR_REPAIR).exists() or stopped_by_us(context)
        if not ours and not should_run(context, container_id, inspected["State"]):
            return None
        require_shares(context)
        context.log.warning("starting the container again", exit_code=inspected["State"].get("ExitCode"))
        engine.start(container_id)
        (context.directory / PAUSED_FOR_REPAIR).unlink(missing_ok=True)
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


def see_that_it_runs(context: Context, container_id: str) -> None:
    """Start the container if it should run and does not: at the end of supervision, or where it was stopped by us."""
    engine = context.bench.engine
    state = (engine.inspect(container_id) or {}).get("State") or {}
    if not state.get("Running") and (stopped_by_us(context) or should_run(context, container_id, state)):
        require_shares(context)
        engine.start(container_id)
    forget_our_stop(context)


def _mount_again(context: Context) -> None:
    here = arrivals(context)
    for arrival in here:
        state = arrival.union.state()
        if state.settled or not arrival.union.federable:
            continue
        # What ``cargo-hostd mounts`` has mounted at the boot has no view of the source yet.
        if not state.remote and arrival.union.remaining(first_only=True):
            arrival.attach_remote(context)
        if not (state.placed and arrival.union.serves()):
            arrival.union.mount_lower()
            arrival.union.mount_merged()
    note(context.directory, [arrival.union for arrival in here])


def _keep_served(context: Context, container_id: str) -> None:
    """A6, D14: the server of a lower layer that died is replaced, and readers wait meanwhile.

    If the kernel has given the file system up, because nobody was left who held it, only another one under another
    union helps, and for that the container has to stop. It is paused, lest it act on errors, and a person decides
    when. Raises TransientError, in words, as long as that is so.
    """
    broken = []
    for arrival in arrivals(context):
        union = arrival.union
        if not union.federable or not union.state().placed:
            continue
        if union.keep_served():
            context.log.warning("the lower layer had died and is served again", mount=arrival.mount.destination)
        if not union.serves() and union.given_up():
            broken.append(arrival.mount.destination)
    if not broken:
        return
    name = context.view.source_prepared.container_name
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (context.directory / PAUSED_FOR_REPAIR).touch()
    context.bench.engine.pause(container_id)
    context.poke_after = REPAIR_DELAY_SECONDS
    raise TransientError(
        f"what serves the data of {', '.join(broken)} that {name} has not written itself was killed, with all that "
        f"could have brought it back. {name} is paused, so that it reads no errors; nothing of its data is lost. "
        f"Stop it with `docker stop {name}` when that suits: it is mounted anew then, and started again by itself"
    )


def _repair_views(context: Context) -> None:
    """D14: a view of the source that died is replaced under the running container, whose reads wait meanwhile."""
    for arrival in arrivals(context):
        union = arrival.union
        if not union.federable or not union.state().placed or not union.remaining(first_only=True):
            continue
        try:
            arrival.attach_remote(context)
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
