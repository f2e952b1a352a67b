"""The coordinator's machine: where a migration stands, and which order comes next.

Theory of operation:

1. ``fold`` walks the event stream along ``TABLE``; the resulting ``Lifecycle`` depends on nothing else.
2. ``decide`` looks at a ``Lifecycle`` and names at most one event to append. The coordinator has no
   effects: its orders are its acts.
3. Before ``target_claimed`` a step that failed for good ends in an abort. From ``target_claimed`` on
   nothing is undone without a person: the machine holds and says what it waits for.
4. An abort contends with ``target_claimed`` for the same sequence number. The store lets one of them
   win; the loser folds again and meets the other's event.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from coordinator.policy import Round, plan_next
from events.decision import Decision, Draft
from events.errors import IllegalEventError
from events.machine import Row, Table
from events.schema import (
    EVENT_TYPES,
    Aborted,
    AbortOrdered,
    BraceOrdered,
    BwlimitOrdered,
    Completed,
    CutoverOrdered,
    Data,
    Event,
    HealthReported,
    PrepareOrdered,
    ReleaseOrdered,
    Request,
    Requested,
    RollbackOrdered,
    RolledBack,
    SourcePrepared,
    SourceReleased,
    StepFailed,
    SyncFinished,
    SyncOrdered,
    TargetAssertedOff,
)

BEFORE_CLAIM = ("admit", "prepare", "pre_copy", "cut_over")
AFTER_CLAIM = ("claimed", "fill", "verify", "release", "completed", "finalise", "finalised")
"""States from which the way back is a roll-back, as long as the source keeps its copy."""
STILL_MOVING = (*BEFORE_CLAIM, "claimed", "fill")
"""States in which data may still travel from source to target."""

TABLE = Table(
    "lifecycle",
    states=(
        "new",
        "admit",
        "prepare",
        "pre_copy",
        "cut_over",
        "claimed",
        "fill",
        "verify",
        "release",
        "completed",
        "finalise",
        "finalised",
        "aborting",
        "aborted",
        "rolling_back",
        "rolled_back",
        "rejected",
    ),
    initial="new",
    rows=(
        Row("requested", ("new",), "admit"),
        Row("rejected", ("new",), "rejected"),
        Row("prepare_ordered", ("admit",), "prepare"),
        Row("source_prepared", ("prepare",), "prepare"),
        Row("target_prepared", ("prepare",), "pre_copy"),
        Row("sync_ordered", ("pre_copy", "cut_over"), "pre_copy"),
        Row("sync_armed", ("pre_copy",), "pre_copy"),
        Row("sync_finished", ("pre_copy",), "pre_copy"),
        Row("brace_ordered", ("pre_copy",), "pre_copy"),
        Row("target_braced", ("pre_copy",), "pre_copy"),
        Row("cutover_ordered", ("pre_copy",), "cut_over"),
        Row("source_stopped", ("cut_over",), "cut_over"),
        Row("target_claimed", ("cut_over",), "claimed"),
        Row("target_started", ("claimed",), "fill"),
        Row("source_digested", ("fill",), "fill"),
        Row("source_digested", ("verify",), "verify"),
        Row("fill_finished", ("fill",), "verify"),
        Row("verified", ("verify",), "release"),
        Row("release_ordered", ("release",), "release"),
        Row("source_released", ("release",), "release"),
        Row("completed", ("release",), "completed"),
        Row("finalise_ordered", ("completed",), "finalise"),
        Row("finalised", ("completed", "finalise"), "finalised"),
        Row("abort_ordered", BEFORE_CLAIM, "aborting"),
        Row("source_restored", ("aborting",), "aborting"),
        Row("target_cleaned", ("aborting",), "aborting"),
        Row("aborted", ("aborting",), "aborted"),
        Row("rollback_ordered", AFTER_CLAIM, "rolling_back"),
        Row("target_asserted_off", ("rolling_back",), "rolling_back"),
        Row("target_stopped", ("rolling_back",), "rolling_back"),
        Row("carried_back", ("rolling_back",), "rolling_back"),
        Row("source_restored", ("rolling_back",), "rolling_back"),
        Row("target_cleaned", ("rolling_back",), "rolling_back"),
        Row("rolled_back", ("rolling_back",), "rolled_back"),
        # A target that was vouched to be off cleans up when it comes back.
        Row("target_cleaned", ("rolled_back",), "rolled_back"),
    ),
    ignored=(
        "image_wanted",
        "image_packed",
        "health_reported",
        "step_failed",
        "step_recovered",
        "control_refused",
        "paused",
        "resumed",
        "bwlimit_ordered",
    ),
    final=("completed", "finalised", "aborted", "rolled_back", "rejected"),
)


class Lifecycle(msgspec.Struct, frozen=True):
    """Everything that a stream says to the coordinator."""

    state: str = TABLE.initial
    seq: int = 0
    request: Request | None = None
    container_id: str = ""
    mounts: int = 0
    """Data mounts of the container."""
    bwlimit_kib: int = 0
    """In force now."""
    rounds: tuple[Round, ...] = ()
    round_ordered: int = 0
    round_finished: int = 0
    ordered: bool = False
    """The order that belongs to the current state has been given."""
    brace_ordered: bool = False
    braced: bool = False
    """The target is ready for the stop."""
    source_stopped: bool = False
    release_ordered: bool = False
    source_released: bool = False
    unhealthy: str | None = None
    """What the container's own health check said when it failed on the target."""
    kept_as: str | None = ""
    """What the source kept its copy as; None once the copy is gone."""
    target_stopped: bool = False
    asserted_off: str = ""
    """Who vouched that the target is powered off."""
    discard_target_writes: bool = False
    carried_back: bool = False
    restored: bool = False
    cleaned: bool = False
    tracking_losses: int = 0
    tracking_lost: str = ""
    """Why the source refused to cut over: its tracker cannot vouch for the dirty set."""
    failures: tuple[tuple[str, StepFailed], ...] = ()
    """Steps that have failed and not recovered, by ``author:step``."""
    paused: bool = False
    epoch: int = 0
    last_type: str = ""

    @property
    def terminal(self) -> bool:
        return self.state in TABLE.final

    @property
    def reversible(self) -> bool:
        """The container was claimed, and the source still has its copy to go back to.

        Once a release that removes the copy is ordered, it may be gone before anybody says so.
        """
        removing = self.release_ordered and self.request is not None and self.request.on_release == "remove"
        return self.state in AFTER_CLAIM and self.kept_as is not None and not removing

    @property
    def abortable(self) -> bool:
        """Nothing has been claimed, so the source may still have its container back."""
        return self.state in BEFORE_CLAIM


