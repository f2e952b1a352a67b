"""When does pre-copy stop? Pure arithmetic over the rounds so far.

A round pays as long as it leaves clearly less behind than the round before. What is still dirty at the
stop does not prolong the outage (the union federates it), so the goal is not an empty dirty set but a
short fill, and few files that are remote when the container first asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_ROUNDS = 2
"""The first round takes long and copies everything; what changed meanwhile is worth a second, short one."""

CONVERGED_BYTES = 4 * 1024 * 1024
"""A round this small moves within some 50 ms on a 1 Gbit/s link: another one gains nothing."""

CONVERGING_RATIO = 0.7
"""A round that moves more than this part of its predecessor shows that the container writes about as
fast as the link carries: further rounds only burn bandwidth."""


@dataclass(frozen=True)
class Round:
    """One finished pre-copy round: bytes that crossed the link, and how long it took."""

    bytes_moved: int
    duration_seconds: float


@dataclass(frozen=True)
class Choice:
    """Another round, or the cut-over; ``why`` is for people."""

    another_round: bool
    why: str


def choose(rounds: tuple[Round, ...], *, max_rounds: int) -> Choice:
    """What to do after ``rounds``. Every sequence of rounds leads to a cut-over within ``max_rounds``."""
    if not rounds:
        return Choice(True, "first round: copy everything while the container runs")
    done = len(rounds)
    if done >= max_rounds:
        return Choice(False, f"the limit of {max_rounds} rounds is reached")
    last = rounds[-1]
    if done < MIN_ROUNDS:
        return Choice(True, "bring what changed during the first round")
    if last.bytes_moved <= CONVERGED_BYTES:
        return Choice(False, f"converged: the last round moved {last.bytes_moved} bytes")
    previous = rounds[-2]
    if last.bytes_moved >= CONVERGING_RATIO * previous.bytes_moved:
        return Choice(
            False,
            f"not converging: the last round moved {last.bytes_moved} bytes, the one before {previous.bytes_moved}",
        )
    return Choice(True, f"converging: {previous.bytes_moved} bytes, then {last.bytes_moved}")
