"""Histories as the real cores write them: the coordinator's and both agents' decisions, with invented outcomes.

``Player`` gives every event the author, the cause and the epoch that production would. ``rebuilt`` forges: it encodes rows
that a test has changed anew, chain and head included, so that only the rule in question is broken.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from coordinator import controls, lifecycle
from coordinator.recording import Recording
from events import schema
from events.schema import Data, Event, Stamp, encode_head, head_after, next_event
from hostd import source, target
from tests.support.histories import COORDINATOR, REF, REQUEST, SAMPLES, SOURCE, TARGET

DESTINATION = "/data"
DIRTY = (schema.DirtyManifest(destination=DESTINATION, manifest=REF, stale_files=1, stale_bytes=10),)
OUTCOMES: dict[str, Data] = SAMPLES | {
    "source_stopped": schema.SourceStopped(exit_code=0, unclean=False, stopped_at="t", dirty=DIRTY),
    "source_digested": schema.SourceDigested(
        trees=(schema.TreeDigest(destination=DESTINATION, manifest=REF, files=1, size_bytes=10),)
    ),
    "verified": schema.Verified(files=1, size_bytes=10, changed_by_container=0, digests={DESTINATION: "0" * 64}),
    "target_stopped": schema.TargetStopped(exit_code=0, trees=DIRTY, places={DESTINATION: "/v/data/_data"}),
}
UNASKED = frozenset({"image_wanted", "image_packed"})
"""Outcomes that a step may have, but that the usual migration does without."""


@dataclass(frozen=True)
class Row:
    """An event before it is chained."""

    data: Data
    by: str
    cause: int
    epoch: int = 7
    boot: str = ""
    uuid: str = ""
    at: str = ""


def row_of(event: Event) -> Row:
    return Row(event.data, event.by, event.cause, event.epoch, event.boot, event.uuid, event.at)


def chained(rows: Iterable[Row]) -> list[Event]:
    """``rows`` as a history."""
    events: list[Event] = []
    for row in rows:
        events.append(_next(events, row))
    return events


def _next(events: list[Event], row: Row) -> Event:
    number = len(events) + 1
    stamp = Stamp(
        uuid=row.uuid or f"u{number}",
        at=row.at or f"2020-01-01T00:00:{number % 60:02d}.000Z",
        by=row.by,
        boot=row.boot or f"{row.by} 1",
        epoch=row.epoch,
    )
    return next_event(events[-1] if events else None, row.data, cause=row.cause, stamp=stamp)


def recorded(events: list[Event], migration: str = "web-1") -> Recording:
    """``events`` as the store holds them, with the head that belongs to them."""
    head = None
    for event in events:
        head = head_after(head, event)
    return Recording(
        migration, tuple((event.seq, event.raw) for event in events), None if head is None else encode_head(head)
    )


def rebuilt(rows: Iterable[Row]) -> Recording:
    """A forgery whose form is perfect."""
    return recorded(chained(rows))


class Player:
    """One migration under way."""

    def __init__(self, request: schema.Request = REQUEST) -> None:
        self.rows: list[Row] = []
        self.events: list[Event] = []
        self.state = lifecycle.Lifecycle()
        self._plans = ((source.PLAN, SOURCE), (target.PLAN, TARGET))
        self._views = {author: plan.start() for plan, author in self._plans}
        self._append(Row(schema.Requested(request=request, container_id="c" * 64), COORDINATOR, 0))

    def _append(self, row: Row) -> Event:
        event = _next(self.events, row)
        self.rows.append(row)
        self.events.append(event)
        self.state = lifecycle.apply(self.state, event)
        self._views = {author: plan.apply(self._views[author], event) for plan, author in self._plans}
        return event

    def control(self, name: str, **options: object) -> Player:
        """What the coordinator answers to a person, as often as it has something to say."""
        wish = controls.Control(name, **options)  # type: ignore[arg-type]
        while (data := controls.answer(wish, self.state)) is not None:
            self._append(Row(data, COORDINATOR, self.state.seq))
            if isinstance(data, schema.ControlRefused | schema.Resumed):
                break
        return self

    def fail(self, host: str, reason: str, *, retrying: bool = True) -> Player:
        """The step that ``host`` is at fails."""
        plan = next(plan for plan, author in self._plans if author == host)
        step = plan.decide(self._views[host], host).step
        data = schema.StepFailed(step=step, reason=reason, retrying=retrying, attempt=1, advice="wait")
        return self.report(host, data)

    def report(self, host: str, data: Data) -> Player:
        """``host`` says something on the way of the step that it is at."""
        plan = next(plan for plan, author in self._plans if author == host)
        self._append(Row(data, host, plan.decide(self._views[host], host).cause))
        return self

    def tell(self, host: str, data: Data) -> Player:
        """``host`` says something of what the newest event has led it to."""
        self._append(Row(data, host, self.state.seq))
        return self

    def run(self, until: str = "", *, silent: str = "") -> Player:
        """Let everybody act until nobody has anything to do, or an event of type ``until`` has been appended.

        The agent ``silent`` does nothing.
        """
        while self._turn(silent):
            if self.events[-1].type == until:
                return self
        assert not until, f"{until} was never reached, but {[event.type for event in self.events]}"
        return self

    def _turn(self, silent: str) -> bool:
        decision = lifecycle.decide(self.state)
        if decision.append:
            draft = decision.append[0]
            self._append(Row(draft.data, COORDINATOR, draft.cause))
            return True
        for plan, author in self._plans:
            view = self._views[author]
            step = plan.decide(view, author)
            if author == silent or step.conclude is None or view.state == "settled":
                continue
            outcomes = [
                row.event
                for row in plan.table.rows
                if view.state in row.states
                and plan.role in schema.EVENT_TYPES[row.event].authors
                and row.event not in UNASKED
            ]
            data = OUTCOMES[outcomes[0]]
            if isinstance(data, schema.SyncArmed | schema.SyncFinished):
                data = msgspec.structs.replace(data, round=view.round)
            self._append(Row(data, author, step.cause))
            return True
        return False

    def recording(self, migration: str = "web-1") -> Recording:
        return recorded(self.events, migration)


def completed() -> Player:
    return Player().run("completed")


def aborted() -> Player:
    return Player().run("source_stopped").control("abort", reason="changed my mind").run("aborted")


def finalised() -> Player:
    return completed().control("finalise").run("finalised")


def rolled_back(reached: str = "completed") -> Player:
    return Player().run(reached).control("rollback", reason="too slow").run("rolled_back")


def rolled_back_without_target() -> Player:
    player = Player().run("target_started").control("rollback", discard_target_writes=True)
    return player.control("rollback", discard_target_writes=True, target_off="ada").run("rolled_back", silent=TARGET)


def rejected() -> list[Event]:
    return chained([Row(SAMPLES["rejected"], COORDINATOR, 0)])
