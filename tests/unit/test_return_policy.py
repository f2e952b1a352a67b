"""When a container that has moved gets its own restart policy back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.errors import PermanentError
from hostd import target
from hostd.effects.base import Context
from hostd.effects.return_policy import ReturnPolicy, note_policy_due, return_first
from hostd.spec import MIGRATION_LABEL
from tests.support.histories import History


class FakeEngine:
    """One container that moved here, without a policy."""

    def __init__(self) -> None:
        self.policy, self.running, self.there = "no", True, True

    def inspect(self, _id: str) -> dict[str, Any] | None:
        return {"State": {"Running": self.running, "ExitCode": 0}} if self.there else None

    def set_restart_policy(self, _id: str, name: str, _retries: int) -> None:
        self.policy = name

    def start(self, _id: str) -> None:
        self.running = True


@pytest.fixture
def context(tmp_path: Path) -> Context:
    prepared = SimpleNamespace(restart_policy="always", restart_max_retries=0, shared=())
    view = SimpleNamespace(source_prepared=prepared)
    bench = SimpleNamespace(engine=FakeEngine(), manual_stops=set())
    made = SimpleNamespace(migration="m-1", host="beta", view=view, bench=bench, directory=tmp_path / "m-1")
    return cast(Context, made)


def engine_of(context: Context) -> FakeEngine:
    return cast(FakeEngine, context.bench.engine)


def test_the_policy_returns_only_once_finalised_is_in_the_history() -> None:
    """P1, P10: whatever is ordered before that, Docker starts nothing here by itself."""
    steps = {name: step.effects for name, step in target.PLAN.steps.items()}
    assert [name for name, effects in steps.items() if "return_policy" in effects] == ["finalised"]
    history = History().up_to("completed")
    history.add("finalised")
    view = target.PLAN.fold(history.events)
    assert target.PLAN.decide(view, "hostd/beta").effects == ("return_policy",)


def test_it_returns_once_and_what_ended_meanwhile_is_started(context: Context) -> None:
    note_policy_due(context, "c")
    engine_of(context).running = False
    ReturnPolicy().run(context)
    assert (engine_of(context).policy, engine_of(context).running) == ("always", True)
    engine_of(context).policy, engine_of(context).running = "no", False  # a person's wish
    ReturnPolicy().run(context)
    assert (engine_of(context).policy, engine_of(context).running) == ("no", False)


def test_a_container_that_somebody_removed_gets_nothing(context: Context) -> None:
    note_policy_due(context, "c")
    engine_of(context).there = False
    ReturnPolicy().run(context)
    assert not list(context.directory.iterdir())


@pytest.mark.parametrize(
    ("label", "container", "returned"),
    [("m-1", "c", True), ("m-1", "another", False), ("m-2", "c", False), ("../m-1", "c", False), ("", "c", False)],
)
def test_a_container_that_moves_on_gets_its_policy_back_first(
    context: Context, label: str, container: str, returned: bool
) -> None:
    """Else the next migration would take "no" for its own. The label is a container's, so anything may be in it."""
    note_policy_due(context, "c")
    later = cast(
        Context, SimpleNamespace(migration="m-3", bench=context.bench, directory=context.directory.parent / "m-3")
    )
    inspected = {"Id": container, "Config": {"Labels": {MIGRATION_LABEL: label}}}
    assert return_first(later, inspected) is returned
    assert (engine_of(context).policy == "always") is returned
    assert not return_first(later, inspected), "once"
    assert not return_first(later, {"Id": "c", "Config": {"Labels": None}})
    if returned:
        engine_of(context).policy = "a person's"
        ReturnPolicy().run(context)
        assert engine_of(context).policy == "a person's"


def test_a_damaged_record_of_it_stops_the_step(context: Context) -> None:
    note_policy_due(context, "c")
    (context.directory / "policy-due").write_bytes(b"\xff")
    with pytest.raises(PermanentError, match="own record"):
        ReturnPolicy().run(context)
