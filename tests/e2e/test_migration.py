"""The whole path on real parts: what moves, what the container sees, what is left behind, and the way back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from events import schema
from labkit.waiting import wait_until
from labkit.witness import Witness, load_keys, wait_until_answering
from tests.support.fleet import ON_A_UNION, STRAIGHT, Container, Fleet, differences
from tests.support.trees import access_list, grow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

REDIS_PORT = 6379
ESSENTIAL_CONFIG = ("Env", "Cmd", "Entrypoint", "User", "WorkingDir", "Labels", "Hostname", "ExposedPorts", "Tty")
ESSENTIAL_HOST_CONFIG = (
    "PortBindings",
    "Memory",
    "MemorySwap",
    "CpuShares",
    "NanoCpus",
    "PidsLimit",
    "CapAdd",
    "ReadonlyRootfs",
    "Ulimits",
    "ShmSize",
    "ExtraHosts",
    "LogConfig",
)
STEADY_SCRIPT = """
    stop() { echo last > /a/stopped; echo "last words" > "/b/last words"; exit 0; }
    if [ -e /a/stopped ]; then trap 'exit 0' TERM; sleep 100000 & wait; fi
    trap stop TERM
    n=0
    while :; do
        n=$((n + 1))
        echo $n >> /a/log
        echo $n > /a/churn/new.$n
        [ $n -gt 3 ] && rm -f /a/churn/new.$((n - 3))
        mkdir -p /b/dir.$((n % 5)) && echo $n > /b/dir.$((n % 5))/file && mv /b/dir.$((n % 5)) /b/moved.$n
        [ $n -gt 2 ] && rm -rf /b/moved.$((n - 2))
        [ $((n % 7)) = 0 ] && ln -f /a/log /a/churn/linked && mv /a/churn/linked /b/$n 2>/dev/null
        echo $n > /single
        sleep 0.01
    done
