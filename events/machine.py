"""A state machine as plain data: the table that a fold walks and a diagram is drawn from.

``transitions`` validates the table and answers look-ups; no callbacks, no guards and no models hang on
it, because those run code in the middle of a transition and leave the new state behind when they fail.
Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from transitions import Machine

from events.errors import IllegalEventError


class Row(NamedTuple):
    """In any of ``states``, ``event`` leads to ``next_state``."""

    event: str
    states: tuple[str, ...]
    next_state: str


class Table:
    """A validated machine: every (state, event) is a row, is ignored on purpose, or is illegal."""

    def __init__(
        self,
        name: str,
        *,
        states: Iterable[str],
        initial: str,
        rows: Iterable[Row],
        ignored: Iterable[str] = (),
        final: Iterable[str] = (),
    ) -> None:
        self.name = name
        self.states = tuple(states)
        self.initial = initial
        self.rows = tuple(rows)
        self.ignored = frozenset(ignored)
        """Event types that this machine may meet in any state and that move it nowhere."""
        self.final = frozenset(final)
        self._machine = Machine(
            model=None,
            states=list(self.states),
            initial=initial,
            transitions=[
                {"trigger": row.event, "source": list(row.states), "dest": row.next_state} for row in self.rows
            ],
            auto_transitions=False,
        )
        self._next = {
            (state, row.event): str(found[0].dest)
            for row in self.rows
            for state in self.states
            if (found := self._machine.get_transitions(row.event, state))
        }
        """Every answer of the machine, asked once: a fold looks one up for each event."""

    def next(self, state: str, event: str) -> str:
        """The state after ``event``. Raises IllegalEventError when the table has no place for it."""
        found = self._next.get((state, event))
        if found is not None:
            return found
        if event in self.ignored:
            return state
        raise IllegalEventError(f"the {self.name} machine, in state {state!r}, cannot accept the event {event!r}")

    def mermaid(self) -> str:
        """The diagram of the table in Mermaid's notation, the same text for the same table."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial}"]
        for row in self.rows:
            lines += [f"    {state} --> {row.next_state} : {row.event}" for state in row.states]
        lines += [f"    {state} --> [*]" for state in self.states if state in self.final]
        return "\n".join(lines) + "\n"
