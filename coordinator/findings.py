"""One thing that is wrong with a history. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """``seq`` is the event concerned, 0 the history as a whole; ``rule`` a short name; ``text`` is for people."""

    seq: int
    rule: str
    text: str
