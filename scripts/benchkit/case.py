"""What a case of the benchmark is, and what it is given.

A case returns plain data (it goes into ``docs/benchmarks.json``); tables and plots are made from that data alone, so
that a page can be written again without measuring again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchkit.figures import Table

if TYPE_CHECKING:
    from benchkit.stage import Stage

Scale = Literal["tiny", "quick", "full"]
Result = dict[str, Any]


@dataclass
class Setting:
    """One run. ``stage()`` brings up the lab when it is first asked for."""

    scale: Scale
    say: Callable[[str], None]
    stage: Callable[[], Stage]
    give_up_at: float = math.inf
    """Monotonic time after which a case begins nothing new: the whole run stays within the time that it states."""

    @property
    def late(self) -> bool:
        """Whether the case has used up its time."""
        return time.monotonic() > self.give_up_at

    def turns(self, number: int) -> Iterator[int]:
        """``range(number)``; only the first one when time is up."""
        for turn in range(number):
            if turn and self.late:
                self.say(f"this machine is slow: {turn} of {number} turns")
                return
            yield turn

    def pick(self, tiny: Any, quick: Any, full: Any) -> Any:
        """The value for the scale of this run."""
        return {"tiny": tiny, "quick": quick, "full": full}[self.scale]


@dataclass(frozen=True)
class Case:
    """One case. ``about`` tells the reader of the page what was measured, and how."""

    name: str
    title: str
    about: str
    run: Callable[[Setting], Result]
    tables: Callable[[Result], list[Table]]
    quick_seconds: int
    full_seconds: int
    """Expected, on two quiet cores; for ``--list`` and the page."""
    plots: Callable[[Result], dict[str, str]] = lambda _result: {}
    """File name to SVG text."""
