"""A person who pauses, renames, removes or restarts a container in the middle of its migration comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from events import schema
from labkit.waiting import wait_until
from tests.support.fleet import Container, Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def interrupted(fleet: Fleet, name: str, act: Callable[[Container], object]) -> None:
    """A migration in whose pre-copy a person does ``act``, right before the cut-over is ordered."""
    (fleet.volume("alpha", f"{name}-data") / "goods").write_text("goods")
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/beta", "target.sync:before_event=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-1", name)
    fleet.wait_step("beta.hostd", '"point": "target.sync:before_event"', since)
    act(fleet.present("alpha", name))
    fleet.failpoints("hostd/beta", "")


def aborted_for(fleet: Fleet, migration: str) -> str:
    events = fleet.wait_end(migration, "aborted")
    assert "source_stopped" not in [event.type for event in events]
    failed = next(event.data for event in events if isinstance(event.data, schema.StepFailed))
    assert failed.code == "container_changed"
    fleet.assert_clean("beta", migration)
    fleet.assert_clean("alpha", migration)
    return next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))


def test_a_container_that_a_person_pauses_stays_paused_on_the_source(fleet: Fleet) -> None:
    """F5: to stop it would wake it up first."""
    interrupted(fleet, "paused", lambda container: container.pause())
    assert "paused" in aborted_for(fleet, "paused-1")
    assert fleet.present("alpha", "paused").status == "paused"
    assert fleet.policy("alpha", "paused") == "always"
    fleet.present("alpha", "paused").unpause()


def test_a_container_that_a_person_renames_keeps_its_new_name_and_runs(fleet: Fleet) -> None:
    """F4: the request spoke of a container of another name."""
    interrupted(fleet, "named", lambda container: container.rename("renamed"))
    assert "renamed to 'renamed'" in aborted_for(fleet, "named-1")
    assert fleet.running("alpha", "renamed")
    assert fleet.policy("alpha", "renamed") == "always"


def test_a_container_that_a_person_removes_is_not_made_again(fleet: Fleet) -> None:
    """F4: removed, and another one of the same name made."""

    def replace(container: Container) -> None:
        container.remove(force=True)
        fleet.sleeper("replaced")

    interrupted(fleet, "replaced", replace)
    assert "removed" in aborted_for(fleet, "replaced-1")
    assert fleet.running("alpha", "replaced"), "whatever has the name now was not touched"
    assert fleet.policy("alpha", "replaced") == "no"
    assert fleet.container("beta", "replaced") is None


def test_a_container_that_a_person_restarts_moves_all_the_same(fleet: Fleet) -> None:
    """F5: its changes are tracked whoever makes them."""

    def restart(container: Container) -> None:
        fleet.execute("alpha", "restarted", "echo before > /data/before")
        container.restart(timeout=5)
        fleet.execute("alpha", "restarted", "echo after > /data/after")

    interrupted(fleet, "restarted", restart)
    fleet.wait_end("restarted-1", "completed")
    assert fleet.execute("beta", "restarted", "cd /data && cat before after goods").split() == [
        "before",
        "after",
        "goods",
    ]
    fleet.assert_sound("restarted-1")


def test_a_container_that_ends_by_itself_is_left_as_it_ended(fleet: Fleet) -> None:
    """F5: nobody asked for a copy of a service that has given up; it is a person's to look at."""

    def end(container: Container) -> None:
        container.update(restart_policy={"Name": "no"})
        container.exec_run(["kill", "-TERM", "1"])
        container.wait()

    interrupted(fleet, "ended", end)
    assert "stopped" in aborted_for(fleet, "ended-1")
    ended = fleet.present("alpha", "ended")
    assert (ended.status, ended.attrs["State"]["ExitCode"]) == ("exited", 0)


# --- after the start on the target ------------------------------------------------------------------------


def interrupted_in_the_fill(fleet: Fleet, name: str, act: Callable[[Container], object]) -> None:
    """A migration after whose start on beta, while all data still lies on alpha, a person does ``act``."""
    (fleet.volume("alpha", f"{name}-data") / "goods").write_text("goods\n")
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.execute("alpha", name, "echo outside > /outside")
    fleet.failpoints("hostd/beta", "target.fill_replica:before_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-1", name, strategy="postcopy")
    fleet.wait_step("beta.hostd", '"point": "target.fill_replica:before_effect"', since, 40)
    act(fleet.present("beta", name))
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end(f"{name}-1", "completed")
    fleet.assert_sound(f"{name}-1")
    assert not fleet.running("alpha", f"{name}.cargo-{name}-1")


def rename_and_restart(container: Container) -> None:
    container.rename(f"{container.name}-anew")
    container.restart(timeout=5)


