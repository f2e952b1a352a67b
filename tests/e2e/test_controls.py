"""Every control, as a person gives it with etcdctl and with cargoctl: obeyed, or answered with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from events import schema
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]


def refusals(fleet: Fleet, migration: str) -> list[str]:
    """Why controls were refused so far."""
    return [event.data.reason for event in fleet.events(migration) if isinstance(event.data, schema.ControlRefused)]


def by_etcdctl(fleet: Fleet, migration: str, wish: str) -> None:
    """``etcdctl put /cargo/controls/<id>``."""
    name, _, number = wish.partition(" ")
    fleet.control(migration, {"control": name, "kib": int(number)} if number else name)


def by_cargoctl(fleet: Fleet, migration: str, wish: str) -> None:
    """``cargoctl <control> <id>``; its exit code says whether it was obeyed."""
    before = len(refusals(fleet, migration))
    name, _, number = wish.partition(" ")
    done = fleet.cargoctl(name, migration, *(["--kib", number] if number else []))
    refused = refusals(fleet, migration)[before:]
    assert done.returncode == (1 if refused else 0), done.stdout + done.stderr
    if refused:
        assert refused[0][:40] in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("way", [by_etcdctl, by_cargoctl], ids=["etcdctl", "cargoctl"])
def test_every_control_is_obeyed_in_its_time_and_refused_with_a_reason_out_of_it(
    fleet: Fleet, way: Callable[[Fleet, str, str], None]
) -> None:
    """P13, P12: pause, resume, retry, bwlimit, finalise, rollback and abort, each at the right and at the wrong moment."""
    name = way.__name__.replace("_", "-")
    (fleet.volume("alpha", f"{name}-data") / "goods").write_bytes(b"goods" * 1000)
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}})

    def say(wish: str, *, answered_by: str) -> None:
        before = len(fleet.events(f"{name}-1"))
        way(fleet, f"{name}-1", wish)
        fresh = [event.type for event in fleet.events(f"{name}-1")[before:]]
        assert answered_by in fresh, (wish, fresh)

    failing = "target.fill_replica:before_effect=error(no link)"
    fleet.failpoints("hostd/beta", f"target.pull_round:before_effect=pause;{failing}")
    fleet.request(f"{name}-1", name, max_rounds=2)
    fleet.wait_for(f"{name}-1", "sync_armed")
    say("bwlimit 50000", answered_by="bwlimit_ordered")
    say("finalise", answered_by="control_refused")
    say("rollback", answered_by="control_refused")
    say("pause", answered_by="paused")
    say("retry", answered_by="control_refused")
    fleet.failpoints("hostd/beta", failing)
    say("resume", answered_by="resumed")
    fleet.wait_for(f"{name}-1", "step_failed")
    say("retry", answered_by="resumed")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end(f"{name}-1", "completed")
    say("abort", answered_by="control_refused")
    say("pause", answered_by="control_refused")
    say("bwlimit 7", answered_by="control_refused")
    way(fleet, f"{name}-1", "finalise")
    fleet.wait_for(f"{name}-1", "finalised")
    way(fleet, f"{name}-1", "rollback")
    fleet.wait_end(f"{name}-1", "rolled_back")
    say("abort", answered_by="control_refused")
    say("finalise", answered_by="control_refused")
    say("retry", answered_by="control_refused")
    assert len(refusals(fleet, f"{name}-1")) == 9
    assert all(refusals(fleet, f"{name}-1"))
    fleet.assert_sound(f"{name}-1")
    fleet.wait_running("alpha", name)


def test_the_faults_of_a_host_whose_name_begins_like_this_ones_are_not_this_ones(fleet: Fleet) -> None:
    """Both keys come by one watch, in their order."""
    other = fleet.keys.failpoints("hostd/beta-2")
    since = fleet.log_size("beta.hostd")
    fleet.store.put(other, b"target.pull_round:before_effect=error(not meant here)")
    try:
        fleet.failpoints("hostd/beta", "target.pull_round:before_effect=pause@99")
        assert b"not meant here" not in (fleet.lab.spec.logs / "beta.hostd.log").read_bytes()[since:]
    finally:
        fleet.store.delete(other)
        fleet.failpoints("hostd/beta", "")
