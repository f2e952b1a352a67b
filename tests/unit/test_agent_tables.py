"""The copy of the agents' machines is the agents' machines, and the failpoints follow from it."""

from __future__ import annotations

import pytest

from coordinator.replay import AgentWalk
from docskit import agent_tables
from events import schema
from events.agent_tables import AGENTS
from events.failpoint_names import FAILPOINTS, points_of
from events.failpoints import Failpoints, parse
from hostd import source, target
from hostd.plan import Plan
from tests.support import played

PLANS = {"source": source.PLAN, "target": target.PLAN}


def test_the_copy_is_current() -> None:
    assert agent_tables.PLACE.read_text() == agent_tables.text(), "run scripts/docs and review the difference"


@pytest.mark.parametrize("role", PLANS)
def test_the_copy_says_what_the_agents_own_table_says(role: str) -> None:
    """P5: a replay by cargoctl goes through the states that the agent goes through."""
    plan, copy = PLANS[role], AGENTS[role]
    assert copy.table.rows == plan.table.rows
    assert copy.table.ignored == plan.table.ignored
    assert copy.table.states == plan.table.states
    assert {state: step.effects for state, step in copy.steps.items()} == {
        state: tuple(step.effects) for state, step in plan.steps.items()
    }


@pytest.mark.parametrize("role", PLANS)
def test_every_effect_and_every_reporting_step_has_a_point_before_and_after(role: str) -> None:
    """The crash matrix cannot forget a step."""
    plan: Plan = PLANS[role]
    points = set(FAILPOINTS[role])
    for step in plan.steps.values():
        for effect in step.effects if not step.undo else ():
            assert {f"{role}.{effect}:before_effect", f"{role}.{effect}:after_effect"} <= points
        if step.conclude is not None:
            assert {f"{role}.{step.name}:before_event", f"{role}.{step.name}:after_event"} <= points


def test_every_order_of_the_coordinator_has_a_point_before_and_after() -> None:
    """Its orders are its acts."""
    points = set(FAILPOINTS["coordinator"])
    for name, row in schema.EVENT_TYPES.items():
        if row.authors == ("coordinator",):
            assert {f"coordinator.{name}:before_event", f"coordinator.{name}:after_event"} <= points


def test_every_point_can_be_named_in_a_specification_and_is_listed_once() -> None:
    every = [point for points in FAILPOINTS.values() for point in points]
    assert len(every) == len(set(every))
    assert set(parse(";".join(f"{point}=kill" for point in every))) == set(every)
    Failpoints().hit(every[0])


def test_a_process_has_the_points_of_its_roles() -> None:
    assert points_of("coordinator") == FAILPOINTS["coordinator"]
    assert set(points_of("hostd/beta")) == set(FAILPOINTS["source"] + FAILPOINTS["target"])


@pytest.mark.parametrize("role", PLANS)
def test_a_replay_stands_where_the_agent_stands_and_answers_what_the_agent_answers(role: str) -> None:
    """P5: state and cause, after every event of every way that a migration may go."""
    for player in (played.completed(), played.aborted(), played.rolled_back(), played.finalised()):
        walk, view = AgentWalk.start(role), PLANS[role].start()
        for event in player.events:
            walk, view = walk.after(event.type, event.seq), PLANS[role].apply(view, event)
            assert (walk.state, walk.cause) == (view.state, view.cause)