@pytest.mark.long
def test_a_container_that_a_person_renames_and_restarts_during_the_fill_becomes_an_ordinary_one(fleet: Fleet) -> None:
    """F4, F5: it is known by what it is, not by its name; a start finds its data in place."""
    interrupted_in_the_fill(fleet, "refilled", rename_and_restart)
    assert fleet.execute("beta", "refilled-anew", "cat /data/goods /outside").split() == ["goods", "outside"]
    fleet.control("refilled-1", "finalise")
    fleet.wait_for("refilled-1", "finalised")
    fleet.wait_running("beta", "refilled-anew")
    assert fleet.execute("beta", "refilled-anew", "cat /data/goods /outside").split() == ["goods", "outside"]
    fleet.wait_policy("beta", "refilled-anew", "always")
    assert fleet.container("beta", "refilled") is None


def test_a_container_that_a_person_renamed_on_the_target_does_not_run_on_after_a_rollback(fleet: Fleet) -> None:
    """F4, P1: stopped there before it starts on the source, with all that it wrote."""
    interrupted_in_the_fill(fleet, "turned", rename_and_restart)
    fleet.execute("beta", "turned-anew", "echo more >> /data/goods; echo more >> /outside")
    fleet.control("turned-1", "rollback")
    fleet.wait_end("turned-1", "rolled_back")
    assert fleet.container("beta", "turned-anew") is None
    said = fleet.execute("alpha", "turned", "cat /data/goods /outside").split()
    assert said == ["goods", "more", "outside", "more"]
    fleet.assert_clean("beta", "turned-1")
    fleet.assert_sound("turned-1")


@pytest.mark.long
def test_a_container_that_a_person_pauses_during_the_fill_stays_paused_while_its_data_arrives(fleet: Fleet) -> None:
    """F5: nothing wakes it up, and nothing waits for it."""
    interrupted_in_the_fill(fleet, "iced", lambda container: container.pause())
    assert fleet.present("beta", "iced").status == "paused"
    fleet.present("beta", "iced").unpause()
    assert fleet.execute("beta", "iced", "cat /data/goods /outside").split() == ["goods", "outside"]


@pytest.mark.long
def test_a_container_that_a_person_stops_during_the_fill_stays_stopped_with_all_of_its_data(fleet: Fleet) -> None:
    """F5: as Docker would leave it, whatever its restart policy."""
    interrupted_in_the_fill(fleet, "halted", lambda container: container.stop(timeout=5))
    fleet.wait_for("halted-1", "finalised")
    assert fleet.present("beta", "halted").status == "exited"
    fleet.present("beta", "halted").start()
    assert fleet.execute("beta", "halted", "cat /data/goods /outside").split() == ["goods", "outside"]


@pytest.mark.long
def test_a_container_that_ends_by_itself_during_the_fill_is_started_again_as_its_policy_says(fleet: Fleet) -> None:
    """F5: the agent stands in for Docker."""

    def end(container: Container) -> None:
        container.exec_run(["kill", "-TERM", "1"])
        container.wait()

    interrupted_in_the_fill(fleet, "fallen", end)
    fleet.wait_running("beta", "fallen")
    assert fleet.execute("beta", "fallen", "cat /data/goods /outside").split() == ["goods", "outside"]


@pytest.mark.long
def test_a_container_that_a_person_removes_during_the_fill_leaves_its_volume_complete(fleet: Fleet) -> None:
    """F4: its writable layer went with it, and is kept on the source; it is not made again."""
    interrupted_in_the_fill(fleet, "dropped", lambda container: container.remove(force=True))
    fleet.wait_for("dropped-1", "finalised")
    assert fleet.container("beta", "dropped") is None
    assert fleet.volume_path("beta", "dropped-data", "goods").read_text() == "goods\n"
    assert fleet.volume_path("alpha", "dropped-data", "goods").read_text() == "goods\n"
    assert fleet.container("alpha", "dropped.cargo-dropped-1") is not None


# --- the source's copy is started by hand ------------------------------------------------------------------

DIARY = "echo began >> /data/diary; trap 'exit 0' TERM; sleep 100000 & wait"


def diarist(fleet: Fleet, name: str) -> Container:
    """A container on alpha that writes down each of its starts. The oracle does not look: it is to run twice."""
    (fleet.volume("alpha", f"{name}-data") / "goods").write_text("goods\n")
    options = {"volumes": {f"{name}-data": {"bind": "/data"}}, "restart_policy": {"Name": "always"}}
    made = fleet.docker["alpha"].containers.run(
        fleet.images["busybox"], ["sh", "-c", DIARY], name=name, detach=True, **options
    )
    fleet.wait_listed("alpha", name)
    return made


def start_at(fleet: Fleet, name: str, point: str, **request: object) -> Container:
    """Bring a migration to a point of beta's, at which beta waits, and start the source's copy there by hand.

    Returns that copy once it has been stopped again, which is also in the history.
    """
    copy = diarist(fleet, name)
    fleet.failpoints("hostd/beta", f"{point}=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-1", name, **request)
    fleet.wait_step("beta.hostd", f'"point": "{point}"', since, 40)
    wait_until(lambda: not fleet.running("alpha", name), "Docker takes no note of the stop", 10)
    copy.start()  # before that it would do nothing
    failed = fleet.wait_for(f"{name}-1", "step_failed").data
    assert isinstance(failed, schema.StepFailed)
    assert "was started on alpha by something else" in failed.reason
    assert "was stopped again" in failed.reason
    assert not fleet.running("alpha", name)
    return copy


