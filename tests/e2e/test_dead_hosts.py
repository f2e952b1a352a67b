"""A host that is dead for good, or for long: what happens by itself, what a person is told, and what a person may say."""

from __future__ import annotations

import json

import pytest

from events import schema
from labkit.waiting import wait_until
from labkit.witness import Witness, wait_until_answering
from tests.support.fleet import ON_A_UNION, Fleet, told

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

PORT = 6379


def service(fleet: Fleet, name: str) -> Witness:
    """A Redis on alpha that always restarts, with a client that writes to it."""
    options = {"volumes": {f"{name}-data": {"bind": "/data"}}, "restart_policy": {"Name": "always"}}
    fleet.run(name, image="redis", ports={f"{PORT}/tcp": PORT}, **options)
    addresses = [fleet.alpha.spec.address, fleet.beta.spec.address]
    wait_until_answering(addresses[0], PORT)
    witness = Witness(addresses, PORT, pause_seconds=0.005)
    witness.start()
    fleet.at_end(witness.stop)
    return witness


def dies_at(fleet: Fleet, name: str, dying: str, host: str, point: str, *, action: str = "pause") -> None:
    """Bring a migration to a point and take the power from a host there. Unless it pauses there, it goes on failing."""
    fleet.failpoints(f"hostd/{host}", f"{point}={action}")
    since = fleet.log_size(f"{host}.hostd")
    fleet.request(f"{name}-1", name, **ON_A_UNION)
    fleet.wait_step(f"{host}.hostd", f'"point": "{point}"', since, 40)
    fleet.lab.host(dying).power_cut()
    fleet.oracle.lost_power(dying)
    if action == "pause":
        fleet.store.delete(fleet.keys.failpoints(f"hostd/{host}"))


def boot(fleet: Fleet, host: str) -> None:
    fleet.lab.host(host).boot()
    fleet.oracle.resume(host)


def why(fleet: Fleet, name: str) -> dict[str, str]:
    """What ``cargoctl why`` says."""
    answer: dict[str, str] = json.loads(fleet.cargoctl("why", f"{name}-1", "--json").stdout)
    return answer


def assert_lives_on(fleet: Fleet, name: str, home: str, witness: Witness, *, lost: bool = False) -> None:
    """It runs there and nowhere else, with every record; ``lost``: without those that a person gave up."""
    other = {"alpha": "beta", "beta": "alpha"}[home]
    fleet.wait_running(home, name, 40)
    wait_until_answering(fleet.lab.host(home).spec.address, PORT)
    witness.wait_for_more(20)
    witness.stop()
    if not lost:
        assert witness.missing_from(fleet.lab.host(home).spec.address) == []
    if fleet.lab.host(other).running:
        assert not fleet.running(other, name)
    fleet.assert_sound(f"{name}-1")


@pytest.mark.long
def test_a_source_that_dies_before_the_stop_takes_its_container_along_and_brings_it_back(fleet: Fleet) -> None:
    """A7, P13: an abort is possible at once, and is finished when the host is back; the target never starts anything."""
    witness = service(fleet, "first")
    dies_at(fleet, "first", "alpha", "beta", "target.pull_round:before_effect")
    assert "come back with it" in why(fleet, "first")["if_source_is_dead"]
    if "abort_ordered" not in fleet.types("first-1"):
        fleet.control("first-1", "abort")
    fleet.wait_for("first-1", "target_cleaned")
    assert not fleet.running("beta", "first")
    boot(fleet, "alpha")
    fleet.wait_end("first-1", "aborted")
    assert_lives_on(fleet, "first", "alpha", witness)
    assert fleet.policy("alpha", "first") == "always"


def test_a_source_that_dies_after_the_stop_leaves_the_container_down_until_it_is_back(fleet: Fleet) -> None:
    """A9, B2, P1: nobody else may start it, whatever the target has; a person is told so."""
    witness = service(fleet, "lost-mid")
    dies_at(fleet, "lost-mid", "alpha", "beta", "target.apply_dirty:before_effect", action="error(no link)")
    fleet.wait_for("lost-mid-1", "step_failed", "abort_ordered")
    said = why(fleet, "lost-mid")["if_source_is_dead"]
    assert "alpha" in said
    assert "do not start anything from it" in said
    if "abort_ordered" not in fleet.types("lost-mid-1"):
        fleet.control("lost-mid-1", "abort")
    fleet.wait_for("lost-mid-1", "target_cleaned")
    assert fleet.container("beta", "lost-mid") is None
    boot(fleet, "alpha")
    fleet.wait_end("lost-mid-1", "aborted")
    assert_lives_on(fleet, "lost-mid", "alpha", witness)
    assert fleet.policy("alpha", "lost-mid") == "always"
    fleet.assert_clean("beta", "lost-mid-1")


