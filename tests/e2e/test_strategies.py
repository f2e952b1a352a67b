"""The strategies on real parts: what is lost (nothing), what the container sees, and what it stands on afterwards."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from events import schema
from events.schema import Event
from labkit import Lab
from labkit.waiting import wait_until
from labkit.witness import Witness, load_keys, wait_until_answering
from tests.e2e.conftest import Ground
from tests.support.fleet import Fleet, bring_up, differences
from tests.support.trees import grow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

NAME, SUBNET = "strat", "10.77.10"
REDIS_PORT = 6379
FILES = 3000
BUSY_SCRIPT = """
    [ -e /data/stopped ] && exec sleep 100000
    trap 'echo last > /data/stopped; exit 0' TERM
    n=0
    while :; do
        n=$((n + 1))
        echo $n >> /data/log
        echo $n > /data/many/$((n % 20))/$n
        rm -f /data/many/7/$((n * 7))
        mkdir -p /data/new.$((n % 5)) && echo $n > /data/new.$((n % 5))/file && mv /data/new.$((n % 5)) /data/moved.$n
        [ $n -gt 2 ] && rm -rf /data/moved.$((n - 2))
        mv /data/many/3 /data/away && mkdir /data/many/3 && mv /data/away/* /data/many/3/
        rmdir /data/away
        ln -f /data/log /data/linked && rm -f /data/names/first && ln /data/names/second /data/names/first
        chmod 600 /data/many/5/$((n * 20 + 5)) 2>/dev/null
        sleep 0.02
    done
"""
"""Creates, appends, renames whole directories away and back, links and unlinks, and writes on its way out."""


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """A lab of this module's own."""
    Lab(NAME).down()
    lab = Lab(NAME, SUBNET)
    try:
        yield Ground(lab, bring_up(lab))
    finally:
        Lab(NAME).down()


def payload(events: list[Event], kind: str) -> Any:
    """The newest payload of an event type."""
    return [event.data for event in events if event.type == kind][-1]


def busy(fleet: Fleet, name: str) -> None:
    """A container over a volume of some thousand files, which it goes on changing until it is stopped."""
    tree = fleet.volume("alpha", name)
    grow(tree / "grown", 11, entries=40)
    fleet.at_end(lambda: subprocess.run(["rm", "-rf", "--", str(tree / "grown")], check=True))
    for number in range(FILES):
        directory = tree / "many" / str(number % 20)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / str(number)).write_bytes(b"%d" % number * 50)
    names = tree / "names"
    names.mkdir()
    (names / "first").write_bytes(b"two names" * 1000)
    (names / "second").hardlink_to(names / "first")
    fleet.run(name, command=["sh", "-c", BUSY_SCRIPT], volumes={name: {"bind": "/data"}})
    wait_until((tree / "log").exists, "the workload does not begin", 15)


def assert_as_it_was(fleet: Fleet, name: str) -> None:
    """What the container sees on beta is what the frozen source has."""
    [kept] = fleet.describe("alpha", f"/var/lib/docker/volumes/{name}/_data")
    [seen] = fleet.describe_seen("beta", name, "/data")
    assert any(entry.path == b"stopped" for entry in kept), "the container wrote on its way out"
    assert differences(kept, seen) == []


# --- a service that is used ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["postcopy", "precopy", "cold", "auto"])
def test_a_redis_in_use_loses_no_acknowledged_record(fleet: Fleet, strategy: str) -> None:
    """Invariant 2, for each strategy."""
    fleet.run("web", image="redis", ports={f"{REDIS_PORT}/tcp": REDIS_PORT}, volumes={"webdata": {"bind": "/data"}})
    wait_until_answering(fleet.alpha.spec.address, REDIS_PORT)
    load_keys(fleet.alpha.spec.address, REDIS_PORT, 500, 2000)
    witness = Witness([fleet.alpha.spec.address, fleet.beta.spec.address], REDIS_PORT)
    witness.start()
    fleet.at_end(witness.stop)
    witness.wait_for_more(50)

    fleet.migrate(f"web-{strategy}", "web", strategy=strategy)
    witness.wait_for_more(50)
    witness.stop()

    assert witness.answers[-1].address == fleet.beta.spec.address
    assert witness.missing_from(fleet.beta.spec.address) == []
    events = fleet.assert_sound(f"web-{strategy}")
    rounds = [event.data for event in events if isinstance(event.data, schema.SyncOrdered)]
    if strategy == "cold":
        assert not rounds
    if strategy == "postcopy":
        assert [order.contents for order in rounds] == [False]
    if strategy == "auto":
        assert "auto chose" in payload(events, "cutover_ordered").why
    assert payload(events, "target_claimed").remainder_why


# --- what the container sees -----------------------------------------------------------------------


def test_postcopy_of_a_tree_in_motion_shows_exactly_what_the_source_had(fleet: Fleet) -> None:
    """Invariant 4: the tree is laid out before the stop and only brought up to date in the stop window."""
    busy(fleet, "post")
    events = fleet.migrate("post-1", "post", strategy="postcopy")
    assert_as_it_was(fleet, "post")
    assert payload(events, "target_claimed").remainder == "federated"
    listed = payload(events, "source_stopped").dirty[0]
    assert not listed.everything
    assert listed.stale_files < FILES, "the stop window carries what changed, not the whole tree"
    assert payload(events, "fill_finished").files >= FILES / 2
    fleet.control("post-1", "finalise")
    fleet.wait_for("post-1", "finalised")
    assert_as_it_was(fleet, "post")
    fleet.assert_sound("post-1")


@pytest.mark.parametrize("strategy", ["precopy", "cold"])
def test_without_a_union_the_container_starts_on_a_plain_tree_with_everything_in_it(
    fleet: Fleet, strategy: str
) -> None:
    busy(fleet, strategy)
    fleet.request(f"{strategy}-1", strategy, strategy=strategy)
    fleet.wait_for(f"{strategy}-1", "target_started")
    assert fleet.mounts("beta") == [], "no FUSE mount, no overlay"
    assert_as_it_was(fleet, strategy)
    events = fleet.wait_end(f"{strategy}-1", "completed")
    assert payload(events, "target_claimed").remainder == "finished"
    assert payload(events, "cutover_ordered").strategy == strategy
    assert payload(events, "fill_finished").files == 0
    assert payload(events, "verified").files > FILES / 2
    fleet.assert_sound(f"{strategy}-1")


@pytest.mark.parametrize(("budget", "came_to"), [(20, "finished"), (0.001, "federated")])
def test_a_remainder_is_finished_in_the_stop_window_if_the_downtime_budget_allows(
    fleet: Fleet, budget: float, came_to: str
) -> None:
    busy(fleet, "tight")
    events = fleet.migrate(f"tight-{came_to}", "tight", downtime_budget_seconds=budget)
    claimed = payload(events, "target_claimed")
    assert (claimed.remainder, "budget" in claimed.remainder_why) == (came_to, True)
    assert_as_it_was(fleet, "tight")
    assert bool(fleet.mounts("beta")) == (came_to == "federated")


# --- fill ---------------------------------------------------------------------------------------------


def test_the_limit_of_a_fill_is_changed_while_it_runs_and_people_see_what_is_still_exposed(fleet: Fleet) -> None:
    tree = fleet.volume("alpha", "slow")
    block = bytes(range(256)) * 4096
    for number in range(2):
        (tree / f"large.{number}").write_bytes(block * 32)
    fleet.sleeper("slow", volumes={"slow": {"bind": "/data"}})
    fleet.request("slow-1", "slow", strategy="postcopy", bwlimit_kib=1024)
    fleet.wait_for("slow-1", "target_started")

    def progress() -> dict[str, Any]:
        done = fleet.cargoctl("status", "slow-1", "--json")
        return json.loads(done.stdout)["progress"].get("beta", {}) if done.returncode == 0 else {}

    seen: list[dict[str, Any]] = []

    def filling() -> bool:
        seen.append(progress())
        return seen[-1].get("step") == "fill" and seen[-1]["bytes"] > 2 * 1024 * 1024

    wait_until(filling, "the fill is not seen", 30)
    assert seen[-1]["safe_to_switch_off_source"] is False
    assert 0 < seen[-1]["remaining_bytes"] < 64 * 1024 * 1024
    assert seen[-1]["rate_bytes_per_second"] < 4 * 1024 * 1024
    assert seen[-1]["bwlimit_kib"] == 1024

    said = fleet.cargoctl("bwlimit", "slow-1", "--kib", "0")
    assert said.returncode == 0, said.stderr
    fleet.wait_end("slow-1", "completed", timeout_seconds=40)
    wait_until(lambda: progress().get("safe_to_switch_off_source") is True, "nobody says that it is safe", 10)
    filled = payload(fleet.events("slow-1"), "fill_finished")
    assert filled.bytes_moved < 1.3 * 64 * 1024 * 1024, "what had arrived before the change was not fetched again"
    shown = [fields["bytes"] for fields in seen if fields.get("step") == "fill"]
    assert shown == sorted(shown)
    assert "bwlimit_ordered" in fleet.types("slow-1")
    fleet.assert_sound("slow-1")
