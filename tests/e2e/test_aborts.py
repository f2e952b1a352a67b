"""Giving up before the claim: the container lives on alpha as before, and beta is as it was."""

from __future__ import annotations

import shutil
import socket
from typing import Any

import pytest

from events import schema
from hostd.manifest import Entry
from labkit import Host
from labkit.waiting import wait_until
from tests.support.fleet import ON_A_UNION, Fleet, differences, told, without_state

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

VOLUME_TREE = "/var/lib/docker/volumes/{}-data/_data"


def shop(fleet: Fleet, name: str, **more: Any) -> dict[str, Any]:
    """A container with data, a port and a restart policy of its own, on alpha; returns its ``docker inspect``."""
    place = fleet.volume("alpha", f"{name}-data")
    (place / "goods").write_bytes(b"goods" * 1000)
    made = fleet.sleeper(
        name,
        volumes={f"{name}-data": {"bind": "/data"}},
        ports={"8080/tcp": 8080},
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 4},
        **more,
    )
    made.reload()
    attributes: dict[str, Any] = made.attrs
    return attributes


def tree_of(fleet: Fleet, name: str) -> list[Entry]:
    [entries] = fleet.describe("alpha", VOLUME_TREE.format(name))
    return entries


def assert_as_before(fleet: Fleet, name: str, before: dict[str, Any], tree: list[Entry], migration: str = "") -> None:
    """The container runs on alpha with all it had, and nothing of the migration is anywhere."""
    migration = migration or f"{name}-1"
    fleet.wait_running("alpha", name)
    assert without_state(fleet.present("alpha", name).attrs) == without_state(before)
    assert differences(tree, tree_of(fleet, name)) == []
    assert fleet.container("beta", name) is None
    assert not fleet.has_volume("beta", f"{name}-data")
    fleet.assert_clean("beta", migration)
    fleet.assert_clean("alpha", migration)
    fleet.oracle.settle({name: {"alpha"}})
    events = fleet.assert_sound(migration)
    assert not any(event.type == "target_started" for event in events)


@pytest.mark.parametrize(
    ("host", "fault", "reached", "phase"),
    [
        ("alpha", "source.track_changes:after_effect", "prepare_ordered", "prepare"),
        ("beta", "target.create_container:after_effect", "source_prepared", "prepare"),
        ("beta", "target.pull_round:before_effect", "sync_armed", "pre_copy"),
        ("alpha", "source.disarm_restart:after_effect", "cutover_ordered", "cut_over"),
        ("alpha", "source.stop_container:after_effect", "cutover_ordered", "cut_over"),
        ("alpha", "source.stop:after_event", "source_stopped", "cut_over"),
        ("beta", "target.mount_union:after_effect", "source_stopped", "cut_over"),
    ],
)
def test_an_abort_leaves_everything_as_it_was(fleet: Fleet, host: str, fault: str, reached: str, phase: str) -> None:
    name = fault.replace(":", ".")
    before = shop(fleet, name)
    tree = tree_of(fleet, name)
    fleet.failpoints(f"hostd/{host}", f"{fault}=pause")
    if reached == "source_stopped" and host == "alpha":  # or the target would claim before anybody could ask
        fleet.failpoints("hostd/beta", "target.unite:before_event=pause")
    since = fleet.log_size(f"{host}.hostd")
    fleet.request(f"{name}-1", name)
    fleet.wait_for(f"{name}-1", reached)
    fleet.wait_step(f"{host}.hostd", f'"point": "{fault}"', since)
    head = fleet.store.head(f"{name}-1")
    assert head is not None
    assert head.phase == phase
    fleet.control(f"{name}-1", {"control": "abort", "reason": "a change of mind"})
    fleet.failpoints(f"hostd/{host}", "")
    fleet.failpoints("hostd/beta", "")
    events = fleet.wait_end(f"{name}-1", "aborted")
    order = next(event.data for event in events if isinstance(event.data, schema.AbortOrdered))
    assert (order.reason, order.by_person) == ("a change of mind", True)
    assert_as_before(fleet, name, before, tree)
    fleet.wait_inbox_empty([f"{name}-1"])


def test_an_abort_interrupts_a_long_transfer_at_once(fleet: Fleet) -> None:
    before = shop(fleet, "slow")
    with (fleet.volume_path("alpha", "slow-data") / "large").open("wb") as file:
        file.truncate(0)
        file.write(bytes(range(256)) * 4 * 5000)
    tree = tree_of(fleet, "slow")
    fleet.request("slow-1", "slow", bwlimit_kib=100)
    fleet.wait_for("slow-1", "sync_armed")
    wait_until(lambda: any("rsync" in line for line in fleet.tools("beta")), "no transfer begins", 10)
    fleet.control("slow-1", "abort")
    fleet.wait_end("slow-1", "aborted", timeout_seconds=10)
    assert_as_before(fleet, "slow", before, tree)


