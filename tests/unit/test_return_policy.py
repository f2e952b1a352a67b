"""When a container that has moved gets its own restart policy back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.errors import TransientError
from hostd import target
from hostd.effects import return_policy
from hostd.effects.base import Context
from hostd.effects.return_policy import ReturnPolicy, note_policy_due, require_policy_returned
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
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(return_policy, "our_container", lambda _context: "c")
    prepared = SimpleNamespace(restart_policy="always", restart_max_retries=0, shared=())
    view = SimpleNamespace(source_prepared=prepared)
    bench = SimpleNamespace(engine=FakeEngine(), manual_stops=set())
    made = SimpleNamespace(migration="m-1", host="beta", view=view, bench=bench, directory=tmp_path / "m-1")
    return cast(Context, made)


def engine_of(context: Context) -> FakeEngine:
    return cast(FakeEngine, context.bench.engine)


def test_the_policy_returns_only_when_nobody_can_roll_back_any_more() -> None:
    """P1, P10: a host that is vouched to be off starts nothing by itself when it comes back."""
    steps = {name: step.effects for name, step in target.PLAN.steps.items()}
    assert [name for name, effects in steps.items() if "return_policy" in effects] == ["finalised"]
    history = History().up_to("completed")
    history.add("finalised")
    view = target.PLAN.fold(history.events)
    assert target.PLAN.decide(view, "hostd/beta").effects == ("return_policy",)


def test_it_returns_once_and_what_ended_meanwhile_is_started(context: Context) -> None:
    note_policy_due(context)
    engine_of(context).running = False
    ReturnPolicy().run(context)
    assert (engine_of(context).policy, engine_of(context).running) == ("always", True)
    engine_of(context).policy, engine_of(context).running = "no", False  # a person's wish
    ReturnPolicy().run(context)
    assert (engine_of(context).policy, engine_of(context).running) == ("no", False)


def test_a_container_that_somebody_removed_gets_nothing(context: Context) -> None:
    note_policy_due(context)
    engine_of(context).there = False
    ReturnPolicy().run(context)
    assert not list(context.directory.iterdir())


@pytest.mark.parametrize("label", ["m-1", "m-2", "../m-1", ""])
def test_a_container_does_not_move_on_before_it_has_its_policy_back(context: Context, label: str) -> None:
    """Else the next migration would take "no" for its own. The label is a container's, so anything may be in it."""
    note_policy_due(context)
    inspected = {"Config": {"Labels": {MIGRATION_LABEL: label}}}
    if label == "m-1":
        with pytest.raises(TransientError, match="its own restart policy back, which ends the migration m-1"):
            require_policy_returned(context, inspected)
        ReturnPolicy().run(context)
    require_policy_returned(context, inspected)
    require_policy_returned(context, {"Config": {"Labels": None}})
