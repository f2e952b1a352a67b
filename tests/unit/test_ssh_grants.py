"""What a history admits, in every state of both machines."""

from __future__ import annotations

import pytest

from events import schema
from events.schema import Data, DirtyManifest
from hostd import source, target
from hostd.plan import Plan, View
from hostd.ssh_grants import Admission, admission, foreseen
from tests.support.histories import HAPPY_PATH, REF, SAMPLES, History, prepared

STOPPED = schema.TargetStopped(
    exit_code=0,
    trees=(DirtyManifest(destination="/data", manifest=REF, stale_files=0, stale_bytes=0, everything=True),),
    places={"/data": "/v/moved/_data"},
)


def seen(plan: Plan, history: History) -> View:
    return plan.fold(history.events)


def trees(admitted: Admission | None) -> list[str]:
    return [tree.path for tree in admitted.trees] if admitted is not None else []


def test_the_source_serves_from_its_description_to_the_release_and_to_the_target_only() -> None:
    history = History()
    serving = []
    for step in HAPPY_PATH:
        history.add(step)
        admitted = admission(source.PLAN, seen(source.PLAN, history))
        assert admission(target.PLAN, seen(target.PLAN, history)) is None, step
        if admitted is not None:
            assert (admitted.peer, admitted.role, trees(admitted)) == ("beta", "source", ["/v/data/_data"])
            serving.append(step)
    assert serving == HAPPY_PATH[HAPPY_PATH.index("source_prepared") : HAPPY_PATH.index("release_ordered")]


@pytest.mark.parametrize("last", HAPPY_PATH[:9])
def test_an_abort_ends_what_was_admitted(last: str) -> None:
    history = History().up_to(last)
    history.add("abort_ordered")
    assert admission(source.PLAN, seen(source.PLAN, history)) is None
    assert admission(target.PLAN, seen(target.PLAN, history)) is None


def test_what_is_admitted_does_not_change_in_between() -> None:
    """Nothing has to become durable in the stop window."""
    history = History().up_to("source_prepared")
    first = admission(source.PLAN, seen(source.PLAN, history))
    for step in HAPPY_PATH[HAPPY_PATH.index("target_prepared") : HAPPY_PATH.index("release_ordered")]:
        history.add(step)
        assert admission(source.PLAN, seen(source.PLAN, history)) == first


@pytest.mark.parametrize("last", ["target_claimed", "target_started", "verified", "completed"])
def test_rolling_back_the_target_serves_the_source_until_the_container_runs_there(last: str) -> None:
    history = History().up_to(last)
    history.add("rollback_ordered")
    assert trees(admission(source.PLAN, seen(source.PLAN, history))) == (
        [] if last == "completed" else ["/v/data/_data"]
    ), "before it stops, the target may still lack something"
    assert admission(target.PLAN, seen(target.PLAN, history)) is None
    history.add(STOPPED)
    assert admission(source.PLAN, seen(source.PLAN, history)) is None
    served = admission(target.PLAN, seen(target.PLAN, history))
    assert served is not None
    assert (served.peer, served.role, trees(served)) == ("alpha", "target", ["/v/moved/_data"])
    assert not served.trees[0].viewed
    assert served.names == ("changes-*.manifest",)
    history.add("carried_back")
    assert admission(target.PLAN, seen(target.PLAN, history)) == served
    history.add("source_restored")
    assert admission(target.PLAN, seen(target.PLAN, history)) is None


def test_a_target_whose_writes_are_given_up_serves_nothing() -> None:
    history = History().up_to("target_started")
    history.add(schema.RollbackOrdered(reason="x", discard_target_writes=True))
    history.add("target_stopped")
    assert admission(target.PLAN, seen(target.PLAN, history)) is None


def test_only_trees_that_are_federated_by_sshfs_may_be_looked_at() -> None:
    mounts = (
        schema.Mount(kind="volume", name="data", destination="/data", tree="/v"),
        schema.Mount(kind="bind", name="/one", destination="/one", tree="/one", single_file=True),
        schema.Mount(kind="rootfs", name="", destination="/", tree="/layer"),
    )
    for remote, viewed in (("sshfs", [True, False, False]), ("nfs", [False, False, False])):
        history = History().up_to("prepare_ordered")
        history.add(prepared(mounts=mounts, remote=remote))
        admitted = admission(source.PLAN, seen(source.PLAN, history))
        assert admitted is not None
        assert [tree.viewed for tree in admitted.trees] == viewed
        assert [tree.single_file for tree in admitted.trees] == [False, True, False]


@pytest.mark.parametrize(
    ("plan", "last", "event"),
    [(source.PLAN, "prepare_ordered", "source_prepared"), (target.PLAN, "target_started", "target_stopped")],
)
def test_what_an_event_will_admit_is_known_before_it_is_appended(plan: Plan, last: str, event: str) -> None:
    history = History().up_to(last)
    if event == "target_stopped":
        history.add("rollback_ordered")
    data: Data = STOPPED if event == "target_stopped" else SAMPLES[event]
    before = admission(plan, foreseen(plan, seen(plan, history), data))
    history.add(data)
    assert before is not None
    assert before == admission(plan, seen(plan, history))


def test_before_anything_is_read_nothing_is_admitted() -> None:
    for plan in (source.PLAN, target.PLAN):
        assert admission(plan, plan.start()) is None