def test_a_source_that_is_started_by_hand_before_the_claim_ends_the_migration_and_stays(fleet: Fleet) -> None:
    """A15, P1: stopped again before the target may start; its data is the newest, so that is where it runs on."""
    start_at(fleet, "eager", "target.apply_dirty:before_effect")
    fleet.failpoints("hostd/beta", "")
    events = fleet.wait_end("eager-1", "aborted")
    assert "target_claimed" not in [event.type for event in events]
    fleet.wait_running("alpha", "eager")
    assert fleet.policy("alpha", "eager") == "always"
    assert fleet.execute("alpha", "eager", "cat /data/diary").split() == ["began"] * 3, "its first life, by hand, ours"
    fleet.assert_clean("beta", "eager-1")
    fleet.assert_sound("eager-1")


@pytest.mark.long
def test_a_source_that_is_started_by_hand_during_the_fill_is_stopped_and_the_target_lives_on(fleet: Fleet) -> None:
    """A15, P1, P3: its data may have changed, which is told; what the target has is what it had at the stop."""
    start_at(fleet, "tardy", "target.fill_replica:before_effect", strategy="postcopy")
    assert fleet.running("beta", "tardy")
    said = fleet.cargoctl("why", "tardy-1").stdout
    assert "was started on alpha by something else" in said
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("tardy-1", "completed")
    assert fleet.execute("beta", "tardy", "cat /data/goods /data/diary").split() == ["goods", "began", "began"]
    assert not fleet.running("alpha", "tardy.cargo-tardy-1")
    fleet.assert_sound("tardy-1")


def test_a_kept_copy_that_a_person_has_started_is_stopped_before_a_rollback_touches_its_data(fleet: Fleet) -> None:
    """A15, P12: it runs on its data alone after the release; what the target wrote comes into data that nobody uses."""
    diarist(fleet, "kept")
    fleet.migrate("kept-1", "kept")
    fleet.execute("beta", "kept", "echo more >> /data/goods")
    copy = fleet.present("alpha", "kept.cargo-kept-1")
    copy.start()
    assert fleet.running("alpha", "kept.cargo-kept-1")
    fleet.control("kept-1", "rollback")
    events = fleet.wait_end("kept-1", "rolled_back")
    failed = next(event.data for event in events if isinstance(event.data, schema.StepFailed))
    assert "was started on alpha by something else" in failed.reason
    fleet.wait_running("alpha", "kept")
    assert fleet.execute("alpha", "kept", "cat /data/goods").split() == ["goods", "more"]
    fleet.assert_clean("beta", "kept-1")
    fleet.assert_sound("kept-1")


# --- how the container is stopped ------------------------------------------------------------------------

STUBBORN = "trap 'echo asked >> /data/said' INT; trap 'echo wrong >> /data/said' TERM; while :; do sleep 1; done"


def told_end(events: Sequence[schema.Event]) -> tuple[int | None, bool]:
    """Exit code, and whether it had to be killed: at the stop, or as soon as Docker knew."""
    told = [event.data for event in events if isinstance(event.data, schema.SourceStopped | schema.SourceDigested)]
    [known] = [(data.exit_code, data.unclean) for data in told if data.exit_code is not None]
    return known


def test_a_container_that_does_not_stop_in_time_is_killed_moved_and_told_about(fleet: Fleet) -> None:
    """F13: its own stop signal, the request's grace, and how it ended are in the history."""
    fleet.volume("alpha", "stubborn-data")
    fleet.run(
        "stubborn", command=["sh", "-c", STUBBORN], stop_signal="SIGINT", volumes={"stubborn-data": {"bind": "/data"}}
    )
    events = fleet.migrate("stubborn-1", "stubborn", stop_timeout_seconds=2)
    assert told_end(events) == (137, True)
    assert fleet.execute("beta", "stubborn", "cat /data/said") == "asked\n"
    moved = fleet.present("beta", "stubborn").attrs["Config"]
    assert moved["StopSignal"] == "SIGINT"
    assert moved.get("StopTimeout") is None, "the request's grace is for this one stop"
    fleet.present("beta", "stubborn").kill()


def test_a_clean_end_with_a_code_of_its_own_is_told_about(fleet: Fleet) -> None:
    fleet.run("coded", command=["sh", "-c", "trap 'exit 7' TERM; sleep 100000 & wait"])
    events = fleet.migrate("coded-1", "coded")
    assert told_end(events) == (7, False)
    labels = fleet.present("beta", "coded").attrs["Config"]["Labels"]
    assert (labels["cargo.migration"], labels["cargo.source"]) == ("coded-1", "alpha")
    kept = fleet.present("alpha", "coded.cargo-coded-1")
    assert kept.attrs["HostConfig"]["RestartPolicy"]["Name"] in ("no", "")
    assert kept.status == "exited"
