"""The coordinator's machine: orders, aborts, refusals to go on."""

import pytest

from coordinator import lifecycle
from coordinator.lifecycle import Lifecycle, decide, fold
from events import schema
from events.errors import IllegalEventError
from events.schema import head_after
from tests.support.histories import HAPPY_PATH, SAMPLES, SOURCE, TARGET, History


def ordered(history: History) -> str:
    """Type of the event that the coordinator would append now, or nothing."""
    decision = decide(fold(history.events))
    return schema.TYPE_OF[type(decision.append[0].data)] if decision.append else ""


def test_the_happy_path_is_driven_by_the_coordinators_orders() -> None:
    history = History()
    orders = {name for name in HAPPY_PATH if "coordinator" in schema.EVENT_TYPES[name].authors}
    for name in HAPPY_PATH[1:]:
        history.add(HAPPY_PATH[len(history.events)])
        decision = decide(fold(history.events))
        if name in orders and name not in ("brace_ordered", "cutover_ordered"):  # one round is not enough
            assert schema.TYPE_OF[type(decision.append[0].data)] == name
    assert fold(history.add("completed") and history.events).terminal


def test_the_stop_is_ordered_once_the_target_has_all_ready() -> None:
    """P13: and never before, also after another round; the container runs on meanwhile."""
    history = History().up_to("sync_finished")
    for number in (2, 3):
        history.add(schema.SyncOrdered(round=number, why="again"))
        history.add(schema.SyncArmed(round=number))
        history.add(schema.SyncFinished(round=number, bytes_moved=0, files=0, duration_seconds=0.0))
        order = decide(fold(history.events)).append[0].data
        assert isinstance(order, schema.BraceOrdered)
        history.add(order)
        decision = decide(fold(history.events))
        assert decision.idle
        assert "gets ready for the start" in decision.sentence
        history.add("target_braced")
        order = decide(fold(history.events)).append[0].data
        assert isinstance(order, schema.CutoverOrdered)


def test_a_second_round_is_ordered_before_the_cut_over() -> None:
    history = History().up_to("sync_finished")
    decision = decide(fold(history.events))
    assert decision.append[0].data == schema.SyncOrdered(round=2, why="bring what changed during the first round")


def test_a_failure_for_good_before_the_claim_aborts_with_all_reasons() -> None:
    history = History().up_to("prepare_ordered")
    history.add(
        schema.StepFailed(
            step="prepare", reason="x", retrying=False, attempt=1, advice="", code="refused", reasons=("a", "b")
        ),
        by=TARGET,
    )
    order = decide(fold(history.events)).append[0].data
    assert isinstance(order, schema.AbortOrdered)
    assert "a" in order.reason
    assert "b" in order.reason


def test_a_failure_that_is_retried_waits() -> None:
    history = History().up_to("prepare_ordered")
    history.add(
        schema.StepFailed(step="prepare", reason="disk full", retrying=True, attempt=1, advice="make room"), by=SOURCE
    )
    decision = decide(fold(history.events))
    assert decision.idle
    assert "disk full" in decision.sentence
    assert "make room" in decision.sentence


@pytest.mark.parametrize("reached", ["target_claimed", "target_started", "fill_finished", "verified"])
def test_after_the_claim_no_failure_aborts(reached: str) -> None:
    history = History().up_to(reached)
    history.add(schema.StepFailed(step="fill", reason="link down", retrying=False, attempt=1, advice="wait"), by=TARGET)
    assert ordered(history) in ("", "release_ordered")


def test_lost_tracking_before_the_stop_orders_a_round_that_compares() -> None:
    """D12: an overflow is answered by comparing, never by assuming."""
    history = History().up_to("cutover_ordered")
    history.add(
        schema.StepFailed(step="stop", reason="overflow", retrying=False, attempt=1, advice="", code="tracking_lost"),
        by=SOURCE,
    )
    order = decide(fold(history.events)).append[0].data
    assert isinstance(order, schema.SyncOrdered)
    assert order.round == 2


