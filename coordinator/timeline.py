"""One event as one line on a terminal."""

from __future__ import annotations

from rich.text import Text

from coordinator.narrate import seconds_between, words
from events.schema import Event

_BAD = frozenset({"rejected", "step_failed", "abort_ordered", "aborted", "rollback_ordered", "control_refused"})


def line_of(event: Event, first: Event) -> Text:
    """Number, seconds since ``first``, author, type, and what it says."""
    line = Text()
    line.append(f"{event.seq:4d} ", style="dim")
    line.append(f"{seconds_between(first, event):+9.3f} s  ", style="cyan")
    line.append(f"{event.by:<16} ", style="magenta" if event.by.startswith("coordinator/") else "blue")
    line.append(f"{event.type:<16} ", style="bold red" if event.type in _BAD else "bold")
    line.append(words(event.data))
    return line
