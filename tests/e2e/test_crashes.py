"""Processes and hosts that die at the worst moments: the migration still ends, nobody runs twice, nothing is lost.

A choice of moments; the matrix of all failpoints is generated elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest

from labkit.waiting import wait_until
from labkit.witness import Witness, load_keys, wait_until_answering
from tests.support.fleet import ON_A_UNION, Fleet, told

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

PORT = 6379


def service(fleet: Fleet, name: str) -> Witness:
    """A Redis on alpha with some data, and a client that writes to it from now on."""
    fleet.run(
        name,
        image="redis",
        ports={f"{PORT}/tcp": PORT},
        volumes={f"{name}-data": {"bind": "/data"}},
        restart_policy={"Name": "always"},
    )
    wait_until_answering(fleet.alpha.spec.address, PORT)
    load_keys(fleet.alpha.spec.address, PORT, 200, 2000)
    witness = Witness([fleet.alpha.spec.address, fleet.beta.spec.address], PORT, pause_seconds=0.005)
    witness.start()
    fleet.at_end(witness.stop)
    return witness


def assert_safe(fleet: Fleet, name: str, witness: Witness, home: str) -> None:
    """The service runs on ``home`` alone, was never anywhere else at the same time, and has every record."""
    other = {"alpha": "beta", "beta": "alpha"}[home]
    fleet.wait_running(home, name)
    wait_until_answering(fleet.lab.host(home).spec.address, PORT)
    witness.wait_for_more(20)
    witness.stop()
    assert witness.missing_from(fleet.lab.host(home).spec.address) == []
    assert not fleet.running(other, name)
    fleet.oracle.settle({name: {home}})
    fleet.assert_sound(f"{name}-1")


def assert_ends_well(fleet: Fleet, name: str, witness: Witness) -> None:
    """Completed or aborted, and safe either way."""
    end = fleet.wait_for(f"{name}-1", "completed", "aborted", timeout_seconds=80)
    assert_safe(fleet, name, witness, "beta" if end.type == "completed" else "alpha")


@pytest.mark.parametrize(
    ("process", "point"),
    [
        ("alpha", "source.stop_container:after_effect"),
        ("alpha", "source.stop:before_event"),
        ("alpha", "source.retire_container:after_effect"),
        ("beta", "target.pull_round:after_effect"),
        ("beta", "target.apply_dirty:after_effect"),
        ("beta", "target.unite:before_event"),
        ("beta", "target.unite:after_event"),
        ("beta", "target.start_container:after_effect"),
    ],
)
def test_an_agent_that_is_killed_carries_on_in_its_next_life(fleet: Fleet, process: str, point: str) -> None:
    carries_on(fleet, process, point, **ON_A_UNION)


@pytest.mark.parametrize(
    "point",
    [
        "target.apply_dirty:before_effect",
        "target.apply_dirty:after_effect",
        "target.mount_union:after_effect",
        "target.start_container:after_effect",
        "target.fill_replica:before_effect",
        "target.fill_replica:after_effect",
    ],
)
def test_a_target_that_is_killed_while_what_is_stale_comes_at_once_carries_on(fleet: Fleet, point: str) -> None:
    """A1: what it has placed stays placed, and what was opened to read the source through is taken down in the next life."""
    carries_on(fleet, "beta", point)
    assert fleet.mounts("beta") == []


def carries_on(fleet: Fleet, process: str, point: str, **request: Any) -> None:
    """A migration during which the agent of a host is killed at a point, and started again."""
    name = f"{'killed' if request else 'sudden'}.{point}".replace(":", ".")
    witness = service(fleet, name)
    hostd = fleet.lab.host(process).hostd
    fleet.failpoints(f"hostd/{process}", f"{point}=kill")
    fleet.request(f"{name}-1", name, **request)
    wait_until(lambda: not hostd.running, f"nobody passes {point}", 30)
    fleet.failpoints(f"hostd/{process}", "")
    hostd.start()
    events = fleet.wait_end(f"{name}-1", "completed", timeout_seconds=80)
    assert len({event.boot for event in events if event.by == f"hostd/{process}"}) == 2, told(events)
    assert_safe(fleet, name, witness, "beta")


@pytest.mark.parametrize("point", ["cutover_ordered:before_event", "cutover_ordered:after_event"])
def test_a_coordinator_that_is_killed_carries_on_in_its_next_life(fleet: Fleet, point: str) -> None:
    name = point.replace(":", ".")
    witness = service(fleet, name)
    coordinator = fleet.lab.coordinator
    coordinator.stop()
    coordinator.start(env={"CARGO_FAILPOINTS": f"coordinator.{point}=kill"})
    fleet.request(f"{name}-1", name)
    wait_until(lambda: not coordinator.running, f"nobody passes {point}", 30)
    coordinator.start()
    fleet.wait_end(f"{name}-1", "completed")
    assert_safe(fleet, name, witness, "beta")


def test_an_agent_killed_in_the_middle_of_an_abort_finishes_it(fleet: Fleet) -> None:
    witness = service(fleet, "undo")
    fleet.failpoints("hostd/alpha", "source.restore:before_event=kill")
    fleet.failpoints("hostd/beta", "target.unite:before_event=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("undo-1", "undo")
    fleet.wait_step("beta.hostd", '"point": "target.unite:before_event"', since)
    fleet.control("undo-1", "abort")
    wait_until(lambda: not fleet.alpha.hostd.running, "nobody restores", 20)
    fleet.failpoints("hostd/alpha", "")
    fleet.failpoints("hostd/beta", "")
    fleet.alpha.hostd.start()
    fleet.wait_end("undo-1", "aborted")
    assert_safe(fleet, "undo", witness, "alpha")
    assert fleet.policy("alpha", "undo") == "always"
    fleet.assert_clean("beta", "undo-1")
    fleet.assert_clean("alpha", "undo-1")


def test_a_source_that_loses_power_after_the_stop_does_not_start_its_copy_again(fleet: Fleet) -> None:
    witness = service(fleet, "dark")
    fleet.failpoints("hostd/beta", "target.apply_dirty:before_effect=pause")
    fleet.request("dark-1", "dark")
    fleet.wait_for("dark-1", "source_stopped")
    fleet.alpha.power_cut()
    fleet.oracle.lost_power("alpha")
    fleet.alpha.boot()
    fleet.oracle.resume("alpha")
    assert not fleet.running("alpha", "dark"), "Docker must not revive what was stopped for a migration"
    fleet.failpoints("hostd/beta", "")
    assert_ends_well(fleet, "dark", witness)


def test_a_target_that_loses_power_during_the_fill_mounts_first_and_starts_second(fleet: Fleet) -> None:
    witness = service(fleet, "fall")
    fleet.failpoints("hostd/beta", "target.fill_replica:before_effect=pause")
    fleet.request("fall-1", "fall")
    fleet.wait_for("fall-1", "target_started")
    witness.wait_for_more(50)
    fleet.beta.power_cut()
    fleet.oracle.lost_power("beta")
    fleet.failpoints("hostd/beta", "")
    fleet.beta.boot()
    fleet.oracle.resume("beta")
    fleet.wait_end("fall-1", "completed", timeout_seconds=80)
    assert_safe(fleet, "fall", witness, "beta")


def test_an_etcd_that_is_killed_during_the_cut_over_is_waited_for(fleet: Fleet) -> None:
    witness = service(fleet, "bus")
    fleet.failpoints("hostd/beta", "target.unite:before_event=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("bus-1", "bus")
    fleet.wait_step("beta.hostd", '"point": "target.unite:before_event"', since)
    fleet.lab.etcd.kill()
    fleet.lab.etcd.start()
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("bus-1", "completed", timeout_seconds=80)
    assert_safe(fleet, "bus", witness, "beta")