def test_tracking_that_is_lost_again_and_again_ends_in_a_cut_over_that_assumes_nothing() -> None:
    """D12: too few watches do not keep a container from being moved; everything then counts as changed."""
    history = History().up_to("cutover_ordered")
    lost = schema.StepFailed(step="stop", reason="overflow", retrying=False, attempt=1, advice="", code="tracking_lost")
    for number in range(2, 10):
        history.add(lost, by=SOURCE)
        order = decide(fold(history.events)).append[0].data
        assert isinstance(order, schema.SyncOrdered)
        history.add(order)
        history.add(schema.SyncArmed(round=number, compare=True))
        history.add(schema.SyncFinished(round=number, bytes_moved=0, files=0, duration_seconds=0.0))
        while not isinstance(order := decide(fold(history.events)).append[0].data, schema.CutoverOrdered):
            history.add(order)
            if isinstance(order, schema.BraceOrdered):
                history.add("target_braced")
                continue
            assert isinstance(order, schema.SyncOrdered)
            history.add(schema.SyncArmed(round=order.round))
            history.add(schema.SyncFinished(round=order.round, bytes_moved=0, files=0, duration_seconds=0.0))
        history.add(order)
        if order.untracked:
            return
    pytest.fail("it never went on without tracking")


def test_an_abort_after_the_claim_is_illegal() -> None:
    history = History().up_to("target_claimed")
    history.add("abort_ordered")
    with pytest.raises(IllegalEventError):
        fold(history.events)


def test_a_claim_after_an_abort_is_illegal() -> None:
    history = History().up_to("source_stopped")
    history.add("abort_ordered")
    history.add("target_claimed")
    with pytest.raises(IllegalEventError):
        fold(history.events)


def test_an_abort_ends_when_both_hosts_have_undone_their_part() -> None:
    history = History().up_to("source_stopped")
    history.add("abort_ordered")
    assert ordered(history) == ""
    history.add("target_cleaned")
    assert ordered(history) == ""
    history.add("source_restored")
    assert ordered(history) == "aborted"


def test_an_event_by_a_host_that_may_not_write_it_is_illegal() -> None:
    history = History().up_to("prepare_ordered")
    history.add("source_prepared", by=TARGET)
    with pytest.raises(IllegalEventError):
        fold(history.events)


def test_an_order_of_an_older_epoch_is_illegal() -> None:
    """P9: nobody obeys a coordinator that was replaced."""
    history = History()
    history.add("requested", epoch=7)
    history.add("prepare_ordered", epoch=6)
    with pytest.raises(IllegalEventError):
        fold(history.events)


def test_a_paused_migration_orders_nothing_before_the_stop_and_goes_on_when_resumed() -> None:
    history = History().up_to("target_prepared")
    history.add("paused")
    assert ordered(history) == ""
    history.add("resumed")
    assert ordered(history) == "sync_ordered"


def test_every_event_type_is_a_row_or_ignored_on_purpose() -> None:
    known = {row.event for row in lifecycle.TABLE.rows} | lifecycle.TABLE.ignored
    assert set(schema.EVENT_TYPES) == known


ROLLBACK = ["rollback_ordered", "target_stopped", "carried_back", "source_restored", "target_cleaned", "rolled_back"]


@pytest.mark.parametrize("reached", ["target_claimed", "target_started", "fill_finished", "verified", "completed"])
def test_a_rollback_is_possible_from_the_claim_on_and_ends(reached: str) -> None:
    """P12: the way back after the claim leads over the target's stop."""
    history = History().up_to(reached)
    for name in ROLLBACK[:-1]:
        history.add(name)
    assert ordered(history) == "rolled_back"
    history.add("rolled_back")
    assert fold(history.events).terminal


def test_a_person_may_vouch_for_a_dead_target_and_then_nobody_waits_for_it() -> None:
    history = History().up_to("target_started")
    for name in ("rollback_ordered", "target_asserted_off", "carried_back", "source_restored"):
        history.add(name)
    assert ordered(history) == "rolled_back"


def test_a_rollback_before_the_claim_is_illegal() -> None:
    history = History().up_to("source_stopped")
    history.add("rollback_ordered")
    with pytest.raises(IllegalEventError):
        fold(history.events)


def test_the_head_shows_the_same_phase_as_the_fold() -> None:
    """P5: the cheap summary never says anything else than the history."""
    aborted = [*HAPPY_PATH[:9], "abort_ordered", "source_restored", "target_cleaned", "aborted"]
    for path in (HAPPY_PATH, aborted, [*HAPPY_PATH, "finalise_ordered", "finalised"], [*HAPPY_PATH, *ROLLBACK]):
        history = History()
        head = None
        for name in path:
            event = history.add(name)
            head = head_after(head, event)
            assert head.phase == fold(history.events).state


def test_folding_in_pieces_equals_folding_at_once() -> None:
    """P5: a fold may be continued from anywhere."""
    history = History().up_to("completed")
    state = Lifecycle()
    for event in history.events:
        state = lifecycle.apply(state, event)
    assert state == fold(history.events)


def test_every_sample_belongs_to_its_type() -> None:
    assert set(SAMPLES) == set(schema.EVENT_TYPES)
