"""One turn of an agent's loop, driven by hand: what it asks for, and what it makes of errors."""

from collections.abc import Callable
from typing import Any

import pytest

from events.errors import CancelledError, CargoError, ConflictError, PermanentError, TransientError
from events.schema import Data, StepFailed, StepRecovered, TargetClaimed
from hostd import source, target
from hostd.plan import Plan
from hostd.turn import MAX_ATTEMPTS_BEFORE_CLAIM, Append, Operation, Perform, Read, Rest, StartedAgainError, Turns, Wait
from tests.support.histories import SAMPLES, History, prepared

Answer = Callable[[Operation], Any]


def turns_at(plan: Plan, host: str, last: str, *further: str) -> Turns:
    """The loop of ``host`` after a history up to ``last``."""
    history = History().up_to(last)
    for name in further:
        history.add(name)
    turns = Turns(plan, host)
    turns.learn(history.events)
    return turns


def drive(turns: Turns, answer: Answer) -> tuple[list[Operation], bool]:
    """One turn, every operation answered by ``answer``; what was asked for, and whether to look again."""
    asked: list[Operation] = []
    turn = turns.turn()
    try:
        operation = next(turn)
        while True:
            asked.append(operation)
            try:
                result = turns.learn([]) if isinstance(operation, Read) else answer(operation)
            except CargoError as error:
                operation = turn.throw(error)
            else:
                operation = turn.send(result)
    except StopIteration as done:
        return asked, done.value


def performed(asked: list[Operation]) -> list[str]:
    """Names of the effects among ``asked``."""
    return [operation.name for operation in asked if isinstance(operation, Perform)]


def reports(asked: list[Operation]) -> list[Data]:
    """What was to be appended."""
    return [operation.data for operation in asked if isinstance(operation, Append)]


def failing(name: str, error: CargoError) -> Answer:
    """An answer that lets the effect ``name`` fail."""

    def answer(operation: Operation) -> Any:
        if isinstance(operation, Perform) and operation.name == name:
            raise error
        if isinstance(operation, Perform) and operation.name == "describe_container" and not operation.undo:
            return {field: getattr(prepared(), field) for field in type(prepared()).__struct_fields__}
        if isinstance(operation, Perform) and operation.name == "stop_container" and operation.undo:
            return {"running": True}
        if isinstance(operation, Perform) and operation.name == "digest_trees":
            return {"trees": SAMPLES["source_digested"].trees}
        return None

    return answer


def test_effects_run_in_order_and_their_outcome_is_appended() -> None:
    asked, again = drive(turns_at(source.PLAN, "alpha", "prepare_ordered"), failing("", PermanentError("never")))
    assert performed(asked) == list(source.PLAN.steps["preparing"].effects)
    assert [type(data).__name__ for data in reports(asked)] == ["SourcePrepared"]
    assert again


def test_a_host_with_nothing_to_do_asks_for_nothing() -> None:
    asked, again = drive(turns_at(source.PLAN, "alpha", "requested"), failing("", PermanentError("never")))
    assert asked == [Read()]
    assert not again


def test_a_passing_error_is_reported_once_and_waited_out_and_given_up_after_a_bound() -> None:
    turns = turns_at(source.PLAN, "alpha", "prepare_ordered")
    answers = failing("track_changes", TransientError("busy"))
    for attempt in range(1, MAX_ATTEMPTS_BEFORE_CLAIM):
        asked, again = drive(turns, answers)
        assert again
        assert asked[-1] == Wait(attempt)
    asked, _ = drive(turns, answers)
    (report,) = reports(asked)
    assert isinstance(report, StepFailed)
    assert not report.retrying


def test_the_undo_that_forgets_waits_for_all_others() -> None:
    """P11: what tells whether the container was stopped by us must last until it runs again."""
    turns = turns_at(source.PLAN, "alpha", "source_stopped", "abort_ordered")
    effects = source.PLAN.steps["restoring"].effects
    asked, _ = drive(turns, failing("stop_container", TransientError("Docker is away")))
    assert performed(asked) == list(effects[:-1])
    assert effects[-1] == "describe_container"
    asked, _ = drive(turns, failing("", TransientError("never")))
    assert performed(asked) == list(effects)


def test_a_lost_race_is_repeated_only_while_the_step_is_still_asked_for() -> None:
    turns = turns_at(target.PLAN, "beta", "source_stopped")
    lost = iter([True, False])

    def answer(operation: Operation) -> Any:
        if isinstance(operation, Append) and next(lost):
            raise ConflictError("somebody was first")
        return None

    asked, _ = drive(turns, answer)
    assert [type(operation).__name__ for operation in asked][-4:] == ["Append", "Read", "Append", "Pass"]


def test_the_outcome_of_a_step_that_was_overtaken_cannot_be_drafted() -> None:
    history = History().up_to("source_stopped")
    turns = Turns(target.PLAN, "beta")
    decision = turns.learn(history.events)
    history.add("abort_ordered")
    turns.learn(history.events[-1:])
    with pytest.raises(CancelledError):
        turns.draft(StepFailed(step="unite", reason="x", retrying=True, attempt=1, advice="y"), decision)


