"""The way back after a stop that somebody asked for and nobody saw to its end; the guard after an agent's restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.errors import PermanentError
from hostd.effects.base import Context, note_stop
from hostd.effects.guard_source import GuardSource
from hostd.effects.stop_container import StopContainer
from hostd.engine import StopResult

ENDED = StopResult(exit_code=0, unclean=False, finished_at="then")


class FakeEngine:
    """One container, of which Docker says for a while that it runs."""

    def __init__(self) -> None:
        self.run = "first"
        self.running = True
        self.ends = True
        self.policy = "no"
        self.acts: list[str] = []

    def inspect(self, _container: str) -> dict[str, Any]:
        policy = {"Name": self.policy}
        return {"State": {"Running": self.running, "StartedAt": self.run}, "HostConfig": {"RestartPolicy": policy}}

    def pid(self, _container: str) -> None:
        return None

    def stop_early(self, _container: str, _grace: int | None) -> None:
        return None

    def wait_exit(self, _container: str, _seconds: float) -> StopResult | None:
        self.acts.append("wait")
        self.running = not self.ends
        return ENDED if self.ends else None

    def stop(self, _container: str, _grace: int | None) -> StopResult:
        self.acts.append("stop")
        self.running = False
        return ENDED

    def start(self, _container: str) -> None:
        self.acts.append("start")
        self.running, self.run = True, "another"

    def set_restart_policy(self, _container: str, name: str) -> None:
        self.policy = name


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of a migration that is about to stop its source's container."""
    prepared = SimpleNamespace(container_id="c", container_name="web", shared=())
    request = SimpleNamespace(stop_timeout_seconds=None, target="beta")
    view = SimpleNamespace(
        state="frozen",
        request=request,
        seq=7,
        facts={"source_prepared": prepared},
        source_prepared=prepared,
        requested=SimpleNamespace(request=request),
        boots={"source_stopped": "before"},
    )
    bench = SimpleNamespace(engine=FakeEngine(), open_files={}, guarded={}, boot="now")
    made = SimpleNamespace(migration="m", host="alpha", view=view, bench=bench, directory=tmp_path / "m")
    note_stop(cast(Context, made))
    return cast(Context, made)


def engine_of(context: Context) -> FakeEngine:
    return cast(FakeEngine, context.bench.engine)


def test_a_stop_that_is_still_under_way_is_waited_for_before_the_container_is_started_again(context: Context) -> None:
    """A8, P13: Docker goes on with it though the agent died; the container would end after it was said to run."""
    StopContainer().run(context)
    assert StopContainer().undo(context) == {"running": True}
    assert engine_of(context).acts == ["wait", "start"]


def test_a_container_that_outlives_the_stop_runs_on(context: Context) -> None:
    StopContainer().run(context)
    engine_of(context).ends = False
    assert StopContainer().undo(context) == {"running": True, "note": ""}
    assert engine_of(context).acts == ["wait"]


def test_a_container_that_somebody_started_since_is_not_waited_for(context: Context) -> None:
    StopContainer().run(context)
    engine_of(context).run = "of somebody else"
    assert StopContainer().undo(context) == {"running": True, "note": ""}
    assert engine_of(context).acts == []


def test_before_docker_was_asked_to_stop_nothing_is_waited_for(context: Context) -> None:
    assert StopContainer().undo(context) == {"running": True, "note": ""}
    assert engine_of(context).acts == []


def test_a_policy_that_came_back_is_met_before_the_container_stops(context: Context) -> None:
    """A14: whoever manages it would only start it again."""
    engine_of(context).policy = "always"
    with pytest.raises(PermanentError, match="something else manages it"):
        StopContainer().run(context)
    assert engine_of(context).running
    assert engine_of(context).acts == []


def test_a_policy_that_came_back_after_the_stop_is_set_to_no_again(context: Context) -> None:
    """A14: a restart of Docker would revive the source beside the target."""
    StopContainer().run(context)
    engine_of(context).running, engine_of(context).policy = False, "always"
    assert GuardSource().run(context) is None
    assert engine_of(context).policy == "no"


def test_an_end_of_which_docker_has_not_taken_note_is_not_somebodys_start(context: Context) -> None:
    """A14: an agent that was started anew in that moment."""
    StopContainer().run(context)
    assert GuardSource().run(context) is None
    assert engine_of(context).acts == ["stop"]


@pytest.mark.parametrize("again", ["another run", "the same life"])
def test_a_container_that_runs_again_is_stopped_and_told(context: Context, again: str) -> None:
    """A15"""
    StopContainer().run(context)
    if again == "another run":
        engine_of(context).run = "of somebody else"
    else:
        context.bench.boot = "before"
    with pytest.raises(PermanentError, match="started on alpha by something else"):
        GuardSource().run(context)
    assert engine_of(context).acts == ["stop"]


@pytest.mark.parametrize(("state", "told"), [("frozen", True), ("yielded", False)])
def test_a_container_that_ran_again_and_has_ended_is_told_while_its_data_is_nowhere_else(
    context: Context, state: str, told: bool
) -> None:
    """A15: something may have started it for a moment; and an agent that stopped it again may have died before it said so."""
    StopContainer().run(context)
    engine_of(context).running, engine_of(context).run = False, "of somebody else"
    context.view.state = state  # type: ignore[misc]
    if told:
        with pytest.raises(PermanentError, match=r"started on alpha by something else .* it has ended by now"):
            GuardSource().run(context)
    else:
        assert GuardSource().run(context) is None
    assert engine_of(context).acts == []


@pytest.mark.parametrize("left", [b"", b"\xff"])
def test_what_a_crash_has_left_of_a_note_is_no_evidence(context: Context, left: bytes) -> None:
    """A16"""
    StopContainer().run(context)
    (context.directory / "stop-asked").write_bytes(left)
    engine_of(context).running = False
    assert GuardSource().run(context) is None