@pytest.mark.long
def test_a_source_that_dies_during_the_fill_is_waited_for_while_the_container_serves(fleet: Fleet) -> None:
    """A9, C1, D14: the container goes on with what is there, the rest comes when the source is back."""
    witness = service(fleet, "fill")
    dies_at(fleet, "fill", "alpha", "beta", "target.fill_replica:before_effect")
    said = why(fleet, "fill")
    assert "waits for alpha" in said["if_source_is_dead"]
    assert fleet.running("beta", "fill")
    fleet.control("fill-1", "abort")
    assert "control_refused" in fleet.types("fill-1")
    boot(fleet, "alpha")
    assert not fleet.running("alpha", "fill"), "Docker must not revive what has moved"
    fleet.wait_end("fill-1", "completed", timeout_seconds=90)
    assert_lives_on(fleet, "fill", "beta", witness)


@pytest.mark.long
def test_with_a_target_that_dies_before_the_claim_an_abort_runs_the_container_again_at_once(fleet: Fleet) -> None:
    """A10, C3, P11: nothing was claimed, so nothing can run over there; its cleaning waits for it."""
    witness = service(fleet, "lost-early")
    dies_at(fleet, "lost-early", "beta", "beta", "target.apply_dirty:before_effect")
    assert "`abort` is safe" in why(fleet, "lost-early")["if_target_is_dead"]
    fleet.control("lost-early-1", "abort")
    fleet.wait_for("lost-early-1", "source_restored")
    fleet.wait_running("alpha", "lost-early")
    witness.wait_for_more(20)
    assert fleet.policy("alpha", "lost-early") == "always"
    answer = why(fleet, "lost-early")
    assert "only the cleaning" in answer["if_target_is_dead"]
    assert "beta to clean up" in answer["waiting_for"]
    boot(fleet, "beta")
    fleet.wait_end("lost-early-1", "aborted")
    assert_lives_on(fleet, "lost-early", "alpha", witness)
    fleet.assert_clean("beta", "lost-early-1")


@pytest.mark.parametrize(
    "point",
    ["target.start_container:before_effect", pytest.param("target.fill_replica:before_effect", marks=pytest.mark.long)],
)
def test_a_target_that_dies_after_the_claim_is_given_up_by_a_person_who_vouches(fleet: Fleet, point: str) -> None:
    """C4, P12: a grant to start is not taken back by silence, only by a person's word, which is recorded with the name."""
    name = point.partition(":")[0].replace("_", "-")
    witness = service(fleet, name)
    dies_at(fleet, name, "beta", "beta", point)
    assert "--target-off" in why(fleet, name)["if_target_is_dead"]
    assert not fleet.running("alpha", name)
    fleet.control(f"{name}-1", "rollback")
    fleet.wait_for(f"{name}-1", "rollback_ordered")
    refused = fleet.cargoctl("rollback", f"{name}-1", "--target-off", "ada")
    assert refused.returncode != 0, "what would be lost has to be asked for by name"
    assert not fleet.running("alpha", name)
    done = fleet.cargoctl("rollback", f"{name}-1", "--target-off", "ada", "--discard-target-writes")
    assert done.returncode == 0, done.stdout + done.stderr
    fleet.wait_end(f"{name}-1", "rolled_back")
    events = fleet.events(f"{name}-1")
    vouched = next(event for event in events if isinstance(event.data, schema.TargetAssertedOff))
    assert isinstance(vouched.data, schema.TargetAssertedOff)
    assert vouched.data.who == "ada"
    assert_lives_on(fleet, name, "alpha", witness, lost=True)
    assert fleet.policy("alpha", name) == "always"
    boot(fleet, "beta")
    wait_until(lambda: "target_cleaned" in fleet.types(f"{name}-1"), told(fleet.events(f"{name}-1")), 40)
    assert not fleet.running("beta", name)
    fleet.assert_clean("beta", f"{name}-1")
    fleet.assert_sound(f"{name}-1")
