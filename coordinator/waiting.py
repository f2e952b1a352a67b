"""Why a migration stands where it stands: what it waits for, since when, whom, and what would change that.

The answer follows from the history alone. Whether a host or a coordinator is heard of comes in from outside and stays a
hint: silence proves nothing, and nothing here ever says that somebody is dead.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator import controls, lifecycle
from coordinator.controls import CONTROLS, Control
from coordinator.dead_hosts import if_source_is_dead, if_target_is_dead
from coordinator.lifecycle import Lifecycle
from coordinator.replay import AgentWalk, frames
from events.schema import ControlRefused, Event, TargetAssertedOff


@dataclass(frozen=True)
class Party:
    """Somebody who is to act."""

    process: str
    """``coordinator``, ``hostd/<host>``, or ``a person``."""
    doing: str
    appends: tuple[str, ...]
    """The events that it may end with; any of them moves the migration on."""
    failing: str = ""


@dataclass(frozen=True)
class Why:
    """The whole answer."""

    phase: str
    waiting_for: str
    since_seq: int
    since: str
    """Time of the event that brought the migration here, by its author's clock."""
    parties: tuple[Party, ...]
    possible_controls: tuple[str, ...]
    if_source_is_dead: str = ""
    if_target_is_dead: str = ""
    """What a person may safely do then."""


def explain(events: Sequence[Event]) -> Why:
    """Raises IllegalEventError for a history that cannot be folded, ValueError for an empty one."""
    all_frames = list(frames(events))
    if not all_frames:
        raise ValueError("there is no event")
    last = all_frames[-1]
    state = last.after
    since = last.event
    for frame in reversed(all_frames):
        if frame.after.state != state.state:
            break
        since = frame.event
    parties = list(_parties(state, last.agents, last.sentence))
    return Why(
        state.state,
        last.sentence,
        since.seq,
        since.at,
        tuple(parties),
        _possible(state),
        if_source_is_dead(state),
        if_target_is_dead(state),
    )


def _parties(state: Lifecycle, agents: Sequence[AgentWalk], sentence: str) -> list[Party]:
    decision = lifecycle.decide(state)
    if decision.append:
        return [Party("coordinator", sentence, ("its next order",))]
    if state.paused and state.abortable and not state.source_stopped:
        return [Party("a person", "has paused it", ("resumed", "abort_ordered"))]
    request = state.request
    if request is None or state.state == "rejected":
        return []
    hosts = {"source": request.source, "target": request.target}
    found = []
    for walk in agents:
        role, step = walk.role, walk.step
        process = f"hostd/{hosts[role]}"
        if step is None or not step.reports:
            continue
        failing = "; ".join(f.reason for where, f in state.failures if where.startswith(f"{process}:"))
        found.append(Party(process, walk.why, tuple(sorted(walk.outcomes)), failing))
    return found


def _possible(state: Lifecycle) -> tuple[str, ...]:
    """The controls that would be obeyed now and would change something."""
    possible = []
    for name in CONTROLS:
        wish = Control(name, kib=0) if name == "bwlimit" else Control(name)
        reply = controls.answer(wish, state)
        if reply is not None and not isinstance(reply, ControlRefused):
            possible.append(name)
    vouched = Control("rollback", discard_target_writes=True, target_off="somebody")
    if "rollback" not in possible and isinstance(controls.answer(vouched, state), TargetAssertedOff):
        possible.append("rollback --discard-target-writes --target-off WHO")
    return tuple(possible)
