"""Create the container on the target, disarmed and not started."""

from __future__ import annotations

from typing import Any, ClassVar

from events.errors import PermanentError, RefusedError
from hostd.effects.arrival import labels, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import arriving_spec
from hostd.fidelity import dropped, refusals
from hostd.gate import PLAIN_RUNTIME, RUNTIME
from hostd.spec import ContainerSpec, to_create_body


class CreateContainer(Effect):
    """The agent supervises it while it stands on a union, so its restart policy here is ``no``.

    Docker drops what it does not know or cannot enforce: the container is looked at before anything depends on it.
    """

    name: ClassVar[str] = "create_container"

    def run(self, context: Context) -> Outcome:
        spec = arriving_spec(context)
        container_id = create(context, spec)
        if reasons := refusals(dropped(_request(context, spec), context.bench.engine.inspect(container_id) or {})):
            raise RefusedError(reasons)
        if any(place.kind == "volume" for place in spec.shared):
            context.bench.engine.try_mounts(container_id)
        return {"container_id": container_id}

    def undo(self, context: Context) -> Outcome:
        """Remove the container: it has never run, or the source runs again."""
        if "source_prepared" not in context.view.facts:
            return None
        container_id = our_container(context)
        if container_id is None:
            return None
        if "target_claimed" in context.view.facts and "source_restored" not in context.view.facts:
            raise PermanentError("the container was claimed for this host; it is removed once the source runs again")
        context.bench.engine.remove(container_id)
        return None


def _request(context: Context, spec: ContainerSpec) -> dict[str, Any]:
    return to_create_body(spec, image=spec.image_id, labels=labels(context))


def create(context: Context, spec: ContainerSpec) -> str:
    """Create the container, or find it created; returns its id. It gets the runtime that can wait, where that is."""
    engine = context.bench.engine
    if (created := our_container(context)) is not None:  # a person may have renamed it
        return created
    own = spec.host_config.get("Runtime") or PLAIN_RUNTIME
    gated = own == PLAIN_RUNTIME and context.view.request.start == "warm" and RUNTIME in engine.info().runtimes
    return engine.create(spec.name, spec, labels=labels(context), restart_policy="no", runtime=RUNTIME if gated else "")
