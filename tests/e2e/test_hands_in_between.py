"""A person who pauses, renames, removes or restarts a container in the middle of its migration comes first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from events import schema
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
        fleet.execute("alpha", "again", "echo before > /data/before")
        container.restart(timeout=5)
        fleet.execute("alpha", "again", "echo after > /data/after")

    interrupted(fleet, "again", restart)
    fleet.wait_end("again-1", "completed")
    assert fleet.execute("beta", "again", "cd /data && cat before after goods").split() == ["before", "after", "goods"]
    fleet.assert_sound("again-1")
