"""The way back: the container as it was, with what it wrote elsewhere, and no more than that on the link."""

from __future__ import annotations

import os
from typing import Any

import pytest

from events import schema
from tests.support.fleet import Fleet, without_state

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

GIGABYTES = int(os.environ.get("CARGO_ROLLBACK_GIGABYTES", "10"))
OWN_BYTES = 10 * 1024 * 1024
MEGABYTE = 1024 * 1024


def as_configured(inspected: dict[str, Any]) -> dict[str, Any]:
    """``docker inspect`` without what any stop and start changes: processes, sandboxes, and addresses that Docker picks."""
    kept = without_state(inspected)
    networks = kept["NetworkSettings"]["Networks"]
    for endpoint in networks.values():
        for changing in ("IPAddress", "MacAddress", "DNSNames"):
            endpoint.pop(changing, None)
    for changing in ("IPAddress", "MacAddress"):
        kept["NetworkSettings"].pop(changing, None)
    return kept


def carried(fleet: Fleet, migration: str) -> schema.CarriedBack:
    """What ``carried_back`` said."""
    return next(event.data for event in fleet.events(migration) if isinstance(event.data, schema.CarriedBack))


def test_a_container_is_on_its_source_again_exactly_as_it_was_configured(fleet: Fleet) -> None:
    """P11, P12: the same container, with its policy, ports, networks and mounts, and its writes of meanwhile."""
    network = fleet.docker["alpha"].networks.create("shop-net")
    fleet.at_end(lambda: _remove_networks(fleet))
    place = fleet.volume("alpha", "shop-data")
    for name in ("kept", "gone", "old"):
        (place / name).write_bytes(name.encode() * 1000)
    made = fleet.sleeper(
        "shop",
        volumes={"shop-data": {"bind": "/data"}},
        ports={"8080/tcp": 8080, "9000/udp": ("127.0.0.1", 9001)},
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 4},
        environment={"MODE": "shop"},
    )
    network.connect(made, aliases=["counter"])
    made.reload()
    before = as_configured(made.attrs)
    fleet.migrate("shop-1", "shop")
    fleet.wait_for("shop-1", "finalised")
    fleet.wait_inbox_empty(
        ["shop-1"]
    )  # neither agent keeps anything of it in mind, and it can be rolled back all the same
    fleet.execute("beta", "shop", "cd /data; rm gone; mv old new; echo written > fresh")
    fleet.control("shop-1", "rollback")
    fleet.wait_end("shop-1", "rolled_back")
    fleet.wait_running("alpha", "shop")
    assert as_configured(fleet.present("alpha", "shop").attrs) == before
    seen = fleet.execute("alpha", "shop", "cd /data; ls; cat fresh; [ $(wc -c < new) = 3000 ]")
    assert seen.split() == ["fresh", "kept", "new", "written"]
    fleet.assert_clean("beta", "shop-1")
    fleet.assert_sound("shop-1")


def test_after_the_fold_only_what_the_container_wrote_is_carried_home(fleet: Fleet) -> None:
    """P12: the fold moves files and so touches them; the source's digests tell that from a write."""
    place = fleet.volume("alpha", "folded-data")
    (place / "calm").write_bytes(os.urandom(MEGABYTE))
    fleet.sleeper("folded", volumes={"folded-data": {"bind": "/data"}})
    fleet.failpoints("hostd/alpha", "source.disarm_restart:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request("folded-1", "folded")
    fleet.wait_step("alpha.hostd", '"point": "source.disarm_restart:before_effect"', since)
    fleet.execute(
        "alpha", "folded", "head -c 8000000 /dev/urandom > /data/late; head -c 3000000 /dev/urandom > /data/more"
    )
    digest = fleet.execute("alpha", "folded", "sha256sum < /data/late")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_end("folded-1", "completed")
    fleet.control("folded-1", "finalise")
    fleet.wait_for("folded-1", "finalised")
    fleet.execute(
        "beta", "folded", "echo written > /data/fresh; chmod 600 /data/late; echo over | dd of=/data/more conv=notrunc"
    )
    fleet.control("folded-1", "rollback")
    fleet.wait_end("folded-1", "rolled_back")
    assert carried(fleet, "folded-1").files == 2, "the one that is new and the one that was written to"
    assert fleet.execute("alpha", "folded", "cat /data/fresh; head -n 1 /data/more") == "written\nover\n"
    assert fleet.execute("alpha", "folded", "sha256sum < /data/late") == digest
    assert (place / "late").stat().st_mode & 0o777 == 0o600
    fleet.assert_sound("folded-1")


def _remove_networks(fleet: Fleet) -> None:
    for client in fleet.docker.values():
        for found in client.networks.list(names=["shop-net"]):
            for attached in client.containers.list(all=True):
                if "shop-net" in attached.attrs["NetworkSettings"]["Networks"]:
                    found.disconnect(attached, force=True)
            found.remove()


@pytest.mark.long
def test_rolling_back_moves_what_was_written_and_not_what_lies_there_already(fleet: Fleet) -> None:
    """P12: 10 MB on top of gigabytes move about 10 MB."""
    place = fleet.volume("alpha", "heavy-data")
    for number in range(GIGABYTES * 16):
        block = os.urandom(MEGABYTE)
        with (place / f"f{number:04}").open("wb") as file:
            for _ in range(64):
                file.write(block)
    (place / "small").write_bytes(b"small" * 20_000)
    fleet.sleeper("heavy", volumes={"heavy-data": {"bind": "/data"}})
    fleet.request("heavy-1", "heavy", max_rounds=2)
    fleet.wait_end("heavy-1", "completed", timeout_seconds=900)
    fleet.execute("beta", "heavy", f"cd /data; head -c {OWN_BYTES} /dev/urandom > fresh; rm f0000; mv small moved")
    digest = fleet.execute("beta", "heavy", "sha256sum < /data/fresh")
    fleet.control("heavy-1", "rollback")
    fleet.wait_end("heavy-1", "rolled_back", timeout_seconds=600)
    moved = carried(fleet, "heavy-1").bytes_moved
    print(f"rolled back {OWN_BYTES} bytes written on top of {GIGABYTES} GiB by moving {moved} bytes")
    assert OWN_BYTES <= moved < 1.1 * OWN_BYTES
    assert fleet.execute("alpha", "heavy", "sha256sum < /data/fresh") == digest
    fleet.execute("alpha", "heavy", "cd /data; [ ! -e f0000 ]; [ ! -e small ]; [ -s moved ]")
    fleet.assert_sound("heavy-1")
