"""Versions: an agent or the coordinator is replaced by another one in the middle, both at once, and one that is not understood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit import Process
from labkit.waiting import wait_until
from labkit.witness import Witness, load_keys, wait_until_answering
from tests.support.fleet import Fleet
from tests.support.versions import NEW_EVENT, OPTIONAL_FIELD, run_version, version_tree

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

PORT = 6379
NEXT_PATCH, NEXT_MINOR = "0.1.99", "0.99.0"
POINTS = (
    ("alpha", "source.describe_container:after_effect"),
    ("alpha", "source.arm_tracking:after_effect"),
    ("alpha", "source.stop_container:after_effect"),
    ("alpha", "source.digest_trees:after_effect"),
    ("beta", "target.create_container:after_effect"),
    ("beta", "target.sync:before_event"),
    ("beta", "target.apply_dirty:after_effect"),
    ("beta", "target.unite:after_event"),
    ("beta", "target.start_container:after_effect"),
    ("beta", "target.fill_replica:before_effect"),
    ("coordinator", "prepare_ordered:after_event"),
    ("coordinator", "cutover_ordered:before_event"),
    ("coordinator", "release_ordered:after_event"),
)


@pytest.fixture
def tree_of() -> Iterator[Callable[..., Path]]:
    """Makes trees of other versions, and takes them away."""
    made: list[Path] = []

    def make(*arguments: object) -> Path:
        made.append(version_tree(*arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for tree in made:
        shutil.rmtree(tree)


def service(fleet: Fleet, name: str) -> Witness:
    """A Redis on alpha with some data, and a client that writes to it from now on."""
    volumes = {f"{name}-data": {"bind": "/data"}}
    fleet.run(name, image="redis", ports={f"{PORT}/tcp": PORT}, volumes=volumes, restart_policy={"Name": "always"})
    wait_until_answering(fleet.alpha.spec.address, PORT)
    load_keys(fleet.alpha.spec.address, PORT, 200, 2000)
    witness = Witness([fleet.alpha.spec.address, fleet.beta.spec.address], PORT, pause_seconds=0.005)
    witness.start()
    fleet.at_end(witness.stop)
    return witness


def assert_moved(fleet: Fleet, name: str, witness: Witness) -> None:
    """It runs on beta alone and has every record."""
    fleet.wait_running("beta", name)
    wait_until_answering(fleet.beta.spec.address, PORT)
    witness.wait_for_more(20)
    witness.stop()
    assert witness.missing_from(fleet.beta.spec.address) == []
    fleet.oracle.settle({name: {"beta"}})


def daemon_of(fleet: Fleet, process: str) -> Process:
    return fleet.lab.coordinator if process == "coordinator" else fleet.lab.host(process).hostd


def everything_as_it_was(fleet: Fleet) -> None:
    """All daemons are of this version again."""
    for daemon in (fleet.lab.coordinator, *(host.hostd for host in fleet.lab.hosts)):
        run_version(daemon, None)


def told_version(fleet: Fleet, host: str) -> str:
    found = fleet.store.get(fleet.keys.host(host))
    return str(json.loads(found.value)["agent_version"]) if found else ""


def dies_at(fleet: Fleet, process: str, point: str) -> None:
    """Have that daemon end at a point of the next migration."""
    if process == "coordinator":
        fleet.lab.coordinator.stop()
        fleet.lab.coordinator.start(env={"CARGO_FAILPOINTS": f"coordinator.{point}=kill"})
    else:
        fleet.failpoints(f"hostd/{process}", f"{point}=kill")


def replaced(fleet: Fleet, process: str, tree: Path | None) -> None:
    """Wait until it has ended, and let another version carry on."""
    daemon = daemon_of(fleet, process)
    wait_until(lambda: not daemon.running, f"{process} does not come to its point", 40)
    if process != "coordinator":
        fleet.failpoints(f"hostd/{process}", "")
    run_version(daemon, tree)


def test_a_target_and_a_coordinator_replaced_by_a_newer_version_carry_on_beside_an_older_source(
    fleet: Fleet, tree_of: Callable[..., Path]
) -> None:
    """A17: two versions in one migration, of which the newer knows optional fields that nobody uses yet."""
    newer = tree_of(NEXT_PATCH, OPTIONAL_FIELD)
    fleet.at_end(lambda: everything_as_it_was(fleet))
    witness = service(fleet, "patched")
    dies_at(fleet, "coordinator", "cutover_ordered:before_event")
    dies_at(fleet, "beta", "target.pull_round:after_effect")
    fleet.request("patched-1", "patched")
    replaced(fleet, "beta", newer)
    replaced(fleet, "coordinator", newer)
    events = fleet.wait_end("patched-1", "completed", timeout_seconds=80)
    assert len({event.boot for event in events if event.by == "hostd/beta"}) == 2
    assert told_version(fleet, "beta") == NEXT_PATCH != told_version(fleet, "alpha")
    assert_moved(fleet, "patched", witness)
    fleet.assert_sound("patched-1")


def stored(fleet: Fleet, migration: str) -> list[str]:
    """The types of a history's events, understood or not."""
    return [json.loads(item.value)["type"] for item in fleet.store.range(fleet.keys.events(migration))]