"""
"""Creates, appends, renames, deletes and links until it is told to stop, and writes on its way out."""

PLACES = {
    "/a": "/var/lib/docker/volumes/odd-a/_data",
    "/b": "/var/lib/docker/volumes/odd-b/_data",
    "/fixed": "/var/lib/docker/volumes/odd-fixed/_data",
    "/bind": "/srv/odd/bind",
    "/single": "/srv/odd/single",
}


def essential(container: Container) -> dict[str, object]:
    """The configuration that a migration must carry."""
    config, host = container.attrs["Config"], container.attrs["HostConfig"]
    mounts = sorted(
        (m["Destination"], m["Type"], m.get("Name", m["Source"]), m["RW"]) for m in container.attrs["Mounts"]
    )
    labels = {key: value for key, value in config["Labels"].items() if not key.startswith("cargo.")}
    kept = {name: config.get(name) for name in ESSENTIAL_CONFIG} | {"Labels": labels}
    return {
        "image": container.attrs["Image"],
        **kept,
        **{name: host.get(name) for name in ESSENTIAL_HOST_CONFIG},
        "mounts": mounts,
    }


def remove_tree(tree: Path) -> None:
    """Of odd trees, whatever their names and depth."""
    subprocess.run(["rm", "-rf", "--", str(tree)], check=True)


# --- a service that is used --------------------------------------------------------------------------


@pytest.mark.parametrize("on_a_union", [True, False])
def test_a_redis_in_use_moves_with_its_configuration_and_without_losing_an_acknowledged_record(
    fleet: Fleet, on_a_union: bool
) -> None:
    web = fleet.run(
        "web",
        image="redis",
        ports={f"{REDIS_PORT}/tcp": REDIS_PORT},
        volumes={"webdata": {"bind": "/data"}},
        environment={"GREETING": "odd 'quoted' $value\nsecond line"},
        labels={"team": "db"},
        user="999:0",
        working_dir="/data",
        hostname="keeper",
        mem_limit="256m",
        nano_cpus=1_500_000_000,
        pids_limit=200,
        cap_add=["NET_ADMIN"],
        restart_policy={"Name": "always"},
    )
    before = essential(web)
    wait_until_answering(fleet.alpha.spec.address, REDIS_PORT)
    load_keys(fleet.alpha.spec.address, REDIS_PORT, 500, 2000)
    witness = Witness([fleet.alpha.spec.address, fleet.beta.spec.address], REDIS_PORT)
    witness.start()
    fleet.at_end(witness.stop)
    witness.wait_for_more(50)

    migration = f"web-{int(on_a_union)}"
    events = fleet.migrate(migration, "web", **(ON_A_UNION if on_a_union else {}))
    witness.wait_for_more(50)
    witness.stop()

    assert witness.answers[-1].address == fleet.beta.spec.address
    assert witness.missing_from(fleet.beta.spec.address) == []
    types = [event.type for event in events]
    rounds = types.count("sync_ordered")
    assert rounds >= 2
    first = types.index("target_prepared") + 1
    assert types[first : first + 3 * rounds] == ["sync_ordered", "sync_armed", "sync_finished"] * rounds
    rest = [*types[:first], *types[first + 3 * rounds :]]
    assert [name for name in rest if name != "source_digested"] == list(STRAIGHT)
    assert types.index("target_started") < types.index("source_digested") < types.index("verified")

    claimed = next(event.data for event in events if isinstance(event.data, schema.TargetClaimed))
    assert claimed.remainder == ("federated" if on_a_union else "finished")

    moved = fleet.present("beta", "web")
    assert essential(moved) == before
    assert fleet.running("beta", "web")
    if on_a_union:
        assert fleet.policy("beta", "web") == "no", "the agent supervises it while it stands on the union"

    assert fleet.container("alpha", "web") is None
    kept = fleet.present("alpha", f"web.cargo-{migration}")
    assert (kept.id, kept.status, fleet.policy("alpha", f"web.cargo-{migration}")) == (web.id, "exited", "no")
    assert not any("(fuse.sshfs)" in mount for mount in fleet.mounts("beta")), "the source may be switched off"
    assert not fleet.records("alpha", migration)

    if on_a_union:
        fleet.control(migration, "finalise")
    fleet.wait_for(migration, "finalised")
    assert fleet.mounts("beta") == []
    fleet.wait_policy("beta", "web", "always")
    assert fleet.running("beta", "web")
    assert essential(fleet.present("beta", "web")) == before
    wait_until_answering(fleet.beta.spec.address, REDIS_PORT)
    assert witness.missing_from(fleet.beta.spec.address) == []
    fleet.assert_sound(migration)


def test_no_secret_of_the_container_enters_the_history(fleet: Fleet) -> None:
    fleet.sleeper("safe", environment={"PASSWORD": "open-sesame"})
    events = fleet.migrate("safe-1", "safe")
    assert not any(b"open-sesame" in event.raw for event in events)
    assert "PASSWORD=open-sesame" in fleet.present("beta", "safe").attrs["Config"]["Env"]


def test_a_source_that_is_asked_to_remove_its_copy_keeps_neither_container_nor_volumes(fleet: Fleet) -> None:
    place = fleet.volume("alpha", "gone-data")
    (place / "file").write_text("contents")
    fleet.sleeper("gone", volumes={"gone-data": {"bind": "/data"}})
    fleet.migrate("gone-1", "gone", on_release="remove")
    assert fleet.container("alpha", "gone") is None
    assert fleet.container("alpha", "gone.cargo-gone-1") is None
    assert not fleet.has_volume("alpha", "gone-data")
    assert fleet.execute("beta", "gone", "cat /data/file") == "contents"
    fleet.control("gone-1", "rollback")
    assert "control_refused" in fleet.types("gone-1"), "there is nothing left to go back to"


# --- data of every kind ------------------------------------------------------------------------------


def test_every_kind_of_entry_and_mount_arrives_exactly_while_the_container_keeps_changing_it(fleet: Fleet) -> None:
    """Two volumes, one of them only read here, a bind directory, a read-only bind and a single file."""
    first, second, fixed = (fleet.volume("alpha", name) for name in ("odd-a", "odd-b", "odd-fixed"))
    for seed, place in enumerate((first, second, fixed)):
        grown = grow(place / "grown", seed, entries=40)
        fleet.at_end(lambda tree=place / "grown": remove_tree(tree))
        assert all(grown.odd[kind] for kind in ("hard link", "symlink", "xattr", "acl", "fifo", "sparse", "device"))
    (first / "churn").mkdir()
    (first / "acl").write_bytes(b"x")
    os.setxattr(first / "acl", "system.posix_acl_access", access_list(4711))
    bind, single = fleet.alpha.path("/srv/odd/bind"), fleet.alpha.path("/srv/odd/single")
    bind.mkdir(parents=True)
    grow(bind / "grown", 7, entries=10)
    single.write_text("0\n")
    single.chmod(0o640)
    os.chown(single, 4711, 42)
    fleet.run(
        "odd",
        command=["sh", "-c", STEADY_SCRIPT],
        volumes={
            "odd-a": {"bind": "/a"},
            "odd-b": {"bind": "/b"},
            "odd-fixed": {"bind": "/fixed", "mode": "ro"},
            "/srv/odd/bind": {"bind": "/bind"},
            "/srv/odd/single": {"bind": "/single"},
        },
    )
    events = fleet.migrate("odd-1", "odd")
    stopped = next(event.data for event in events if isinstance(event.data, schema.SourceStopped))
    assert sum(dirty.stale_files for dirty in stopped.dirty) > 0, "the container was busy, so something was stale"

    seen = dict(zip(PLACES, fleet.describe_seen("beta", "odd", *PLACES), strict=True))
    for (destination, entries), frozen in zip(seen.items(), fleet.describe("alpha", *PLACES.values()), strict=True):
        assert differences(frozen, entries) == [], destination
    assert {b"stopped", b"log"} <= {entry.path for entry in seen["/a"]}
    assert b"last words" in {entry.path for entry in seen["/b"]}
    assert "Read-only" in fleet.present("beta", "odd").exec_run(["touch", "/fixed/new"]).output.decode()
    fleet.assert_sound("odd-1")

    fleet.control("odd-1", "finalise")
    fleet.wait_for("odd-1", "finalised")
    for (destination, entries), now in zip(seen.items(), fleet.describe_seen("beta", "odd", *PLACES), strict=True):
        assert differences(entries, now) == [], destination
    assert fleet.mounts("beta") == []
    assert fleet.tools("beta") == []


# --- the union ---------------------------------------------------------------------------------------

STALE_MB = 30


def union_of_stale_files(fleet: Fleet, name: str, faults: str = "") -> None:
    """A migration whose container runs on beta while 30 MB of its data are still on alpha.

    The data is written after the last round, while the migration is held right before the cut-over.
    """
    place = fleet.volume("alpha", f"{name}-data")
    (place / "calm").mkdir()
    (place / "calm" / "file").write_text("calm\n")
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}})
    hold = "target.sync:before_event=pause@2"
    fleet.failpoints("hostd/beta", hold)
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-1", name)
    fleet.wait_step("beta.hostd", '"step": "sync"', since)
    wait_for_round(fleet, f"{name}-1", 2)
    wait_until(lambda: step_done_twice(fleet, since), "the second round does not end", 20)
    fleet.execute(
        "alpha",
        name,
        f"""
        mkdir -p /data/big
        for n in 1 2 3 4 5 6; do
            head -c {STALE_MB * 1024 * 1024 // 6} /dev/urandom > /data/big/$n
            sha256sum < /data/big/$n > /data/big/$n.sum
        done
        ln /data/big/5 /data/big/5.link
        echo changed > /data/calm/file
        """,
    )
    fleet.failpoints("hostd/beta", faults)


def wait_for_round(fleet: Fleet, migration: str, number: int) -> None:
    """Until the source tracks for that round."""

    def armed() -> bool:
        return any(isinstance(e.data, schema.SyncArmed) and e.data.round == number for e in fleet.events(migration))

    wait_until(armed, f"round {number} does not begin", 20)


def step_done_twice(fleet: Fleet, since: int) -> bool:
    """Whether the target has pulled two rounds since that place in its log."""
    log = (fleet.lab.spec.logs / "beta.hostd.log").read_text()[since:]
    return sum('"step done"' in line and '"sync"' in line for line in log.splitlines()) >= 2


def test_a_container_uses_data_that_is_still_on_the_source_and_keeps_what_it_does_to_it(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "big", faults="target.fill_replica:before_effect=pause")
    started = fleet.wait_for("big-1", "target_started")
    assert isinstance(started.data, schema.TargetStarted)
    stopped = next(event.data for event in fleet.events("big-1") if isinstance(event.data, schema.SourceStopped))
    assert stopped.dirty[0].stale_bytes >= STALE_MB * 1024 * 1024 * 0.9
    assert fleet.tools("beta"), "the link to the source is open"
    script = """
        cd /data/big
        for n in 1 2 3; do [ "$(sha256sum < $n)" = "$(cat $n.sum)" ]; done
        echo more >> 1; sha256sum < 1 > 1.sum
        mv 2 2.renamed; rm 3 3.sum; echo new > new; mkdir sub; mv 4 sub/4
        echo appended >> 5.link; [ "$(sha256sum < 5)" = "$(sha256sum < 5.link)" ]
        [ "$(stat -c %h 5)" = 2 ]; sha256sum < 5 > 5.sum
        [ "$(cat /data/calm/file)" = changed ]
    """
    fleet.execute("beta", "big", script)
    assert "fill_finished" not in fleet.types("big-1")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("big-1", "completed")
    check = """
        cd /data/big
        [ "$(sha256sum < 1)" = "$(cat 1.sum)" ]; [ "$(sha256sum < 2.renamed)" = "$(cat 2.sum)" ]
        [ ! -e 2 ]; [ ! -e 3 ]; [ "$(cat new)" = new ]; [ "$(sha256sum < sub/4)" = "$(cat 4.sum)" ]
        for name in 5 5.link; do [ "$(sha256sum < $name)" = "$(cat 5.sum)" ]; done
        [ "$(sha256sum < 6)" = "$(cat 6.sum)" ]; [ "$(cat /data/calm/file)" = changed ]
    """
    fleet.execute("beta", "big", check)
    assert not any("(fuse.sshfs)" in mount for mount in fleet.mounts("beta"))
    assert any("(overlay)" in mount for mount in fleet.mounts("beta"))

    [before] = fleet.describe_seen("beta", "big", "/data")
    fleet.control("big-1", "finalise")
    fleet.wait_for("big-1", "finalised")
    assert (fleet.mounts("beta"), fleet.tools("beta"), fleet.stages("beta")) == ([], [], [])
    [seen] = fleet.describe_seen("beta", "big", "/data")
    [plain] = fleet.describe("beta", "/var/lib/docker/volumes/big-data/_data")
    # Over a union, inode numbers of the names of one file may differ for a while.
    assert differences(before, plain, apart_from=["hard links"]) == []
    assert differences(seen, plain) == []
    fleet.execute("beta", "big", "cd /data/big; [ 5 -ef 5.link ]")
    fleet.present("beta", "big").restart()
    fleet.execute("beta", "big", check)
    fleet.assert_sound("big-1")


def test_a_container_that_stops_after_the_release_comes_back_on_a_plain_volume_by_itself(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "bystop")
    fleet.wait_end("bystop-1", "completed")
    [before] = fleet.describe_seen("beta", "bystop", "/data")
    fleet.present("beta", "bystop").stop()
    fleet.wait_for("bystop-1", "finalised")
    assert (fleet.mounts("beta"), fleet.tools("beta"), fleet.stages("beta")) == ([], [], [])
    [plain] = fleet.describe("beta", "/var/lib/docker/volumes/bystop-data/_data")
    assert differences(before, plain, apart_from=["hard links"]) == []
    fleet.present("beta", "bystop").start()
    assert differences(plain, *fleet.describe_seen("beta", "bystop", "/data")) == []


# --- the way back -------------------------------------------------------------------------------------

OWN_WRITES = """
    cd /data; echo beta > fresh; rm big/1; mv big/2 big/two; echo over > calm/file; mkdir made; echo in > made/file
"""

CARRIED_BYTES = STALE_MB * 1024 * 1024 // 6 + 200_000
"""The file that was renamed, and small ones."""


def assert_back(fleet: Fleet, name: str, *, carried: bool) -> None:
    """The container runs on alpha as it did, with or without what it wrote on beta; beta is clean."""
    fleet.wait_running("alpha", name)
    assert fleet.policy("alpha", name) == "no"
    assert fleet.container("alpha", f"{name}.cargo-{name}-1") is None
    with_writes = """
        cd /data; [ "$(cat fresh)" = beta ]; [ ! -e big/1 ]; [ ! -e big/2 ]; [ "$(sha256sum < big/two)" = "$(cat big/2.sum)" ]
        [ "$(cat calm/file)" = over ]; [ "$(cat made/file)" = in ]
    """
    without = """
        cd /data; [ ! -e fresh ]; [ "$(sha256sum < big/1)" = "$(cat big/1.sum)" ]; [ ! -e big/two ]
        [ "$(sha256sum < big/2)" = "$(cat big/2.sum)" ]; [ "$(cat calm/file)" = changed ]; [ ! -e made ]
    """
    fleet.execute("alpha", name, with_writes if carried else without)
    fleet.execute("alpha", name, 'cd /data/big; for n in 3 4 5 6; do [ "$(sha256sum < $n)" = "$(cat $n.sum)" ]; done')
    fleet.assert_clean("beta", f"{name}-1")
    assert fleet.container("beta", name) is None
    assert not fleet.has_volume("beta", f"{name}-data")
    fleet.assert_sound(f"{name}-1")


def test_rolling_back_right_after_the_start_carries_what_the_container_wrote_and_only_that(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "early", faults="target.fill_replica:before_effect=delay(2)@1")
    fleet.wait_for("early-1", "target_started")
    fleet.execute("beta", "early", OWN_WRITES)
    fleet.control("early-1", "rollback")
    events = fleet.wait_end("early-1", "rolled_back")
    carried = next(event.data for event in events if isinstance(event.data, schema.CarriedBack))
    assert carried.bytes_moved < CARRIED_BYTES, "30 MB lie there already"
    assert_back(fleet, "early", carried=True)


def test_rolling_back_after_the_release_carries_what_the_container_wrote(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "late")
    fleet.wait_end("late-1", "completed")
    fleet.execute("beta", "late", OWN_WRITES)
    fleet.control("late-1", "rollback")
    events = fleet.wait_end("late-1", "rolled_back")
    carried = next(event.data for event in events if isinstance(event.data, schema.CarriedBack))
    assert carried.bytes_moved < CARRIED_BYTES
    assert_back(fleet, "late", carried=True)


def test_rolling_back_after_finalising_carries_what_the_container_wrote(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "final")
    fleet.wait_end("final-1", "completed")
    fleet.control("final-1", "finalise")
    fleet.wait_for("final-1", "finalised")
    fleet.execute("beta", "final", OWN_WRITES)
    fleet.control("final-1", "rollback")
    events = fleet.wait_end("final-1", "rolled_back")
    carried = next(event.data for event in events if isinstance(event.data, schema.CarriedBack))
    assert carried.bytes_moved < CARRIED_BYTES
    assert_back(fleet, "final", carried=True)


def test_rolling_back_can_give_up_what_the_container_wrote_on_purpose(fleet: Fleet) -> None:
    union_of_stale_files(fleet, "waive")
    fleet.wait_end("waive-1", "completed")
    fleet.execute("beta", "waive", OWN_WRITES)
    fleet.control("waive-1", {"control": "rollback", "discard_target_writes": True, "reason": "a bad release"})
    events = fleet.wait_end("waive-1", "rolled_back")
    order = next(event.data for event in events if isinstance(event.data, schema.RollbackOrdered))
    assert (order.discard_target_writes, order.by_person, order.reason) == (True, True, "a bad release")
    assert_back(fleet, "waive", carried=False)