def author_allowed(lifecycle: Lifecycle, event: Event) -> bool:
    """Whether ``event.by`` is one of the roles that may write this type in this migration."""
    request = lifecycle.request
    if isinstance(event.data, Requested):
        request = event.data.request
    authors = EVENT_TYPES[event.type].authors
    if event.by.startswith("coordinator/"):
        return "coordinator" in authors
    if request is None:
        return False
    as_source = "source" in authors and event.by == f"hostd/{request.source}"
    return as_source or ("target" in authors and event.by == f"hostd/{request.target}")


def apply(lifecycle: Lifecycle, event: Event) -> Lifecycle:
    """``lifecycle`` after ``event``. Raises IllegalEventError for an event that has no place here."""
    if not author_allowed(lifecycle, event):
        raise IllegalEventError(f"event {event.seq} ({event.type}) may not be written by {event.by}")
    by_coordinator = event.by.startswith("coordinator/")
    if by_coordinator and event.epoch < lifecycle.epoch:
        raise IllegalEventError(
            f"event {event.seq} ({event.type}) was written by a coordinator of epoch {event.epoch}, "
            f"after one of epoch {lifecycle.epoch}"
        )
    state = TABLE.next(lifecycle.state, event.type)
    epoch = max(lifecycle.epoch, event.epoch) if by_coordinator else lifecycle.epoch
    failures = lifecycle.failures
    if failures and event.type != "step_failed":  # whoever goes on has recovered
        failures = tuple(pair for pair in failures if not pair[0].startswith(f"{event.by}:"))
    known = {"state": state, "seq": event.seq, "epoch": epoch, "failures": failures, "last_type": event.type}
    return replace(lifecycle, **(known | _learned(lifecycle, event)))


_FLAGS: dict[str, dict[str, Any]] = {
    "brace_ordered": {"brace_ordered": True},
    "target_braced": {"braced": True},
    "source_stopped": {"source_stopped": True},
    "release_ordered": {"release_ordered": True},
    "target_stopped": {"target_stopped": True},
    "carried_back": {"carried_back": True},
    "source_restored": {"restored": True},
    "target_cleaned": {"cleaned": True},
    "paused": {"paused": True},
    "resumed": {"paused": False},
}