def test_a_step_without_an_event_rests_until_its_cause_changes_or_it_is_poked() -> None:
    turns = turns_at(target.PLAN, "beta", "target_braced")
    asked, _ = drive(turns, failing("", TransientError("never")))
    assert asked[-1] == Rest()
    assert drive(turns, failing("", TransientError("never"))) == ([Read()], False)
    turns.rested = None
    assert performed(drive(turns, failing("", TransientError("never")))[0]) == ["warm_container", "attach_remote"]


def started_again() -> StartedAgainError:
    return StartedAgainError("something else started it", "alpha", "beta")


def overtaken(operation: Operation) -> Any:
    """The source ran again, and others append first."""
    if isinstance(operation, Append):
        raise ConflictError("somebody was first")
    return failing("guard_source", started_again())(operation)


def test_a_source_that_something_else_starts_before_the_claim_has_failed_for_good() -> None:
    """A15: what it wrote is in no list, so the coordinator has to end it."""
    turns = turns_at(source.PLAN, "alpha", "source_stopped")
    asked, _ = drive(turns, failing("guard_source", started_again()))
    (report,) = reports(asked)
    assert isinstance(report, StepFailed)
    assert not report.retrying
    assert "aborted" in report.advice


def test_one_that_something_else_starts_after_the_claim_is_guarded_for_ever() -> None:
    """A15."""
    turns = turns_at(source.PLAN, "alpha", "target_claimed")
    asked, _ = drive(turns, failing("guard_source", started_again()))
    (report,) = reports(asked)
    assert isinstance(report, StepFailed)
    assert report.retrying
    assert "lives on beta" in report.advice


@pytest.mark.parametrize(
    ("meanwhile", "words"),
    [((), "aborted"), (("target_claimed",), "lives on beta"), (("target_claimed", "target_started"), "lives on beta")],
)
def test_what_only_one_look_could_find_is_told_although_others_append_first(
    meanwhile: tuple[str, ...], words: str
) -> None:
    """A15: it was stopped again, so the next look finds nothing; the step that is next by then tells it."""
    history = History().up_to("source_stopped")
    turns = Turns(source.PLAN, "alpha")
    turns.learn(history.events)

    asked, again = drive(turns, overtaken)
    assert (len(reports(asked)), again) == (1, True)
    for name in meanwhile:
        turns.learn([history.add(name)])
    asked, _ = drive(turns, failing("", PermanentError("never")))
    (report,) = reports(asked)
    assert isinstance(report, StepFailed)
    assert (performed(asked), report.reason, words in report.advice) == ([], "something else started it", True)
    assert report.retrying is bool(meanwhile)
    asked, _ = drive(turns, failing("", PermanentError("never")))
    assert [data for data in reports(asked) if isinstance(data, StepFailed)] == [], "once"


def test_a_host_has_finished_only_once_the_container_is_handed_over() -> None:
    """P10: an agent forgets what it has finished, and with it that the policy is still to be returned."""
    history = History().up_to("completed")
    history.add("finalised")
    turns = Turns(target.PLAN, "beta")
    turns.learn(history.events)
    assert not turns.finished
    asked, _ = drive(turns, failing("return_policy", TransientError("Docker is away")))
    assert [type(data).__name__ for data in reports(asked)] == ["StepFailed"]
    assert asked[-1] == Wait(1)
    assert not turns.finished
    report = reports(asked)[0]
    turns.learn([history.add(report, by="hostd/beta")])
    asked, _ = drive(turns, failing("", TransientError("never")))
    assert reports(asked) == [StepRecovered(step="hand_over")], "nothing else would ever say so"
    turns.learn([history.add(reports(asked)[0], by="hostd/beta")])
    asked, _ = drive(turns, failing("", TransientError("never")))
    assert asked[-1] == Rest()
    assert turns.finished
    source_side = Turns(source.PLAN, "alpha")
    source_side.learn(history.events)
    assert source_side.finished, "it has nothing to do any more"


def test_what_ran_before_an_abort_is_nobodys_business_after_it() -> None:
    """The container goes on where it ran."""
    history = History().up_to("source_stopped")
    turns = Turns(source.PLAN, "alpha")
    turns.learn(history.events)

    drive(turns, overtaken)
    turns.learn([history.add("abort_ordered")])
    asked, _ = drive(turns, failing("", PermanentError("never")))
    assert [type(data).__name__ for data in reports(asked)] == ["SourceRestored"]


def test_a_target_claims_nothing_once_the_source_has_failed_for_good() -> None:
    """A15, P2: not even when no coordinator is there to order the abort, nor when it was about to claim."""
    history = History().up_to("source_stopped")
    turns = Turns(target.PLAN, "beta")
    decision = turns.learn(history.events)
    assert decision.step == "unite"
    history.add(StepFailed(step="guard", reason="x", retrying=False, attempt=1, advice="y"), by="hostd/alpha")
    assert turns.learn(history.events[-1:]).step == ""
    with pytest.raises(CancelledError):
        turns.draft(TargetClaimed(), decision)
    assert performed(drive(turns, failing("", PermanentError("never")))[0]) == []
    history.add("abort_ordered")
    assert turns.learn(history.events[-1:]).step == "clean"
