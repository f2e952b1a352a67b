"""Start the container on the target. The claim is durable by now."""

from __future__ import annotations

import time
from typing import ClassVar

from events.errors import CargoError, TransientError
from hostd.effects.arrival import arrivals, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.create_container import create
from hostd.effects.fetch_spec import load_spec
from hostd.effects.mount_union import MountUnion
from hostd.graft import Graft
from hostd.spec import missing_ports, port_bindings
from hostd.warm import settle_gate


class StartContainer(Effect):
    """A start that failed is never repeated on the same container: Docker may then leave its ports out (F7)."""

    name: ClassVar[str] = "start_container"

    def run(self, context: Context) -> Outcome:
        began = time.monotonic()
        MountUnion().run(context)
        mounted = time.monotonic()
        spec = load_spec(context)
        engine = context.bench.engine
        container_id = our_container(context) or create(context, spec)
        try:
            why_cold = _start(context, container_id)
        except CargoError as error:
            engine.remove(container_id)
            raise TransientError(f"Docker could not start the container: {error}") from error
        inspected = engine.inspect(container_id) or {}
        started = time.monotonic()
        if missing := missing_ports(spec, inspected):
            engine.stop(container_id)
            engine.remove(container_id)
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


def _start(context: Context, container_id: str) -> str:
    """Let the container go that waits at its gate, or start it. Returns why it was not warm; "" when it was."""
    engine = context.bench.engine
    warm = context.bench.warm.pop(context.migration, None)
    why_cold = "it did not wait at a gate"
    if context.view.request.start == "cold":
        why_cold = "the request says so"
    if warm is not None and warm.container_id == container_id:
        grafts = [Graft(arrival.union.place, arrival.mount.destination) for arrival in arrivals(context)]
        why_cold = warm.go(grafts)
        if not why_cold:
            return ""
        context.log.warning("the container could not go on from its gate; it starts cold", reason=why_cold)
    settle_gate(engine, container_id)
    engine.start(container_id)
    return why_cold