def _learned(before: Lifecycle, event: Event) -> dict[str, Any]:
    """What the payload adds to what is known: fields of Lifecycle."""
    match event.data:
        case Requested() as data:
            return {
                "request": data.request,
                "container_id": data.container_id,
                "bwlimit_kib": data.request.bwlimit_kib,
            }
        case SourcePrepared() as data:
            # A writable layer without a file in it is no data that a strategy could be chosen for.
            return {"mounts": sum(mount.kind != "rootfs" or mount.files > 0 for mount in data.mounts)}
        case BwlimitOrdered() as data:
            return {"bwlimit_kib": data.kib}
        case SyncOrdered() as data:
            return {"round_ordered": data.round, "tracking_lost": "", "brace_ordered": False, "braced": False}
        case SyncFinished() as data:
            done = Round(data.bytes_moved, data.duration_seconds)
            return {"rounds": (*before.rounds, done), "round_finished": data.round}
        case StepFailed() as data:
            if data.code == "tracking_lost":
                return {"tracking_lost": data.reason, "tracking_losses": before.tracking_losses + 1}
            key = f"{event.by}:{data.step}"
            kept = tuple(pair for pair in before.failures if pair[0] != key)
            return {"failures": (*kept, (key, data))}
        case HealthReported() as data:
            return {"unhealthy": data.log if data.status == "unhealthy" else None}
        case SourceReleased() as data:
            return {"source_released": True, "kept_as": data.kept_as}
        case RollbackOrdered() as data:
            return {"discard_target_writes": data.discard_target_writes}
        case TargetAssertedOff() as data:
            return {"asserted_off": data.who}
    return _FLAGS.get(event.type, {})


def fold(events: Iterable[Event], start: Lifecycle | None = None) -> Lifecycle:
    """The lifecycle that ``events`` lead to, continuing ``start``."""
    lifecycle = start or Lifecycle()
    for event in events:
        lifecycle = apply(lifecycle, event)
    return lifecycle


def decide(lifecycle: Lifecycle) -> Decision:
    """The coordinator's next order, or what it waits for."""
    if lifecycle.abortable:
        held = _before_claim(lifecycle)
        if held is not None:
            return held
    match lifecycle.state:
        case "admit":
            return _order(lifecycle, PrepareOrdered(), "ordering both hosts to get ready")
        case "pre_copy":
            return _after_round(lifecycle)
        case "cut_over":
            return _during_cut_over(lifecycle)
        case "release" | "aborting" | "rolling_back":
            return _at_the_end(lifecycle)
    return Decision(waiting_for(lifecycle))


def _before_claim(lifecycle: Lifecycle) -> Decision | None:
    """An abort for what failed for good, or a person's pause."""
    if lifecycle.abortable:
        final = [(where, failed) for where, failed in lifecycle.failures if not failed.retrying]
        if final:
            reasons = [f"{where}: {reason}" for where, f in final for reason in (f.reasons or (f.reason,))]
            why = "; ".join(reasons)[:MAX_WORDS_CHARACTERS]
            return _order(lifecycle, AbortOrdered(reason=why), f"aborting: {why}")
        if lifecycle.paused and not lifecycle.source_stopped:
            return Decision("paused by a person, before the stop; `resume` goes on")
    return None


def _at_the_end(lifecycle: Lifecycle) -> Decision:
    match lifecycle.state:
        case "release" if not lifecycle.release_ordered:
            return _order(lifecycle, ReleaseOrdered(), "verified: the source may let go")
        case "release" if lifecycle.source_released:
            return _order(lifecycle, Completed(), "the source has let go: completed")
        case "aborting" if lifecycle.restored and lifecycle.cleaned:
            return _order(lifecycle, Aborted(), "both hosts are as they were: aborted")
        case "rolling_back" if lifecycle.restored and (lifecycle.cleaned or lifecycle.asserted_off):
            return _order(lifecycle, RolledBack(), "the container runs on the source again: rolled back")
    return Decision(waiting_for(lifecycle))