def test_an_event_of_a_newer_version_makes_older_ones_hold_until_they_are_replaced(
    fleet: Fleet, tree_of: Callable[..., Path]
) -> None:
    """A17: nobody guesses what it means; the container stays where it is, and nothing is lost by waiting."""
    newer = tree_of(NEXT_MINOR, NEW_EVENT)
    fleet.at_end(lambda: fleet.etcdctl("del", "--prefix", fleet.keys.migration("tomorrow-1")) and None)
    fleet.at_end(lambda: everything_as_it_was(fleet))
    witness = service(fleet, "tomorrow")
    run_version(fleet.lab.coordinator, newer)
    fleet.failpoints("hostd/beta", "target.create_container:before_effect=pause")
    since = {name: fleet.log_size(name) for name in ("alpha.hostd", "beta.hostd", "coordinator")}
    fleet.request("tomorrow-1", "tomorrow")
    fleet.wait_for("tomorrow-1", "source_prepared")
    fleet.wait_step("beta.hostd", '"point": "target.create_container:before_effect"', since["beta.hostd"])
    fleet.control("tomorrow-1", {"control": "bwlimit", "kib": 50_000})
    assert stored(fleet, "tomorrow-1")[-1] == "surveyed"
    fleet.failpoints("hostd/beta", "")
    run_version(fleet.lab.coordinator, None)
    for name, size in since.items():
        fleet.wait_step(name, "refusing to act on this migration", size)
        fleet.wait_step(name, "event type 'surveyed' is not known here", size)
    said = fleet.cargoctl("why", "tomorrow-1")
    assert said.returncode != 0
    assert "'surveyed' is not known here" in said.stdout + said.stderr
    fleet.control("tomorrow-1", "abort")  # which an older coordinator cannot answer either
    witness.wait_for_more(50)
    assert stored(fleet, "tomorrow-1")[-1] == "surveyed", "somebody wrote behind what it does not understand"
    assert fleet.running("alpha", "tomorrow")
    for daemon in (fleet.lab.coordinator, fleet.alpha.hostd, fleet.beta.hostd):
        run_version(daemon, newer)
    wait_until(lambda: stored(fleet, "tomorrow-1")[-1] == "completed", "nobody goes on", 80)
    fleet.control("tomorrow-1", "finalise")
    wait_until(lambda: stored(fleet, "tomorrow-1")[-1] == "finalised", "it is not finalised", 40)
    assert_moved(fleet, "tomorrow", witness)
    fleet.wait_inbox_empty(["tomorrow-1"])


@pytest.mark.long
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(("process", "point"), POINTS)
def test_whoever_is_replaced_by_another_version_at_whatever_point_carries_on(
    fleet: Fleet, tree_of: Callable[..., Path], process: str, point: str, direction: str
) -> None:
    """A17: within a minor release, both ways: an upgrade, and taking it back."""
    newer = tree_of(NEXT_PATCH, OPTIONAL_FIELD)
    fleet.at_end(lambda: everything_as_it_was(fleet))
    name = f"{direction}.{process}.{point}".replace(":", ".")
    if direction == "down":
        run_version(daemon_of(fleet, process), newer)
    witness = service(fleet, name)
    dies_at(fleet, process, point)
    fleet.request(f"{name}-1", name)
    replaced(fleet, process, newer if direction == "up" else None)
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=80)
    assert_moved(fleet, name, witness)
    fleet.assert_sound(f"{name}-1")
