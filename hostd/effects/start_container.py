"""Start the container on the target. The claim is durable by now."""

from __future__ import annotations

import time
from typing import ClassVar

from events.errors import CargoError, TransientError
from hostd.effects.arrival import labels, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import load_spec
from hostd.effects.mount_union import MountUnion
from hostd.effects.shared import require_binds
from hostd.spec import missing_ports, port_bindings


class StartContainer(Effect):
    """A start that failed is never repeated on the same container: Docker may then leave its ports out (F7)."""

    name: ClassVar[str] = "start_container"

    def run(self, context: Context) -> Outcome:
        began = time.monotonic()
        MountUnion().run(context)
        mounted = time.monotonic()
        spec = load_spec(context)
        require_binds(context, spec)
        engine = context.bench.engine
        container_id = our_container(context)
        if container_id is None:
            container_id = engine.create(spec.name, spec, labels=labels(context), restart_policy="no")
        try:
            engine.start(container_id)
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
            "milestones": {
                "mounted": round(mounted - began, 4),
                "started": round(started - began, 4),
            },
        }
