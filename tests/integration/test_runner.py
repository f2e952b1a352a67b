"""The agent's loop on the in-memory store, with effects that the tests script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import structlog

from events import schema
from events.errors import CancelledError, PermanentError, RefusedError, TransientError
from events.failpoints import Failpoints
from events.memory import MemoryStore
from events.schema import Data, Event
from events.stamp import Stamper
from hostd import runner as runner_module
from hostd import source, target
from hostd import turn as turn_module
from hostd.effects.base import Context, Effect, Outcome, TrackingLostError
from hostd.effects.registry import EFFECTS
from hostd.plan import Plan
from hostd.runner import Runner, RunnerPorts
from hostd.ssh_grants import Admission
from hostd.turn import ENDS_STEP
from tests.support.histories import REQUEST, SAMPLES, prepared

DEADLINE_SECONDS = 20.0
MIGRATION = "web-7"


class Scripted(Effect):
    """An effect whose behaviour a test sets; it counts how often it ran and was undone."""

    name = "scripted"

    def __init__(self) -> None:
        self.runs = 0
        self.undone = 0
        self.script: Callable[[Context], Outcome] = lambda _context: None
        self.undo_script: Callable[[Context], Outcome] = lambda _context: None

    def run(self, context: Context) -> Outcome:
        self.runs += 1
        return self.script(context)

    def undo(self, context: Context) -> Outcome:
        self.undone += 1
        return self.undo_script(context)


class Stage:
    """One runner, its store, and scripted effects in the place of the real ones."""

    def __init__(self, plan: Plan, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = MemoryStore()
        self.effects = {name: Scripted() for name in EFFECTS}
        for name, scripted in self.effects.items():
            monkeypatch.setitem(EFFECTS, name, scripted)
        monkeypatch.setattr(turn_module, "FIRST_RETRY_SECONDS", 0.001)
        self.failpoints = Failpoints()
        self.ports = RunnerPorts(
            host=host,
            store=self.store,
            stamper=Stamper(f"hostd/{host}"),
            failpoints=self.failpoints,
            bench=None,  # type: ignore[arg-type]
            progress=lambda _migration, _fields: None,
            log=structlog.get_logger(),
        )
        self.plan = plan
        self.runner = Runner(MIGRATION, plan, self.ports)
        self.authors = {
            "coordinator": Stamper("coordinator/c1"),
            "source": Stamper("hostd/alpha"),
            "target": Stamper("hostd/beta"),
        }

    def append(self, *items: str | Data) -> None:
        """Append on behalf of whoever may, without waking the runner."""
        for item in items:
            data = SAMPLES[item] if isinstance(item, str) else item
            name = schema.TYPE_OF[type(data)]
            author = self.authors[schema.EVENT_TYPES[name].authors[0]]
            events = self.events
            last = events[-1] if events else None
            self.store.append(MIGRATION, last, data, cause=len(events), stamp=author.stamp(1))

    def give(self, *items: str | Data) -> None:
        """Append, and wake the runner."""
        self.append(*items)
        self.runner.kick()

    @property
    def events(self) -> list[Event]:
        return self.store.read(MIGRATION)

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.types
            threading.Event().wait(0.002)

    def until_last(self, name: str) -> Event:
        self.until(lambda: self.types[-1] == name)
        return self.events[-1]


@pytest.fixture
def at_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(source.PLAN, REQUEST.source, tmp_path, monkeypatch)
    stage.effects["describe_container"].script = lambda _context: {
        name: getattr(prepared(), name) for name in schema.SourcePrepared.__struct_fields__
    }
    stage.effects["stop_container"].script = lambda _context: {
        "exit_code": 0,
        "unclean": False,
        "stopped_at": "t",
    }
    stage.effects["publish_dirty"].script = lambda _context: {"dirty": ()}
    stage.effects["stop_container"].undo_script = lambda _context: {"running": True}
    yield stage
    stage.runner.close(10)


@pytest.fixture
def at_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(target.PLAN, REQUEST.target, tmp_path, monkeypatch)
    stage.effects["create_container"].script = lambda _context: {"container_id": "d"}
    stage.effects["recall_container"].script = lambda _context: {"exit_code": 0}
    yield stage
    stage.runner.close(10)


def test_an_order_is_performed_and_its_outcome_appended_once(at_source: Stage) -> None:
    at_source.give("requested", "prepare_ordered")
    event = at_source.until_last("source_prepared")
    assert event.cause == 2
    assert event.by == "hostd/alpha"
    at_source.runner.kick()
    at_source.runner.kick()
    assert at_source.types.count("source_prepared") == 1


def test_nothing_is_done_before_an_order(at_source: Stage) -> None:
    at_source.give("requested")
    at_source.until(lambda: at_source.runner.view.state == "chosen")
    assert not any(effect.runs for effect in at_source.effects.values())


def test_an_effect_that_fails_in_passing_is_repeated_and_said(at_source: Stage) -> None:
    tries = iter([TransientError("disk hiccup"), TransientError("disk hiccup"), None])

    def sometimes(_context: Context) -> Outcome:
        problem = next(tries)
        if problem is not None:
            raise problem
        return None

    at_source.effects["track_changes"].script = sometimes
    at_source.give("requested", "prepare_ordered")
    at_source.until_last("source_prepared")
    failures = [event.data for event in at_source.events if event.type == "step_failed"]
    assert len(failures) == 1
    assert isinstance(failures[0], schema.StepFailed)
    assert failures[0].retrying
    assert "disk hiccup" in failures[0].reason
    assert failures[0].advice


def test_an_effect_that_keeps_failing_before_the_claim_is_given_up_within_a_bound(at_source: Stage) -> None:
    def always(_context: Context) -> Outcome:
        raise TransientError("no route to host")

    at_source.effects["track_changes"].script = always
    at_source.give("requested", "prepare_ordered")
    at_source.until(lambda: not at_source.events[-1].data.retrying if at_source.types[-1] == "step_failed" else False)  # type: ignore[attr-defined]
    assert at_source.effects["track_changes"].runs == runner_module.MAX_ATTEMPTS_BEFORE_CLAIM


def test_a_refusal_is_final_at_once_and_lists_all_reasons(at_target: Stage) -> None:
    """P17: what cannot work is found before anything stops."""

    def refuse(_context: Context) -> Outcome:
        raise RefusedError(["no space", "port taken"])

    at_target.effects["check_target"].script = refuse
    at_target.give("requested", "prepare_ordered", "source_prepared")
    failed = at_target.until_last("step_failed").data
    assert isinstance(failed, schema.StepFailed)
    assert (failed.code, failed.retrying, failed.reasons) == ("refused", False, ("no space", "port taken"))
    assert at_target.effects["create_container"].runs == 0


def test_being_woken_for_nothing_does_not_use_up_attempts(at_target: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """D3, P13: a person's questions and the looks around come while an agent waits; only a retry is one."""
    monkeypatch.setattr(turn_module, "FIRST_RETRY_SECONDS", 20.0)
    failing = at_target.effects["pull_round"]

    def fail(_context: Context) -> Outcome:
        raise TransientError("no link")

    failing.script = fail
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered")
    at_target.give("sync_armed")
    at_target.until_last("step_failed")
    for _ in range(20):
        at_target.give(schema.ControlRefused(control="finalise", reason="not now"))
    assert failing.runs == 1
    at_target.give(schema.Resumed(by_person="try again now"))
    at_target.until(lambda: failing.runs == 2)


