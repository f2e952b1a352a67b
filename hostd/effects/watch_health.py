"""Report what the container's own health check says of it on this host, once it says anything.

The container runs, whatever it says: nothing is undone without a person, but a person must be told. Nothing waits for
it either, except the folding of the union, which can be put off.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hostd.effects.arrival import our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.turn import ENDS_STEP

LOOK_AGAIN_SECONDS = 2.0
MAX_LOG_CHARACTERS = 500
"""The end of what the check said; the rest is in ``docker inspect``."""
MIN_SECRET_CHARACTERS = 4
"""Shorter values of the environment are in any text and give nothing away."""
VERDICTS = ("healthy", "unhealthy")


class WatchHealth(Effect):
    """A container without a health check, or with a verdict in the history, costs one look at the history."""

    name: ClassVar[str] = "watch_health"

    def run(self, context: Context) -> Outcome:
        if "health_reported" in context.view.facts:
            return None
        container_id = our_container(context)
        inspected = context.bench.engine.inspect(container_id) if container_id is not None else None
        state = (inspected or {}).get("State") or {}
        health = state.get("Health") or {}
        status = str(health.get("Status") or "none")
        if inspected is None or status == "none" or not state.get("Running"):
            return None
        if status in VERDICTS:
            return {ENDS_STEP: True, "status": status, "log": _tail(inspected, health)}
        context.poke_after = LOOK_AGAIN_SECONDS
        return {ENDS_STEP: True} if context.view.state == "settled" else None


def _tail(inspected: dict[str, Any], health: dict[str, Any]) -> str:
    """The end of the newest check's output, without any value of the container's environment."""
    entries = health.get("Log") or ()
    said = str((entries[-1] or {}).get("Output") or "") if entries else ""
    for line in (inspected.get("Config") or {}).get("Env") or ():
        value = str(line).partition("=")[2]
        if len(value) >= MIN_SECRET_CHARACTERS:
            said = said.replace(value, "…")
    return said.strip()[-MAX_LOG_CHARACTERS:]
