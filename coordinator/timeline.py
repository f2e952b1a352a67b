"""One event as one line on a terminal.

What an event says comes from other hosts, images and people, so nothing of it reaches the terminal that could steer it.
"""

from __future__ import annotations

import math
import unicodedata

from rich.text import Text

from coordinator.narrate import seconds_between, words
from events.schema import Event

_BAD = frozenset({"rejected", "step_failed", "abort_ordered", "aborted", "rollback_ordered", "control_refused"})
_CONTROL = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def printable(text: str) -> str:
    """``text`` on one line, with control characters, also those that reorder text, written out."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _CONTROL else char for char in text
    )


def line_of(event: Event, first: Event) -> Text:
    """Number, seconds since ``first``, author, type, and what it says."""
    seconds = seconds_between(first, event)
    line = Text()
    line.append(f"{event.seq:4d} ", style="dim")
    line.append(f"{'?':>9} s  " if math.isnan(seconds) else f"{seconds:+9.3f} s  ", style="cyan")
    line.append(f"{printable(event.by):<16} ", style="magenta" if event.by.startswith("coordinator/") else "blue")
    line.append(f"{event.type:<16} ", style="bold red" if event.type in _BAD else "bold")
    line.append(printable(words(event.data)))
    return line
