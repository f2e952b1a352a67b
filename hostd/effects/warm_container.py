"""Bring the container up to its gate while the source still runs, so that after the claim it only has to go on."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import layer_mount, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.open_layer import place_early
from hostd.gate import RUNTIME
from hostd.layer import ROOTFS
from hostd.warm import WarmStart, settle_gate


class WarmContainer(Effect):
    """Only begins it: what comes of it is asked for at the start. It never keeps the cut-over waiting, nor fails it."""

    name: ClassVar[str] = "warm_container"

    def run(self, context: Context) -> Outcome:
        bench = context.bench
        if context.migration in bench.warm or context.view.request.start == "cold":
            return None
        container_id = our_container(context)
        if container_id is None:
            return None
        inspected = bench.engine.inspect(container_id) or {}
        if (inspected.get("HostConfig") or {}).get("Runtime") != RUNTIME:
            return None
        if context.view.strategy == "cold" and layer_mount(context) is not None:
            return None  # nothing of the layer is here yet
        place_early(context)
        mounts = [mount for mount in context.view.source_prepared.mounts if mount.kind != ROOTFS]
        warm = WarmStart(bench.engine, container_id, [mount.destination for mount in mounts])
        bench.warm[context.migration] = warm
        warm.begin()
        return None

    def undo(self, context: Context) -> Outcome:
        """Shut the gate and wait until Docker has undone the start: nothing of it has run."""
        warm = context.bench.warm.pop(context.migration, None)
        if warm is not None:
            warm.cool()
        elif "source_prepared" in context.view.facts and (container_id := our_container(context)) is not None:
            settle_gate(context.bench.engine, container_id)
        return None
