"""A history step by step through all three machines: which state each is in after each event, and why.

The coordinator's own machine is folded as in production (``lifecycle.fold``). Those of the agents are walked along
``events/agent_tables.py``, the copy of their tables that everybody may import. What an agent would do in a state is its
step there, and so is which event it answers: the one that brought its machine into that state.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coordinator import lifecycle
from coordinator.lifecycle import Lifecycle
from events.agent_tables import AGENTS
from events.agents import AgentStep
from events.schema import EVENT_TYPES, Event, Head, head_after


@dataclass(frozen=True)
class AgentWalk:
    """An agent's machine somewhere in a history."""

    role: str
    state: str
    cause: int = 0
    """Number of the event that asks for the present state's step."""

    @classmethod
    def start(cls, role: str) -> AgentWalk:
        """Before the first event."""
        return cls(role, AGENTS[role].table.initial)

    def after(self, kind: str, seq: int) -> AgentWalk:
        """The walk after an event of type ``kind``. Raises IllegalEventError."""
        machine = AGENTS[self.role]
        state = machine.table.next(self.state, kind)
        moved = state != self.state or kind in machine.repeated
        return replace(self, state=state, cause=seq if moved else self.cause)

    @property
    def step(self) -> AgentStep | None:
        """What the agent does in this state; None when it waits."""
        return AGENTS[self.role].steps.get(self.state)

    @property
    def outcomes(self) -> frozenset[str]:
        """The event types with which the agent may end the present step."""
        step = self.step
        if step is None or not step.reports:
            return frozenset()
        rows = AGENTS[self.role].table.rows
        return frozenset(
            row.event for row in rows if self.state in row.states and self.role in EVENT_TYPES[row.event].authors
        )

    @property
    def why(self) -> str:
        """What the agent does now, in a few words."""
        step = self.step
        if step is None:
            return "waits"
        doing = ("undoes " if step.undo else "") + ", ".join(step.effects)
        return f"{step.name}: {doing}"


@dataclass(frozen=True)
class Frame:
    """The three machines after one event."""

    event: Event
    before: Lifecycle
    after: Lifecycle
    agents: tuple[AgentWalk, AgentWalk]
    """Source and target."""
    agents_before: tuple[AgentWalk, AgentWalk]
    head: Head
    """The head that belongs to this point."""

    @property
    def sentence(self) -> str:
        """What the coordinator does or waits for now."""
        return lifecycle.decide(self.after).sentence


def frames(events: Sequence[Event]) -> Iterator[Frame]:
    """One frame an event. Raises IllegalEventError at the first event that a machine has no place for."""
    state = Lifecycle()
    agents = (AgentWalk.start("source"), AgentWalk.start("target"))
    head: Head | None = None
    for event in events:
        after = lifecycle.apply(state, event)
        walked = (agents[0].after(event.type, event.seq), agents[1].after(event.type, event.seq))
        head = head_after(head, event)
        yield Frame(event, state, after, walked, agents, head)
        state, agents = after, walked


def prove(frame: Frame, head: Head) -> list[tuple[str, str, str]]:
    """What differs between the fold, ending with ``frame``, and the recorded ``head``: (field, folded, recorded)."""
    folded = {
        "seq": str(frame.after.seq),
        "uuid": frame.event.uuid,
        "digest": frame.event.digest,
        "phase": frame.after.state,
        "container_id": frame.after.container_id,
        "source": frame.after.request.source if frame.after.request else "",
        "target": frame.after.request.target if frame.after.request else "",
    }
    return [
        (name, value, str(getattr(head, name))) for name, value in folded.items() if value != str(getattr(head, name))
    ]
