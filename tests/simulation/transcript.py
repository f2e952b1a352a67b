"""What happened, in order, one line a happening; rendered only when somebody wants to read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


class Transcript:
    """Lines as they came: step, depth of preemption, who, words."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, str, str, tuple[object, ...]]] = []

    def add(self, step: int, depth: int, who: str, words: str, values: tuple[object, ...]) -> None:
        """One line; ``words`` is filled with ``values`` later."""
        self._lines.append((step, depth, who, words, values))

    def text(self) -> str:
        """All of it."""
        return "\n".join(
            f"{step:5} {'│ ' * depth}{who:<15} {words % values if values else words}"
            for step, depth, who, words, values in self._lines
        )

    def count(self, kinds: Mapping[str, str]) -> dict[str, int]:
        """How many lines there are of each kind, given the kind of a line by its words."""
        counted: dict[str, int] = {}
        for _step, _depth, _who, words, _values in self._lines:
            kind = kinds.get(words)
            if kind is not None:
                counted[kind] = counted.get(kind, 0) + 1
        return counted

    def fingerprint(self) -> bytes:
        """A digest of every line."""
        return hashlib.sha256(repr(self._lines).encode()).digest()
