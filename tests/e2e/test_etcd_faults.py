"""What etcd itself may do to a migration under way: elections, lost members, no space, compaction, a past that comes back.

On a lab of its own with three members. The last group of tests ruins the bus for good, so each has a lab of its own.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit import Lab, Process
from labkit.waiting import wait_until
from labkit.witness import Witness, wait_until_answering
from tests.e2e.conftest import NAME, SUBNET
from tests.support.fleet import Fleet, bring_up
from tests.support.host_faults import LEASE_SECONDS

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

PORT = 6379
TRIO = f"{NAME[:7]}x3"
FIRST, _, THIRD = SUBNET.rpartition(".")
TRIO_SUBNET = f"{FIRST}.{(int(THIRD) + 50) % 250}"
QUOTA_BYTES = 12_000_000
"""Room for a migration or two, and soon full."""


def _fleets(members: int) -> Iterator[Fleet]:
    Lab(TRIO).down()
    lab = Lab(TRIO, TRIO_SUBNET, etcd_members=members)
    for member in lab.etcd.members:
        member.env["ETCD_QUOTA_BACKEND_BYTES"] = str(QUOTA_BYTES)
    try:
        yield Fleet(lab, bring_up(lab))
    finally:
        lab.down()


@pytest.fixture(scope="module")
def trio() -> Iterator[Fleet]:
    """Two hosts and three members of etcd, for tests that leave all of it whole."""
    yield from _fleets(3)


@pytest.fixture
def spoilt() -> Iterator[Fleet]:
    """Two hosts and one etcd, of which nothing is used again."""
    yield from _fleets(1)


def service(fleet: Fleet, name: str) -> Witness:
    """A Redis on alpha, and a client that writes to it."""
    fleet.run(
        name,
        image="redis",
        ports={f"{PORT}/tcp": PORT},
        volumes={f"{name}-data": {"bind": "/data"}},
        restart_policy={"Name": "always"},
    )
    addresses = [fleet.alpha.spec.address, fleet.beta.spec.address]
    wait_until_answering(addresses[0], PORT)
    witness = Witness(addresses, PORT, pause_seconds=0.005)
    witness.start()
    return witness


def paused_at(fleet: Fleet, name: str, point: str) -> None:
    """Ask for a migration and let beta wait at a point of it."""
    fleet.failpoints("hostd/beta", f"{point}=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-1", name, max_rounds=2)
    fleet.wait_step("beta.hostd", f'"point": "{point}"', since, 40)


def go_on(fleet: Fleet) -> None:
    """Take the pause away, as soon as the bus takes that."""

    def gone() -> bool:
        return _etcdctl(fleet, "del", fleet.keys.failpoints("hostd/beta")).returncode == 0

    wait_until(gone, "etcd takes no write", 40)


def _etcdctl(fleet: Fleet, *arguments: str, endpoint: str = "", given: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
    line = ["etcdctl", f"--endpoints={endpoint or fleet.lab.etcd.endpoints}", "--command-timeout=5s", *arguments]
    return subprocess.run(line, env=environment, input=given, capture_output=True, text=True, timeout=30, check=False)


def leader(fleet: Fleet) -> Process:
    """The member that leads."""
    for member, endpoint in zip(fleet.lab.etcd.members, fleet.lab.etcd.endpoints.split(","), strict=True):
        fields = _etcdctl(fleet, "endpoint", "status", "-w", "fields", endpoint=endpoint).stdout
        said = dict(line.split(" : ", 1) for line in fields.splitlines() if " : " in line)
        if member.running and said.get('"MemberID"') == said.get('"Leader"'):
            return member
    raise AssertionError("no member leads")


def assert_arrived(fleet: Fleet, name: str, witness: Witness) -> None:
    """Completed, and everything that was acknowledged is on beta; then everything is removed again."""
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=90)
    wait_until_answering(fleet.beta.spec.address, PORT)
    witness.wait_for_more(20)
    witness.stop()
    assert witness.missing_from(fleet.beta.spec.address) == []
    assert not fleet.running("alpha", name)
    fleet.assert_sound(f"{name}-1")
    for client in fleet.docker.values():
        for container in client.containers.list(all=True):
            container.remove(force=True)
    fleet.wait_for(f"{name}-1", "finalised", timeout_seconds=40)


def test_the_leader_dies_during_the_cut_over_and_stays_dead_until_the_end(trio: Fleet) -> None:
    """B3, E3, E27: an election, and a member less; exactly one event of each, and no false abort."""
    witness = service(trio, "elect")
    paused_at(trio, "elect", "target.apply_dirty:before_effect")
    dead = leader(trio)
    dead.kill()
    go_on(trio)
    assert_arrived(trio, "elect", witness)
    dead.start()
    trio.lab.etcd.wait_ready()


@pytest.mark.long
def test_without_a_quorum_everybody_holds_and_nobody_starts(trio: Fleet) -> None:
    """B2, B9, E18: after the stop the service is down, and stays so; the member that is left grants nothing."""
    witness = service(trio, "quorum")
    paused_at(trio, "quorum", "target.mount_union:after_effect")
    lost = trio.lab.etcd.members[1:]
    for member in lost:
        member.kill()
    threading.Event().wait(6.0)  # how long the outage lasts: more than the timeout of a call
    assert not trio.running("alpha", "quorum")
    assert not trio.listed_as_running("beta", "quorum")
    for member in lost:
        member.start()
    go_on(trio)
    assert_arrived(trio, "quorum", witness)


def test_a_full_etcd_holds_the_migration_until_there_is_room_again(trio: Fleet) -> None:
    """B7, E7, E8, E9, E25: nothing is aborted for it; compact, defragment every member, disarm, and it goes on."""
    witness = service(trio, "full")
    paused_at(trio, "full", "target.apply_dirty:before_effect")
    junk = "x" * 1_000_000
    wait_until(
        lambda: "space exceeded" in _etcdctl(trio, "put", "/junk", given=junk).stderr, "etcd does not get full", 60
    )
    assert _etcdctl(trio, "put", trio.keys.request("other"), "{}").returncode != 0
    refused = trio.cargoctl("abort", "full-1")
    assert "out of space" in refused.stderr + refused.stdout
    status = _etcdctl(trio, "endpoint", "status", "-w", "fields", endpoint=trio.lab.etcd.endpoint).stdout
    revision = next(line.split(" : ")[1] for line in status.splitlines() if line.startswith('"Revision"'))
    assert _etcdctl(trio, "del", "/junk").returncode == 0
    assert _etcdctl(trio, "compact", revision).returncode == 0
    for endpoint in trio.lab.etcd.endpoints.split(","):
        assert _etcdctl(trio, "defrag", endpoint=endpoint).returncode == 0
    assert _etcdctl(trio, "alarm", "disarm").returncode == 0
    go_on(trio)
    assert_arrived(trio, "full", witness)


@pytest.mark.long
def test_a_compaction_behind_a_partition_loses_nothing(trio: Fleet) -> None:
    """B6, E10, E12: the revisions that the source missed are gone when it is back; it reads the history anew."""
    witness = service(trio, "compact")
    paused_at(trio, "compact", "target.pull_round:before_effect")
    trio.alpha.cut("etcd")
    wait_until(lambda: trio.store.get(trio.keys.host("alpha")) is None, "alpha is still listed", LEASE_SECONDS)
    go_on(trio)
    trio.wait_for("compact-1", "sync_finished")
    trio.etcdctl("put", "/other", "1")
    revision = trio.store.revision()
    assert _etcdctl(trio, "compact", str(revision)).returncode == 0
    trio.alpha.heal("etcd")
    assert_arrived(trio, "compact", witness)


@pytest.mark.long
def test_an_etcd_on_a_slow_disk_makes_everything_late_and_nothing_wrong(trio: Fleet) -> None:
    """B16, E28: it stands still for two seconds again and again, as with an fsync of that length."""
    witness = service(trio, "slow")
    stop = threading.Event()

    def stutter() -> None:
        while not stop.wait(0.7):
            trio.lab.etcd.freeze()
            stop.wait(2.0)
            trio.lab.etcd.thaw()

    thread = threading.Thread(target=stutter, daemon=True)
    thread.start()
    try:
        trio.request("slow-1", "slow", max_rounds=2)
        trio.wait_end("slow-1", "completed", timeout_seconds=150)
    finally:
        stop.set()
        thread.join()
    assert "step_failed" not in trio.types("slow-1")
    assert_arrived(trio, "slow", witness)


@pytest.mark.long
def test_a_permission_that_is_taken_away_holds_everything_until_it_is_given_back(spoilt: Fleet) -> None:
    """B14, E29, E31: refused is not absent; nobody takes it for an empty history, or for an order to stop."""
    witness = service(spoilt, "auth")
    paused_at(spoilt, "auth", "target.apply_dirty:before_effect")
    for words in (("user", "add", "root:pw"), ("role", "add", "root"), ("user", "grant-role", "root", "root")):
        _etcdctl(spoilt, *words)
    since = spoilt.log_size("coordinator")
    assert _etcdctl(spoilt, "auth", "enable").returncode == 0
    spoilt.wait_step("coordinator", "refuses this process", since, 40)
    assert not spoilt.running("alpha", "auth")
    assert not spoilt.listed_as_running("beta", "auth")
    assert spoilt.lab.coordinator.running
    assert spoilt.alpha.hostd.running
    assert spoilt.beta.hostd.running
    assert _etcdctl(spoilt, "--user=root:pw", "auth", "disable").returncode == 0
    go_on(spoilt)
    assert_arrived(spoilt, "auth", witness)


@pytest.mark.long
def test_histories_that_a_person_deletes_are_an_alarm_and_not_an_absence(spoilt: Fleet) -> None:
    """B15, E14: the container is left as it is, on both hosts, whatever the empty prefix seems to say."""
    witness = service(spoilt, "wiped")
    paused_at(spoilt, "wiped", "target.fill_replica:before_effect")
    spoilt.wait_running("beta", "wiped")
    since = spoilt.log_size("coordinator")
    spoilt.etcdctl("del", "--prefix", spoilt.keys.migrations)
    spoilt.wait_step("coordinator", "keys of its history were deleted", since)
    go_on(spoilt)
    for host in (spoilt.alpha, spoilt.beta):
        host.hostd.restart()
    spoilt.lab.coordinator.restart()
    witness.wait_for_more(50)
    witness.stop()
    assert spoilt.running("beta", "wiped")
    assert not spoilt.running("alpha", "wiped")
    assert witness.missing_from(spoilt.beta.spec.address) == []
    spoilt.oracle.assert_one_runner()


@pytest.mark.parametrize(
    "how", ["restored from an older snapshot", pytest.param("another, empty cluster", marks=pytest.mark.long)]
)
def test_an_etcd_that_is_not_the_one_it_was_is_not_obeyed(spoilt: Fleet, how: str, tmp_path: Path) -> None:
    """B13, B17, E26: its histories know nothing of the start on beta; nobody starts the container a second time."""
    witness = service(spoilt, "past")
    paused_at(spoilt, "past", "target.pull_round:before_effect")
    saved = tmp_path / "snapshot"
    assert _etcdctl(spoilt, "snapshot", "save", str(saved), endpoint=spoilt.lab.etcd.endpoint).returncode == 0
    go_on(spoilt)
    spoilt.wait_end("past-1", "completed")
    spoilt.lab.etcd.stop()
    data = spoilt.lab.etcd.data_directory()
    data.rename(data.with_name("before"))
    if how.startswith("restored"):
        member = spoilt.lab.etcd.members[0]
        flags = [flag for flag in member.argv if flag.startswith(("--name", "--data-dir", "--initial-"))]
        done = _etcdctl(spoilt, "snapshot", "restore", str(saved), *flags)
        assert done.returncode == 0, done.stderr
    spoilt.lab.etcd.start()

    def refused(log: str) -> bool:
        text = (spoilt.lab.spec.logs / f"{log}.log").read_text(errors="replace")
        return "Nothing is done for any migration" in text

    for log in ("coordinator", "alpha.hostd", "beta.hostd"):
        wait_until(lambda log=log: refused(log), f"{log} does not refuse the other etcd", 60)  # type: ignore[misc]
    for daemon in (spoilt.lab.coordinator, spoilt.alpha.hostd, spoilt.beta.hostd):
        daemon.kill()
        daemon.start(wait=False)  # a person restarts them without having looked
    spoilt.lab.start_agents()
    witness.wait_for_more(100)
    witness.stop()
    assert spoilt.running("beta", "past")
    assert not spoilt.running("alpha", "past")
    assert witness.missing_from(spoilt.beta.spec.address) == []
    spoilt.oracle.assert_one_runner()
