"""``remote: nfs`` through all phases, on a target whose kernel has an NFS client: a virtual machine in the lab.

Everything on it is real: its kernel, dockerd, sshd, the agent, and the mount; the source is an ordinary host of the lab
with nfs-ganesha. Long, because the machine is emulated without help of the processor. What single faults do to the view is
in tests/integration/test_nfs_guest.py.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from events import schema
from labkit.waiting import wait_until
from tests.e2e.conftest import Ground
from tests.support.fleet import Fleet, differences
from tests.support.guest_host import CHECK, MAKE_STALE, GuestHost, booted_host
from tests.support.guest_host import NAME as GAMMA
from tests.support.trees import grow

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3600)]

SLOW_SECONDS = 900.0


@pytest.fixture(scope="module")
def guest(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestHost]:
    """The third host."""
    began = time.monotonic()
    with booted_host(ground.lab, tmp_path_factory.mktemp("guest")) as made:
        print(f"the guest was up after {time.monotonic() - began:.0f} s")
        yield made


def failpoints(fleet: Fleet, guest: GuestHost, text: str) -> None:
    """As ``Fleet.failpoints``, for the agent on the guest."""
    key = fleet.keys.failpoints(f"hostd/{GAMMA}")
    if not text:
        fleet.store.delete(key)
        return
    fleet.store.put(key, text.encode())
    wait_until(lambda: text in guest.run(["grep", "failpoints taken", "/var/log/hostd.log"], check=False), text, 120)


def begin(fleet: Fleet, name: str) -> None:
    """A container on alpha whose stop is near: some of its data has changed since the last round."""
    (fleet.volume("alpha", name) / "calm").write_text("calm\n")
    fleet.sleeper(name, volumes={name: {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/alpha", "source.disarm_restart:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request(f"{name}-1", name, target=GAMMA, remote="nfs")
    fleet.wait_step(
        "alpha.hostd", '"point": "source.disarm_restart:before_effect"', since, timeout_seconds=SLOW_SECONDS
    )
    fleet.execute("alpha", name, MAKE_STALE)


def federated(fleet: Fleet, guest: GuestHost, name: str) -> None:
    """The same, started on the guest, with nothing of what had changed on its disk."""
    failpoints(fleet, guest, "target.fill_replica:before_effect=pause")
    begin(fleet, name)
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_for(f"{name}-1", "target_started", timeout_seconds=SLOW_SECONDS)
    wait_until(lambda: guest.running(name), f"{name} does not run", SLOW_SECONDS)


def servers(fleet: Fleet) -> list[str]:
    """What serves by NFS on alpha."""
    return [tool for tool in fleet.tools("alpha") if "ganesha" in tool]


def test_a_container_moves_over_nfs_from_the_request_to_a_plain_volume(fleet: Fleet, guest: GuestHost) -> None:
    """P4, C1, D14: also while nothing comes from the server for a while."""
    grow(fleet.volume("alpha", "nfsall") / "grown", 31, entries=60)
    place = fleet.volume_path("alpha", "nfsall", "grown")
    fleet.at_end(lambda: subprocess.run(["rm", "-rf", "--", str(place)], check=True))
    federated(fleet, guest, "nfsall")
    assert [line.split()[0] for line in guest.mounts()].count("nfs4") >= 1, guest.mounts()
    assert servers(fleet)

    prepared = next(e.data for e in fleet.events("nfsall-1") if isinstance(e.data, schema.SourcePrepared))
    rule = f"ip saddr {guest.spec.address} tcp dport {prepared.remote_port} drop"
    chain = f"table ip cut_nfs {{ chain into {{ type filter hook prerouting priority -450; {rule}; }}; }}"
    fleet.alpha.run(["nft", chain])
    fleet.at_end(lambda: fleet.alpha.run(["nft", "delete table ip cut_nfs"], check=False) and None)
    read = [
        "docker",
        "exec",
        "-d",
        "nfsall",
        "sh",
        "-c",
        "sha256sum < /data/big/2 > /tmp/answer; mv /tmp/answer /tmp/done",
    ]
    guest.run(read)
    log = "/var/lib/docker/volumes/nfsall/cargo/lower.log"
    wait_until(
        lambda: "readers wait" in guest.run(["cat", log], check=False), "nobody waits for the source", SLOW_SECONDS
    )
    fleet.alpha.run(["nft", "delete table ip cut_nfs"])
    answered = "[ -e /tmp/done ] && cat /tmp/done || true"
    wait_until(lambda: bool(guest.execute("nfsall", answered)), "the read does not go on", SLOW_SECONDS)
    assert guest.execute("nfsall", answered) == guest.execute("nfsall", "cat /data/big/2.sum")

    kept = fleet.describe("alpha", "/var/lib/docker/volumes/nfsall/_data")[0]
    assert differences(kept, guest.describe_seen("nfsall", "/data")) == []
    failpoints(fleet, guest, "")
    fleet.wait_end("nfsall-1", "completed", timeout_seconds=SLOW_SECONDS)
    assert not [line for line in guest.mounts() if line.startswith("nfs4")]
    assert servers(fleet) == []
    assert differences(kept, guest.describe_seen("nfsall", "/data")) == []
    fleet.control("nfsall-1", "finalise")
    fleet.wait_for("nfsall-1", "finalised", timeout_seconds=SLOW_SECONDS)
    assert guest.mounts() == []
    assert differences(kept, guest.describe("/var/lib/docker/volumes/nfsall/_data")) == []
    guest.execute("nfsall", CHECK)
    fleet.assert_sound("nfsall-1")


def test_a_rollback_during_the_fill_brings_the_writes_home_and_leaves_no_view(fleet: Fleet, guest: GuestHost) -> None:
    """P11, P12: most contents were never on the target's disk."""
    federated(fleet, guest, "nfsback")
    guest.execute("nfsback", CHECK + "echo written > /data/new; echo more >> /data/big/1")
    fleet.control("nfsback-1", "rollback")
    failpoints(fleet, guest, "")
    fleet.wait_end("nfsback-1", "rolled_back", timeout_seconds=SLOW_SECONDS)
    fleet.wait_running("alpha", "nfsback")
    fleet.execute("alpha", "nfsback", '[ "$(cat /data/new)" = written ]; tail -c 5 /data/big/1 | grep -qx more')
    assert (guest.mounts(), servers(fleet)) == ([], [])
    fleet.assert_sound("nfsback-1")


def test_an_abort_before_the_stop_withdraws_view_and_export(fleet: Fleet, guest: GuestHost) -> None:
    """P11: the export is there from ``prepare`` on, and the view is opened ahead of the stop."""
    begin(fleet, "nfsnot")
    assert servers(fleet)
    fleet.control("nfsnot-1", "abort")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_end("nfsnot-1", "aborted", timeout_seconds=SLOW_SECONDS)
    assert fleet.running("alpha", "nfsnot")
    assert (guest.mounts(), servers(fleet)) == ([], [])
    assert guest.run(["docker", "ps", "-aq", "--filter", "label=cargo.migration=nfsnot-1"]).strip() == ""
    fleet.assert_sound("nfsnot-1")
