"""Bring the container up to its gate while the source still runs, so that after the claim it only has to go on."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import layer_mount, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.open_layer import place_early
from hostd.gate import RUNTIME
from hostd.layer import ROOTFS
from hostd.warm import WarmStart, settle_gate

ASKED_EVERY_SECONDS = 0.05
"""How soon an abort is noticed."""


class WarmContainer(Effect):
    """The stop is ordered when this is done, so it waits for the gate: a start takes longer than most stops.

    Whatever comes of it, the container starts: cold, if it does not come to its gate. It never fails the cut-over.
    """

    name: ClassVar[str] = "warm_container"

    def run(self, context: Context) -> Outcome:
        warm = context.bench.warm.get(context.migration)
        if warm is None:
            warm, why_cold = _begin(context)
            if warm is None:
                return {"start": "cold", "why_cold": why_cold}
        while context.view.state == "readying" and not warm.arrived(ASKED_EVERY_SECONDS):
            context.check_cancelled()
        return {"start": "cold" if warm.refused else "warm", "why_cold": warm.refused}

    def undo(self, context: Context) -> Outcome:
        """Shut the gate and wait until Docker has undone the start: nothing of it has run."""
        warm = context.bench.warm.pop(context.migration, None)
        if warm is not None:
            warm.cool()
        elif "source_prepared" in context.view.facts and (container_id := our_container(context)) is not None:
            settle_gate(context.bench.engine, container_id)
        return None


def _begin(context: Context) -> tuple[WarmStart | None, str]:
    """The start, under way; or None, and why there is none."""
    bench = context.bench
    if context.view.request.start == "cold":
        return None, "the request says so"
    container_id = our_container(context)
    if container_id is None:
        return None, "the container has to be created anew"
    inspected = bench.engine.inspect(container_id) or {}
    if (inspected.get("HostConfig") or {}).get("Runtime") != RUNTIME:
        return None, f"{context.host} has not the runtime that lets a start wait (cargo-hostd-runtime install)"
    if context.view.strategy == "cold" and layer_mount(context) is not None:
        return None, "nothing of the writable layer is here yet"
    place_early(context)
    mounts = [mount for mount in context.view.source_prepared.mounts if mount.kind != ROOTFS]
    warm = WarmStart(bench.engine, container_id, [mount.destination for mount in mounts])
    bench.warm[context.migration] = warm
    warm.begin()
    return warm, ""