def test_after_the_claim_nothing_is_given_up(at_target: Stage) -> None:
    """Hold: stop advancing, keep retrying, say so."""
    attempts = threading.Semaphore(0)

    def fail(_context: Context) -> Outcome:
        attempts.release()
        raise PermanentError("Docker is away")

    at_target.effects["start_container"].script = fail
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.give("sync_finished", "cutover_ordered", "source_stopped", "target_claimed")
    for _ in range(runner_module.MAX_ATTEMPTS_BEFORE_CLAIM + 3):
        assert attempts.acquire(timeout=DEADLINE_SECONDS)
    failures = [event.data for event in at_target.events if event.type == "step_failed"]
    assert len(failures) == 1
    assert isinstance(failures[0], schema.StepFailed)
    assert failures[0].retrying


def test_what_a_failed_attempt_does_to_docker_does_not_make_the_next_one_follow_at_once(
    at_target: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails makes and removes a container, and Docker's events of it wake the agent."""
    monkeypatch.setattr(turn_module, "FIRST_RETRY_SECONDS", 10.0)
    monkeypatch.setattr(runner_module, "EAGER_SECONDS", 0.3)
    at: list[float] = []

    def fail(_context: Context) -> Outcome:
        at.append(time.monotonic())
        at_target.runner.kick()
        raise TransientError("port is already allocated")

    at_target.effects["start_container"].script = fail
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.give("sync_finished", "cutover_ordered", "source_stopped", "target_claimed")
    at_target.until(lambda: len(at) == 3)
    assert all(later - earlier >= 0.3 for earlier, later in pairwise(at))


def test_an_abort_cancels_a_running_step_and_everything_is_undone(at_target: Stage) -> None:
    running = threading.Event()

    def slow(context: Context) -> Outcome:
        running.set()
        assert context.cancelled.wait(DEADLINE_SECONDS)
        raise CancelledError("stopped")

    at_target.effects["pull_round"].script = slow
    at_target.give("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    assert running.wait(DEADLINE_SECONDS)
    at_target.give("abort_ordered")
    at_target.until_last("target_cleaned")
    assert all(at_target.effects[name].undone for name in target.PLAN.steps["cleaning"].effects)


def test_the_outcome_of_a_step_that_was_overtaken_is_not_appended(at_target: Stage) -> None:
    """The abort and the claim contend for one number: here the abort was first."""

    def abort_meanwhile(_context: Context) -> Outcome:
        at_target.append("abort_ordered")
        return None

    at_target.effects["mount_union"].script = abort_meanwhile
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.give("sync_finished", "cutover_ordered", "source_stopped")
    at_target.until_last("target_cleaned")
    assert "target_claimed" not in at_target.types


def test_an_event_of_another_author_in_between_does_not_lose_the_outcome(at_target: Stage) -> None:
    """B5: a lost race for a number is not a lost outcome."""
    at_target.effects["fill_replica"].script = lambda _context: (
        at_target.append("source_digested") or {"bytes_moved": 5, "files": 1, "duration_seconds": 1.0}  # type: ignore[func-returns-value]
    )
    fill = at_target.effects["fill_replica"]
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.append("sync_finished", "cutover_ordered", "source_stopped", "target_claimed")
    at_target.give("target_started")
    at_target.until(lambda: "fill_finished" in at_target.types)
    filled = next(event.data for event in at_target.events if event.type == "fill_finished")
    assert isinstance(filled, schema.FillFinished)
    assert (filled.bytes_moved, fill.runs) == (5, 1)


def _until_filling(at_target: Stage) -> tuple[threading.Event, threading.Event]:
    """A fill that goes on until the second event is set; the first says that it has begun."""
    filling, go_on = threading.Event(), threading.Event()

    def slow(_context: Context) -> Outcome:
        filling.set()
        assert go_on.wait(DEADLINE_SECONDS)
        return {"bytes_moved": 0, "files": 0, "duration_seconds": 0.0}

    at_target.effects["fill_replica"].script = slow
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.append("sync_finished", "cutover_ordered", "source_stopped", "target_claimed")
    at_target.give("target_started")
    assert filling.wait(DEADLINE_SECONDS)
    return filling, go_on


def test_a_container_is_kept_running_while_the_fill_takes_hours(at_target: Stage) -> None:
    """The agent is its supervisor; a long step must not make it look away."""
    _, go_on = _until_filling(at_target)
    supervised = at_target.effects["supervise_container"]
    before = supervised.runs
    at_target.runner.kick(poke=True)
    at_target.until(lambda: supervised.runs > before)
    go_on.set()
    at_target.until_last("fill_finished")


def test_a_container_that_is_rolled_back_is_not_started_again(at_target: Stage) -> None:
    """One runner: whatever Docker tells of meanwhile."""
    _, go_on = _until_filling(at_target)
    supervised = at_target.effects["supervise_container"]
    at_target.append("rollback_ordered")
    before = supervised.runs
    at_target.runner.kick(poke=True)
    go_on.set()
    at_target.until_last("target_stopped")
    assert supervised.runs == before


def test_what_docker_tells_while_a_step_looks_makes_it_look_again(at_source: Stage) -> None:
    """A15: a container that is started while the guard looks, after it has looked."""
    looks, go_on = threading.Event(), threading.Event()

    def look(_context: Context) -> Outcome:
        looks.set()
        assert go_on.wait(DEADLINE_SECONDS)
        return None

    at_source.effects["guard_source"].script = look
    at_source.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "cutover_ordered")
    at_source.give("source_stopped")
    assert looks.wait(DEADLINE_SECONDS)
    at_source.runner.kick(poke=True)
    go_on.set()
    at_source.until(lambda: at_source.effects["guard_source"].runs == 2)


def test_one_undo_that_fails_does_not_keep_the_others_from_running(at_source: Stage) -> None:
    def fail_once(_context: Context) -> Outcome:
        at_source.effects["track_changes"].undo_script = lambda _context: None
        raise TransientError("busy")

    at_source.effects["track_changes"].undo_script = fail_once
    at_source.give("requested", "prepare_ordered", "abort_ordered")
    at_source.until_last("source_restored")
    assert at_source.effects["disarm_restart"].undone == 2


def test_lost_tracking_is_reported_and_another_round_arms_again(at_source: Stage) -> None:
    """D12: the container is not stopped while nobody can say what changed."""

    def lost(_context: Context) -> Outcome:
        raise TrackingLostError("overflow")

    at_source.effects["vouch_for_tracking"].script = lost
    at_source.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_source.give("sync_finished", "cutover_ordered")
    failed = at_source.until_last("step_failed").data
    assert isinstance(failed, schema.StepFailed)
    assert failed.code == "tracking_lost"
    assert at_source.effects["stop_container"].runs == 0
    at_source.give(schema.SyncOrdered(round=2, why="compare"))
    at_source.until_last("sync_armed")


def test_a_failpoint_between_the_effect_and_its_event_repeats_the_step(at_source: Stage) -> None:
    """A4: what was done is observed, not remembered."""
    at_source.failpoints.set("source.prepare:before_event=error(crash)@1")
    at_source.give("requested", "prepare_ordered")
    at_source.until_last("source_prepared")
    assert at_source.effects["describe_container"].runs == 2


def test_a_history_that_cannot_be_understood_stops_this_migration(at_source: Stage) -> None:
    """B15: refuse to act, never guess."""
    at_source.append("requested", "prepare_ordered")
    key = at_source.store.keys.event(MIGRATION, 2)
    stored = at_source.store.get(key)
    assert stored is not None
    at_source.store.put(key, stored.value.replace(b"prepare_ordered", b"explode_ordered"))
    at_source.runner.kick()
    at_source.until(lambda: at_source.runner.halted)
    assert not any(effect.runs for effect in at_source.effects.values())


def test_a_lost_reply_does_not_append_twice(at_source: Stage) -> None:
    """B4: the event is read back and recognised."""
    at_source.append("requested", "prepare_ordered")
    at_source.store.fail_next("applied_lost", matching="/ev/")
    at_source.runner.kick()
    at_source.until_last("source_prepared")
    assert at_source.types.count("source_prepared") == 1


def test_an_unreachable_store_is_waited_out(at_source: Stage) -> None:
    """B1: hold, then go on."""
    at_source.append("requested", "prepare_ordered")
    at_source.store.down = True
    at_source.runner.kick()
    at_source.store.down = False
    at_source.until_last("source_prepared")


def test_closing_ends_a_step_under_way(at_target: Stage) -> None:
    running = threading.Event()

    def slow(context: Context) -> Outcome:
        running.set()
        context.cancelled.wait(DEADLINE_SECONDS)
        context.check_cancelled()
        return None

    at_target.effects["pull_round"].script = slow
    at_target.give("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    assert running.wait(DEADLINE_SECONDS)
    at_target.runner.close(10)
    assert at_target.types[-1] == "sync_armed"


def test_a_missing_image_is_asked_for_and_the_preparation_goes_on_when_it_is_packed(at_target: Stage) -> None:
    """The hosts never call each other: the wish is an event, and so is the answer."""
    at_target.effects["provide_image"].script = lambda _context: {
        ENDS_STEP: True,
        "image_id": "sha256:1",
        "layers": ("sha256:2",),
    }
    at_target.give("requested", "prepare_ordered", "source_prepared")
    wanted = at_target.until_last("image_wanted").data
    assert isinstance(wanted, schema.ImageWanted)
    assert wanted.layers == ("sha256:2",)
    assert at_target.effects["create_container"].runs == 0
    at_target.effects["provide_image"].script = lambda _context: {"warnings": ("a name is taken",)}
    at_target.effects["create_networks"].script = lambda _context: {"warnings": ("another subnet",)}
    at_target.give("image_packed")
    prepared = at_target.until_last("target_prepared").data
    assert isinstance(prepared, schema.TargetPrepared)
    assert prepared.warnings == ("a name is taken", "another subnet")


def test_the_source_packs_an_image_that_is_wanted_and_waits_again(at_source: Stage) -> None:
    packed = SAMPLES["image_packed"]
    at_source.effects["pack_image"].script = lambda _context: {
        name: getattr(packed, name) for name in schema.ImagePacked.__struct_fields__
    }
    at_source.append("requested", "prepare_ordered", "source_prepared")
    at_source.give("image_wanted")
    assert at_source.until_last("image_packed").data == packed
    at_source.give("target_prepared", "sync_ordered")
    at_source.until_last("sync_armed")


def test_the_verdict_of_a_health_check_is_recorded_once_and_the_fill_goes_on(at_target: Stage) -> None:
    at_target.effects["watch_health"].script = lambda context: (
        None
        if "health_reported" in context.view.facts
        else {ENDS_STEP: True, "status": "unhealthy", "log": "no answer"}
    )
    at_target.effects["fill_replica"].script = lambda _context: {"bytes_moved": 0, "files": 0, "duration_seconds": 0.0}
    at_target.append("requested", "prepare_ordered", "source_prepared", "target_prepared", "sync_ordered", "sync_armed")
    at_target.append("sync_finished", "cutover_ordered", "source_stopped", "target_claimed")
    at_target.give("target_started")
    at_target.until_last("fill_finished")
    assert at_target.types[-2:] == ["health_reported", "fill_finished"]
    assert at_target.effects["announce_placement"].runs >= 1


def test_the_peer_is_admitted_before_the_event_that_lets_it_ask_and_not_after_an_abort(at_source: Stage) -> None:
    """P15: the target asks within a millisecond of reading the event."""
    settled: list[tuple[bool, str]] = []

    class Gate:
        def settle(self, _migration: str, admission: Admission | None) -> None:
            settled.append((admission is not None, at_source.types[-1]))

    at_source.ports.gate = Gate()  # type: ignore[assignment]
    at_source.give("requested", "prepare_ordered")
    at_source.until_last("source_prepared")
    assert (True, "prepare_ordered") in settled
    at_source.give("target_prepared", "abort_ordered")
    at_source.until_last("source_restored")
    assert settled[-1][0] is False


def test_a_grant_that_cannot_be_written_keeps_the_peer_waiting(at_source: Stage) -> None:
    """P15: without it the target would be refused what the event promises."""
    full = iter([TransientError("the disk is full"), TransientError("the disk is full")])

    class Gate:
        def settle(self, _migration: str, admission: Admission | None) -> None:
            if admission is not None and (problem := next(full, None)) is not None:
                raise problem

    at_source.ports.gate = Gate()  # type: ignore[assignment]
    at_source.give("requested", "prepare_ordered")
    at_source.until_last("source_prepared")
    assert at_source.types.count("step_failed") == 1
