"""What both agents' machines share: steps, and the fields of a stream that a host looks at.

A state of a machine either waits, or has a Step: effects to perform in order, and the event that
reports their outcome. Effects are named here and implemented, one verb a file, in ``hostd/effects/``.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from events.decision import Decision, Outcomes
from events.errors import IllegalEventError
from events.machine import Table
from events.schema import (
    AbortOrdered,
    BraceOrdered,
    BwlimitOrdered,
    CutoverOrdered,
    Data,
    DirtyManifest,
    Event,
    Request,
    Requested,
    SourcePrepared,
    SourceStopped,
    StepFailed,
    SyncArmed,
    SyncFinished,
    SyncOrdered,
    TargetPrepared,
)


class View(msgspec.Struct, frozen=True):
    """A stream as an agent sees it: its machine's state, and the facts that its effects need."""

    state: str
    seq: int = 0
    cause: int = 0
    """``seq`` of the event that brought the machine into its state."""
    epoch: int = 0
    facts: Mapping[str, Data] = msgspec.field(default_factory=dict)
    """The newest payload of each event type."""
    author: Mapping[str, str] = msgspec.field(default_factory=dict)
    boots: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The life (``boot``) of the writer of the newest event of each type."""
    failing: Mapping[str, StepFailed] = msgspec.field(default_factory=dict)
    """The newest unrecovered failure of each agent, by author."""
    round: int = 0
    rounds: tuple[SyncFinished, ...] = ()
    """Every finished pre-copy round."""

    @property
    def requested(self) -> Requested:
        data = self.facts["requested"]
        assert isinstance(data, Requested)
        return data

    @property
    def source_prepared(self) -> SourcePrepared:
        data = self.facts["source_prepared"]
        assert isinstance(data, SourcePrepared)
        return data

    @property
    def target_prepared(self) -> TargetPrepared:
        data = self.facts["target_prepared"]
        assert isinstance(data, TargetPrepared)
        return data

    @property
    def sync_armed(self) -> SyncArmed | None:
        data = self.facts.get("sync_armed")
        assert data is None or isinstance(data, SyncArmed)
        return data

    @property
    def source_stopped(self) -> SourceStopped | None:
        data = self.facts.get("source_stopped")
        assert data is None or isinstance(data, SourceStopped)
        return data

    @property
    def request(self) -> Request:
        return self.requested.request

    @property
    def bwlimit_kib(self) -> int:
        """The limit of transfers that is in force: the newest order's, or the request's. 0 for none."""
        data = self.facts.get("bwlimit_ordered")
        return data.kib if isinstance(data, BwlimitOrdered) else self.request.bwlimit_kib

    @property
    def strategy(self) -> str:
        """How contents that have not arrived before the stop are brought: the order's word, or the request's."""
        order = self.facts.get("cutover_ordered") or self.facts.get("brace_ordered")
        return (order.strategy if isinstance(order, CutoverOrdered | BraceOrdered) else "") or self.request.strategy

    @property
    def downtime_budget_seconds(self) -> float:
        """What bringing them inside the stop window may cost."""
        order = self.facts.get("cutover_ordered")
        ordered = order.downtime_budget_seconds if isinstance(order, CutoverOrdered) else 0.0
        return ordered or self.request.downtime_budget_seconds

    @property
    def aborted_for(self) -> str:
        data = self.facts.get("abort_ordered")
        return data.reason if isinstance(data, AbortOrdered) else ""

    def dirty(self) -> tuple[DirtyManifest, ...]:
        """The manifests that the frozen source published; empty before the stop."""
        stopped = self.source_stopped
        return stopped.dirty if stopped is not None else ()


@dataclass(frozen=True)
class Step:
    """What a host does in one state."""

    name: str
    effects: tuple[str, ...]
    conclude: Callable[[View, Outcomes], Data | None] | None = None
    """Builds the event that ends the step, or None when it has not come to its end; a step without is never waited for."""
    undo: bool = False


@dataclass(frozen=True)
class Plan:
    """One agent role: its table and the step of each state that has one."""

    role: str
    table: Table
    steps: Mapping[str, Step]
    supervised: frozenset[str] = frozenset()
    """States in which the container runs here and is kept running, whatever else the host is busy with."""
    heeding: frozenset[str] = frozenset()
    """States in which nothing is done any more once the other host has failed for good: the coordinator's abort comes."""

    def start(self) -> View:
        """The view of a stream nothing has been read of."""
        return View(state=self.table.initial)

    def apply(self, view: View, event: Event) -> View:
        """``view`` after ``event``. Raises IllegalEventError for an event that has no place here."""
        by_coordinator = event.by.startswith("coordinator/")
        if by_coordinator and event.epoch < view.epoch:
            raise IllegalEventError(
                f"the order {event.seq} ({event.type}) is of epoch {event.epoch}; "
                f"epoch {view.epoch} has been obeyed already"
            )
        state = self.table.next(view.state, event.type)
        failing = view.failing
        if isinstance(event.data, StepFailed):
            failing = {**failing, event.by: event.data}
        elif by_coordinator and state != view.state:
            failing = {}  # an order that moves the machine on makes earlier failures history
        elif event.by in failing:
            failing = {author: failed for author, failed in failing.items() if author != event.by}
        return replace(
            view,
            state=state,
            seq=event.seq,
            cause=event.seq if (state != view.state or event.type in _REPEATED) else view.cause,
            epoch=max(view.epoch, event.epoch) if by_coordinator else view.epoch,
            facts={**view.facts, event.type: event.data},
            author={**view.author, event.type: event.by},
            boots={**view.boots, event.type: event.boot},
            failing=failing,
            round=event.data.round if isinstance(event.data, SyncOrdered) else view.round,
            rounds=(*view.rounds, event.data) if isinstance(event.data, SyncFinished) else view.rounds,
        )

    def fold(self, events: Iterable[Event], view: View | None = None) -> View:
        """The view that ``events`` lead to, continuing ``view``."""
        view = view or self.start()
        for event in events:
            view = self.apply(view, event)
        return view

    def decide(self, view: View, author: str) -> Decision:
        """The step of the state that ``view`` is in, or what the host ``author`` waits for."""
        step = self.steps.get(view.state)
        if step is None:
            return Decision(f"{self.role}: {view.state}, nothing to do")
        failed = view.failing.get(author)
        if failed is not None and failed.step == step.name and not failed.retrying:
            return Decision(f"{self.role}: {step.name} has failed for good, waiting for the coordinator")

        if view.state in self.heeding and any(not other.retrying for other in view.failing.values()):
            return Decision(f"{self.role}: the other host has failed for good, waiting for the coordinator")

        def conclude(outcomes: Outcomes) -> Data | None:
            assert step.conclude is not None
            return step.conclude(view, outcomes)

        return Decision(
            f"{self.role}: {step.name}",
            step=step.name,
            effects=step.effects,
            undo=step.undo,
            cause=view.cause,
            conclude=None if step.conclude is None else conclude,
        )


_REPEATED = frozenset({"sync_ordered", "sync_armed"})


def merged(outcomes: Outcomes) -> dict[str, Any]:
    """All outcomes of a step in one dictionary: each effect returns the fields that it found."""
    fields: dict[str, Any] = {}
    for outcome in outcomes.values():
        if outcome:
            fields.update(outcome)
    return fields


def warnings_of(outcomes: Outcomes) -> tuple[str, ...]:
    """What the effects of a step want a person to know, in their order."""
    return tuple(line for outcome in outcomes.values() for line in (outcome or {}).get("warnings", ()))


def fields_for(data: type[Data], outcomes: Outcomes) -> dict[str, Any]:
    """Those of ``merged(outcomes)`` that the payload class ``data`` has."""
    return {name: value for name, value in merged(outcomes).items() if name in data.__struct_fields__}
