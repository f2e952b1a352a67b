"""The agents' machines: tables are total, steps exist, nothing runs twice or too early."""

import pytest

from coordinator import lifecycle
from events import schema
from events.errors import IllegalEventError
from events.machine import Table
from hostd import source, target
from hostd.effects.registry import EFFECTS
from hostd.plan import Plan
from tests.support.histories import HAPPY_PATH, SOURCE, TARGET, History

PLANS = {"source": source.PLAN, "target": target.PLAN}


@pytest.mark.parametrize("table", [lifecycle.TABLE, source.TABLE, target.TABLE], ids=lambda table: table.name)
def test_every_state_is_reachable_and_only_final_states_are_dead_ends(table: Table) -> None:
    reached, edge = {table.initial}, {table.initial}
    while edge:
        edge = {row.next_state for row in table.rows if set(row.states) & reached} - reached
        reached |= edge
    assert reached == set(table.states)
    leaving = {state for row in table.rows for state in row.states}
    assert set(table.states) - leaving <= set(table.final)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_event_type_is_a_row_or_ignored_on_purpose(plan: Plan) -> None:
    known = {row.event for row in plan.table.rows} | plan.table.ignored
    assert set(schema.EVENT_TYPES) == known


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_effect_that_a_machine_names_exists_and_every_step_belongs_to_a_state(plan: Plan) -> None:
    for state, step in plan.steps.items():
        assert state in plan.table.states
        assert set(step.effects) <= set(EFFECTS)


def test_no_effect_is_without_a_machine_that_names_it() -> None:
    named = {name for plan in PLANS.values() for step in plan.steps.values() for name in step.effects}
    assert set(EFFECTS) == named


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_happy_path_folds_and_a_step_waits_after_each_order_to_this_host(plan: Plan) -> None:
    history = History().up_to("completed")
    view = plan.start()
    for event in history.events:
        before = plan.decide(view, f"hostd/{plan.role}")
        concluding = event.by == {"source": SOURCE, "target": TARGET}[plan.role]
        assert not concluding or before.effects
        view = plan.apply(view, event)
    assert view.state in {"source": "kept", "target": "settled"}[plan.role]


def test_the_target_starts_nothing_before_the_claim() -> None:
    history = History()
    for name in HAPPY_PATH[: HAPPY_PATH.index("target_claimed")]:
        history.add(name)
        assert "start_container" not in target.PLAN.decide(target.PLAN.fold(history.events), TARGET).effects
    history.add("target_claimed")
    assert "start_container" in target.PLAN.decide(target.PLAN.fold(history.events), TARGET).effects


def test_the_union_is_mounted_only_after_the_source_has_stopped() -> None:
    """O1: what the union shows as lower must never change."""
    history = History()
    for name in HAPPY_PATH[: HAPPY_PATH.index("source_stopped")]:
        history.add(name)
        assert "mount_union" not in target.PLAN.decide(target.PLAN.fold(history.events), TARGET).effects


def test_the_source_disarms_before_it_stops_and_never_stops_without_an_order() -> None:
    """A14: the policy goes first."""
    history = History()
    for name in HAPPY_PATH[: HAPPY_PATH.index("source_stopped")]:
        history.add(name)
        effects = source.PLAN.decide(source.PLAN.fold(history.events), SOURCE).effects
        assert ("stop_container" in effects) == (name == "cutover_ordered")
    order = source.PLAN.steps["stopping"].effects
    assert order.index("disarm_restart") < order.index("stop_container") < order.index("publish_dirty")


def test_a_source_that_was_claimed_from_never_restores() -> None:
    history = History().up_to("target_claimed")
    history.add("abort_ordered")
    with pytest.raises(IllegalEventError):
        source.PLAN.fold(history.events)


def test_an_order_of_an_older_epoch_is_not_obeyed() -> None:
    """P9: an agent never acts on an epoch lower than it has seen."""
    history = History()
    history.add("requested", epoch=5)
    history.add("prepare_ordered", epoch=4)
    for plan in PLANS.values():
        with pytest.raises(IllegalEventError):
            plan.fold(history.events)


def test_a_step_that_failed_for_good_is_not_repeated_until_an_order_moves_the_machine() -> None:
    history = History().up_to("cutover_ordered")
    history.add(
        schema.StepFailed(step="stop", reason="x", retrying=False, attempt=1, advice="", code="tracking_lost"),
        by=SOURCE,
    )
    assert source.PLAN.decide(source.PLAN.fold(history.events), SOURCE).idle
    history.add(schema.SyncOrdered(round=2, why="compare"))
    assert source.PLAN.decide(source.PLAN.fold(history.events), SOURCE).step == "arm"


def test_the_way_back_undoes_every_effect_that_may_have_left_something() -> None:
    undone = set(source.PLAN.steps["restoring"].effects) | set(target.PLAN.steps["cleaning"].effects)
    assert {"disarm_restart", "stop_container", "track_changes"} <= undone
    assert {"create_container", "create_volumes", "mount_union", "attach_remote"} <= undone
