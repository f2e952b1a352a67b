"""Which strategy, and when does pre-copy stop? Pure arithmetic over the rounds so far.

A round pays as long as it leaves clearly less behind than the round before. What is still dirty at the
stop does not prolong the outage (the union federates it), so the goal is not an empty dirty set but a
short fill, and few files that are remote when the container first asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from events.schema import Strategy

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
    contents: bool = True
    """The round brings contents, not only names and metadata."""
    strategy: Strategy = "hybrid"
    """Of the cut-over: what becomes of contents that have not arrived by then."""
    downtime_budget_seconds: float = 0.0
    tracked: bool = True
    """The source can say what changed since a round began; False where no round was made."""


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


AUTO_BUDGET_SECONDS = 0.5
"""What ``auto`` spends on bringing a small remainder inside the stop window. It is about what the container's own
stop and start cost, and saves reading through the network, and a union to fold later."""


def plan_next(
    strategy: Strategy,
    rounds: tuple[Round, ...],
    *,
    max_rounds: int,
    mounts: int,
    downtime_budget_seconds: float = 0.0,
) -> Choice:
    """What to do next for ``strategy``: the same machine for all, with other parameters."""
    if strategy == "cold":
        return Choice(False, "cold: stop first, then copy everything", strategy="cold", tracked=False)
    if strategy == "postcopy":
        if not rounds:
            return Choice(True, "names and metadata only; the contents follow after the start", contents=False)
        return Choice(
            False,
            "postcopy: the names are there, the contents follow after the start",
            strategy="postcopy",
            downtime_budget_seconds=downtime_budget_seconds,
        )
    if strategy == "auto" and mounts == 0:
        return Choice(False, "auto chose cold: there is no data to move", strategy="cold", tracked=False)
    choice = choose(rounds, max_rounds=max_rounds)
    if choice.another_round:
        return choice
    if strategy == "precopy":
        why = f"{choice.why}; precopy: the rest follows while the container is stopped"
        return Choice(False, why, strategy="precopy")
    if strategy == "auto":
        budget = downtime_budget_seconds or AUTO_BUDGET_SECONDS
        return Choice(False, f"{choice.why}; {_chosen(rounds, budget)}", downtime_budget_seconds=budget)
    return Choice(False, choice.why, downtime_budget_seconds=downtime_budget_seconds)


def _chosen(rounds: tuple[Round, ...], budget: float) -> str:
    """Why ``auto`` goes on the way it does. The target decides when it knows the true remainder."""
    last = rounds[-1].duration_seconds
    if last <= budget:
        return (
            f"auto chose hybrid with a remainder like precopy's: the last round took {last:.2f} s, so the rest is brought "
            f"while the container is stopped if that takes {budget:g} s at most"
        )
    return (
        f"auto chose hybrid: the last round took {last:.2f} s, so bringing the rest while the container is stopped would "
        f"cost more than {budget:g} s, unless it turns out smaller"
    )
