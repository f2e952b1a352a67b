"""Every failpoint that the product has. None is listed by hand: each follows from a machine's table.

An agent passes ``<role>.<effect>:before_effect|after_effect`` around each effect of a step, and
``<role>.<step>:before_event|after_event`` around the event that ends a step; the coordinator passes
``coordinator.<event type>:before_event|after_event`` around each event of its own. So a new step is in the list, and
in whatever is generated from it, as soon as it is in its table.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from events.agent_tables import AGENTS
from events.schema import EVENT_TYPES

COORDINATOR = "coordinator"
"""The process name under which the coordinator reads its faults; an agent's is ``hostd/<host>``."""


def _agent_points(role: str) -> list[str]:
    steps = AGENTS[role].steps.values()
    effects = dict.fromkeys(effect for step in steps if not step.undo for effect in step.effects)
    reporting = dict.fromkeys(step.name for step in steps if step.reports)
    return [f"{role}.{name}:{moment}" for name in effects for moment in ("before_effect", "after_effect")] + [
        f"{role}.{name}:{moment}" for name in reporting for moment in ("before_event", "after_event")
    ]


def _coordinator_points() -> list[str]:
    own = [name for name, row in EVENT_TYPES.items() if row.authors == ("coordinator",)]
    return [f"{COORDINATOR}.{name}:{moment}" for name in own for moment in ("before_event", "after_event")]


FAILPOINTS: dict[str, tuple[str, ...]] = {
    "coordinator": tuple(_coordinator_points()),
    "source": tuple(_agent_points("source")),
    "target": tuple(_agent_points("target")),
}
"""All points by role, in the order of the tables."""


def points_of(process: str) -> tuple[str, ...]:
    """The points that the process ``coordinator`` or ``hostd/<host>`` passes; an agent has both roles."""
    if process == COORDINATOR:
        return FAILPOINTS["coordinator"]
    return FAILPOINTS["source"] + FAILPOINTS["target"]
