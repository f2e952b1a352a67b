"""Start the container on the target. The claim is durable by now."""

from __future__ import annotations

import time
from typing import ClassVar

from events.errors import CargoError, TransientError
from hostd.effects.arrival import our_container, volume_arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.create_container import create
from hostd.effects.fetch_spec import arriving_spec
from hostd.effects.mount_union import MountUnion, grafts, just_mounted
from hostd.effects.open_layer import ensure_layer, remove_container
from hostd.effects.shared import require_shares
from hostd.inventory import BY_CONTAINER, port_problems
from hostd.neighbours import announce
from hostd.spec import ContainerSpec, missing_ports, port_bindings
from hostd.warm import settle_gate

PORT_HELD = "port is already allocated"
"""How Docker says that its own book of ports has a port taken; a program that has it reads otherwise."""


class StartContainer(Effect):
    """A start that failed is never repeated on the same container: Docker may then leave its ports out (F7)."""

    name: ClassVar[str] = "start_container"

    def run(self, context: Context) -> Outcome:
        began = time.monotonic()
        spec = arriving_spec(context)
        require_shares(context)
        engine = context.bench.engine
        ensure_layer(context)
        if not just_mounted(context):
            MountUnion().run(context)
        mounted = time.monotonic()
        warm = context.bench.warm.get(context.migration)
        container_id = warm.container_id if warm is not None else our_container(context) or create(context, spec)
        try:
            container_id, why_cold = _start(context, spec, container_id)
        except CargoError as error:
            remove_container(context, container_id)
            raise TransientError(
                f"Docker could not start the container: {error}{_who_holds(context, error)}"
            ) from error
        inspected = engine.inspect(container_id) or {}
        started = time.monotonic()
        pid = int((inspected.get("State") or {}).get("Pid") or 0)
        if pid and why_cold and (problem := announce(pid)):  # at a gate it has been done
            context.log.info("the container's neighbours were not told where it is", reason=problem)
        if missing := missing_ports(spec, inspected):
            engine.stop(container_id)
            remove_container(context, container_id)
            raise TransientError(f"Docker started the container without {', '.join(missing)}; it was taken back")
        return {
            "container_id": container_id,
            "started_at": str((inspected.get("State") or {}).get("StartedAt", "")),
            "ports": port_bindings(inspected),
            "start": "cold" if why_cold else "warm",
            "why_cold": why_cold,
            "milestones": {
                "mounted": round(mounted - began, 4),
                "started": round(started - began, 4),
            },
        }


def _start(context: Context, spec: ContainerSpec, container_id: str) -> tuple[str, str]:
    """Let the container go that waits at its gate, or start it.

    Returns its id, and why it was not warm; "" when it was. Raises what Docker says.
    """
    engine = context.bench.engine
    warm = context.bench.warm.pop(context.migration, None)
    why_cold = context.bench.why_cold.pop(context.migration, "it did not wait at a gate")
    if context.view.request.start != "warm":
        why_cold = "the request says so"
    if warm is not None:
        # The writable layer is in the waiting container already, or the container would not wait any more.
        if not (why_cold := warm.go(grafts(volume_arrivals(context)))):
            return container_id, ""
        context.log.warning("the container could not go on from its gate; it starts cold", reason=why_cold)
    if settle_gate(engine, container_id) or warm is not None:
        # A start that was undone is not repeated on the same container either.
        state = (engine.inspect(container_id) or {}).get("State") or {}
        if not state.get("Running"):
            remove_container(context, container_id)
            container_id = create(context, spec)
            ensure_layer(context)
            MountUnion().run(context)
    engine.start(container_id)
    return container_id, why_cold


def _who_holds(context: Context, error: CargoError) -> str:
    """What Docker does not say of a port that it holds: for whom. After a crash it can be for nobody."""
    if PORT_HELD not in str(error):
        return ""
    taken = port_problems(context.bench.engine, context.view.source_prepared.ports)
    if by_containers := [problem for problem in taken if BY_CONTAINER in problem]:
        return f"; {', '.join(by_containers)}: stop that one, and this start goes on"
    return (
        "; no container publishes it: Docker holds it since a start that a crash cut short, until Docker is restarted "
        "on this host (which ends its other containers for a moment, unless it runs with live-restore). "
        "The data is safe on both hosts meanwhile, and a rollback needs no restart"
    )
