"""What one step of a core says: what to append, and what to do.

The law, obeyed by every loop that executes a Decision: everything in ``append`` is durable before
anything in ``effects`` begins; an effect returns its outcome, and only the loop appends.

    events = store.read(migration)
    state = fold(events)                       # pure
    decision = decide(state)                   # pure
    for draft in decision.append:              # durable first; a conflict means: fold again
        store.append(migration, last, draft.data, cause=draft.cause, ...)
    outcomes = {effect: perform(effect) for effect in decision.effects}
    store.append(migration, last, decision.conclude(outcomes), ...)

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from events.schema import Data

Outcomes = Mapping[str, Any]
"""What each effect of a decision returned, by the effect's name."""


@dataclass(frozen=True)
class Draft:
    """An event to append, before the shell stamps it with time and identity."""

    data: Data
    cause: int
    """``seq`` of the event it answers."""


@dataclass(frozen=True)
class Decision:
    """One turn of a core."""

    sentence: str
    """What this turn does or waits for, for people: it goes to the log and to ``status``."""
    append: tuple[Draft, ...] = ()
    step: str = ""
    """Name of the step that ``effects`` make up; empty when there are none."""
    effects: tuple[str, ...] = ()
    undo: bool = False
    """Run the effects' ``undo`` instead of their ``run``, all of them, in this order."""
    cause: int = 0
    conclude: Callable[[Outcomes], Data | None] | None = field(default=None, compare=False)
    """Builds the event that reports the effects' outcome; None when the step ends without one."""

    @property
    def idle(self) -> bool:
        """Nothing to do until another event arrives."""
        return not self.append and not self.effects