def _after_round(lifecycle: Lifecycle) -> Decision:
    if lifecycle.round_finished < lifecycle.round_ordered:
        return Decision(f"pre-copy round {lifecycle.round_ordered} is under way")
    assert lifecycle.request is not None
    choice = plan_next(
        lifecycle.request.strategy,
        lifecycle.rounds,
        max_rounds=lifecycle.request.max_rounds,
        mounts=lifecycle.mounts,
        downtime_budget_seconds=lifecycle.request.downtime_budget_seconds,
    )
    if choice.another_round:
        order = SyncOrdered(round=lifecycle.round_ordered + 1, why=choice.why, contents=choice.contents)
        return _order(lifecycle, order, f"ordering pre-copy round {order.round}: {choice.why}")
    if not lifecycle.brace_ordered:
        brace = BraceOrdered(why=choice.why, strategy=choice.strategy)
        return _order(lifecycle, brace, f"ordering the target to get ready: {choice.why}")
    if not lifecycle.braced:
        return Decision(f"{lifecycle.request.target} gets ready for the start while the container still runs")
    why, untracked = choice.why, not choice.tracked
    if lifecycle.tracking_losses >= MAX_TRACKING_LOSSES:
        why, untracked = f"{why}; changes cannot be tracked, so everything counts as changed", True
    cutover = CutoverOrdered(
        why=why,
        untracked=untracked,
        strategy=choice.strategy,
        downtime_budget_seconds=choice.downtime_budget_seconds,
    )
    return _order(lifecycle, cutover, f"ordering the cut-over: {why}")


MAX_WORDS_CHARACTERS = 8000
"""Of what agents said, where it is repeated in an event: a character may take six bytes, and an event may have 64 KiB."""
MAX_TRACKING_LOSSES = 2
"""A source whose tracker is lost this often (too few watches, a queue that always overflows) is not going to
keep it: then the whole tree is federated, and nothing is assumed."""


def _during_cut_over(lifecycle: Lifecycle) -> Decision:
    if not lifecycle.tracking_lost or lifecycle.source_stopped:
        return Decision(waiting_for(lifecycle))
    order = SyncOrdered(
        round=lifecycle.round_ordered + 1,
        why="the source cannot vouch for its dirty set "
        f"({lifecycle.tracking_lost[:MAX_WORDS_CHARACTERS]}); compare everything",
        contents=lifecycle.request is None or lifecycle.request.strategy != "postcopy",
    )
    return _order(lifecycle, order, "another round: the source's tracking was lost")


def _order(lifecycle: Lifecycle, data: Data, sentence: str) -> Decision:
    return Decision(sentence, append=(Draft(data, cause=lifecycle.seq),))


def waiting_for(lifecycle: Lifecycle) -> str:
    """What a migration in this state waits for, and for whom, in one sentence."""
    request = lifecycle.request
    source = request.source if request else "the source"
    target = request.target if request else "the target"
    failing = "; ".join(f"{where} failed ({failed.reason}); {failed.advice}" for where, failed in lifecycle.failures)
    failing = failing[:MAX_WORDS_CHARACTERS]
    sentence = {
        "admit": "the request was found possible",
        "prepare": f"{source} and {target} get ready",
        "pre_copy": f"the data is copied to {target} while the container runs on {source}",
        "cut_over": f"{target} takes over" if lifecycle.source_stopped else f"{source} stops the container",
        "claimed": f"{target} starts the container",
        "fill": f"the container runs on {target}; its remaining data is on the way from {source}",
        "verify": f"{target} compares everything with the frozen source",
        "release": f"{source} lets go",
        "aborting": "waiting for "
        + " and ".join(
            [f"{source} to restore its container"] * (not lifecycle.restored)
            + [f"{target} to clean up"] * (not lifecycle.cleaned)
        ),
        "completed": f"done: the container lives on {target}; its data becomes a plain volume there at its next "
        "stop, or with `finalise`",
        "finalise": f"{target} folds the union into a plain volume",
        "finalised": f"done: the container lives on {target}, on plain volumes",
        "rolling_back": _rolling_back(lifecycle, source, target),
        "rolled_back": f"done: the container lives on {source} again",
        "aborted": f"done: the container lives on {source}, as before",
        "rejected": "done: rejected, nothing was changed",
    }.get(lifecycle.state, lifecycle.state)
    if lifecycle.unhealthy is not None and lifecycle.reversible:
        said = f" ({lifecycle.unhealthy[:MAX_WORDS_CHARACTERS]})" if lifecycle.unhealthy else ""
        sentence += f"; its health check says that it is unhealthy there{said}: `rollback` brings it back to {source}"
    return f"{sentence}; but {failing}" if failing else sentence


def _rolling_back(lifecycle: Lifecycle, source: str, target: str) -> str:
    if not lifecycle.target_stopped and not lifecycle.asserted_off:
        return (
            f"{target} stops the container and lists what it wrote; if {target} is dead, switch it off for good and "
            "vouch for it: the control rollback with target_off"
        )
    if not lifecycle.carried_back:
        return f"{source} takes over what the container wrote on {target}"
    if not lifecycle.restored:
        return f"{source} starts the container again"
    return f"the container runs on {source} again; {target} cleans up"