def test_an_abort_before_the_claim_takes_a_mounted_union_down_again(fleet: Fleet) -> None:
    before = shop(fleet, "under")
    fleet.failpoints("hostd/alpha", "source.vouch_for_tracking:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request("under-1", "under", **ON_A_UNION)
    fleet.wait_step("alpha.hostd", '"point": "source.vouch_for_tracking:before_effect"', since)
    fleet.execute("alpha", "under", "head -c 5000000 /dev/urandom > /data/late")
    tree = tree_of(fleet, "under")
    fleet.failpoints("hostd/beta", "target.mount_union:after_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_step("beta.hostd", '"point": "target.mount_union:after_effect"', since)
    kinds = {mount.rpartition(" ")[2] for mount in fleet.mounts("beta")}
    assert kinds == {"(overlay)", "(fuse.sshfs)", "(fuse.cargo)"}
    fleet.control("under-1", "abort")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("under-1", "aborted")
    assert_as_before(fleet, "under", before, tree)


def test_an_abort_after_the_claim_is_refused_with_the_way_back(fleet: Fleet) -> None:
    shop(fleet, "taken")
    fleet.failpoints("hostd/beta", "target.start_container:before_effect=pause")
    fleet.request("taken-1", "taken")
    fleet.wait_for("taken-1", "target_claimed")
    fleet.control("taken-1", "abort")
    refused = fleet.wait_for("taken-1", "control_refused")
    assert isinstance(refused.data, schema.ControlRefused)
    assert "rollback" in refused.data.reason
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("taken-1", "completed")
    fleet.wait_running("beta", "taken")
    fleet.control("taken-1", "abort")
    assert fleet.types("taken-1").count("control_refused") == 2
    fleet.assert_sound("taken-1")


def test_an_aborted_container_can_be_asked_for_again(fleet: Fleet) -> None:
    before = shop(fleet, "again")
    tree = tree_of(fleet, "again")
    fleet.failpoints("hostd/beta", "target.unite:before_event=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("again-1", "again")
    fleet.wait_step("beta.hostd", '"point": "target.unite:before_event"', since)
    fleet.control("again-1", "abort")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("again-1", "aborted")
    assert_as_before(fleet, "again", before, tree)
    fleet.migrate("again-2", "again")
    assert fleet.running("beta", "again")
    fleet.assert_sound("again-2")


def test_a_pause_holds_before_the_stop_and_resuming_goes_on(fleet: Fleet) -> None:
    shop(fleet, "wait")
    fleet.failpoints("hostd/beta", "target.sync:before_event=pause")
    fleet.request("wait-1", "wait")
    fleet.wait_for("wait-1", "sync_armed")
    fleet.control("wait-1", "pause")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_for("wait-1", "sync_finished")
    status = fleet.cargoctl("status", "wait-1", "--json").stdout
    assert '"paused": true' in status
    assert fleet.types("wait-1")[-2:] == ["paused", "sync_finished"]
    assert fleet.running("alpha", "wait")
    fleet.control("wait-1", "resume")
    fleet.wait_end("wait-1", "completed")


# --- aborts that nobody ordered -----------------------------------------------------------------------


def port_is_free(host: Host) -> bool:
    """Whether nobody takes connections to port 8080 there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host.spec.address, 8080)) != 0


def aborted_for(fleet: Fleet, migration: str) -> str:
    """The reason of an abort that the coordinator ordered by itself."""
    events = fleet.wait_end(migration, "aborted")
    order = next(event.data for event in events if isinstance(event.data, schema.AbortOrdered))
    assert not order.by_person
    assert "source_stopped" not in [event.type for event in events], told(events)
    return order.reason


def test_a_port_that_some_process_of_the_target_uses_is_found_before_anything_stops(fleet: Fleet) -> None:
    before = shop(fleet, "port")
    tree = tree_of(fleet, "port")
    listener = fleet.beta.popen(["busybox", "nc", "-ll", "-p", "8080", "-e", "true"])
    fleet.at_end(listener.kill)
    wait_until(lambda: not port_is_free(fleet.beta), "nobody listens", 5)
    fleet.request("port-1", "port")
    assert "8080" in aborted_for(fleet, "port-1")
    assert_as_before(fleet, "port", before, tree)


def test_data_that_does_not_fit_on_the_target_is_found_before_anything_stops(fleet: Fleet) -> None:
    """P17: each file system is asked by itself; here a bind's place, which is small on the target."""
    tree = fleet.alpha.directory / "srv/small/vast"
    tree.mkdir(parents=True)
    (tree / "large").write_bytes(bytes(range(256)) * 4096 * 32)
    fleet.at_end(lambda: shutil.rmtree(tree.parent))
    fleet.beta.run(["mkdir", "-p", "/srv/small"])
    fleet.beta.run(["mount", "-t", "tmpfs", "-o", "size=8m", "small", "/srv/small"])
    fleet.at_end(lambda: fleet.beta.run(["umount", "/srv/small"]))
    fleet.sleeper("vast", volumes={"/srv/small/vast": {"bind": "/data"}})
    fleet.request("vast-1", "vast")
    assert "free below /srv/small" in aborted_for(fleet, "vast-1")
    fleet.wait_running("alpha", "vast")
    assert fleet.container("beta", "vast") is None
    assert fleet.beta.run(["ls", "-A", "/srv/small"]).stdout.split() == []
    fleet.assert_clean("beta", "vast-1")
    fleet.assert_sound("vast-1")


def test_a_container_that_is_stopped_by_a_person_during_the_pre_copy_stays_stopped(fleet: Fleet) -> None:
    shop(fleet, "halt")
    fleet.failpoints("hostd/beta", "target.sync:before_event=pause@2")
    since = fleet.log_size("beta.hostd")
    fleet.request("halt-1", "halt")
    fleet.wait_step("beta.hostd", '"point": "target.sync:before_event"', since)
    fleet.present("alpha", "halt").stop()
    fleet.failpoints("hostd/beta", "")
    assert "stopped" in aborted_for(fleet, "halt-1")
    assert not fleet.running("alpha", "halt")
    assert fleet.policy("alpha", "halt") == "on-failure"
    fleet.assert_clean("beta", "halt-1")
