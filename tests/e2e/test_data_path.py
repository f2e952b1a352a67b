"""The data path to its end: faults during the fill, letting go of the source, and life afterwards on any host."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from events import schema
from labkit import Host
from labkit.waiting import wait_until
from tests.e2e.conftest import Ground
from tests.support.fleet import Fleet, differences, told
from tests.support.trees import grow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

VOLUME_PATH = "/var/lib/docker/volumes/{0}/_data"
BIG = 4 * 1024 * 1024
PARTS = 4
SCRIPT = """
    trap 'exit 0' TERM
    if [ -x /data/big/busybox.tool ]; then
        cd /data/big
        exec 3< 1
        head -c 100 <&3 > /dev/null
        ./busybox.tool sleep 100000 &
    fi
    while :; do sleep 1 & wait $!; done
"""
"""On the target it stands in a stale directory, holds a stale file open, and runs a program that is mapped from one."""
MAKE_STALE = f"""
    mkdir -p /data/big
    for n in 1 2 3 {PARTS}; do
        head -c {BIG} /dev/urandom > /data/big/$n
        sha256sum < /data/big/$n > /data/big/$n.sum
    done
    cp /bin/busybox /data/big/busybox.tool
    echo changed > /data/calm
"""
CHECK = f"""
    cd /data/big
    for n in 1 2 3 {PARTS}; do [ "$(sha256sum < $n)" = "$(cat $n.sum)" ]; done
    [ "$(cat /data/calm)" = changed ]
"""


@pytest.fixture(scope="module")
def three(ground: Ground) -> Iterator[Ground]:
    """The usual lab with a third host; the two usual ones again afterwards."""
    ground.extend(["alpha", "beta", "gamma"])
    yield ground
    ground.hosts = None
    ground.rebuild()


@pytest.fixture
def wide(three: Ground, fleet: Fleet) -> Fleet:
    """As ``fleet``, with ``gamma``."""
    assert [host.spec.name for host in fleet.lab.hosts] == ["alpha", "beta", "gamma"]
    return fleet


def federated(fleet: Fleet, name: str, faults: str = "", **options: object) -> str:
    """A container that runs on beta on a union, with 16 MB of its data still on alpha. Returns when it was started."""
    (fleet.volume("alpha", name) / "calm").write_text("calm\n")
    fleet.run(name, command=["sh", "-c", SCRIPT], volumes={name: {"bind": "/data"}}, **options)
    fleet.failpoints("hostd/alpha", "source.disarm_restart:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request(f"{name}-1", name)
    fleet.wait_step("alpha.hostd", '"point": "source.disarm_restart:before_effect"', since)
    fleet.execute("alpha", name, MAKE_STALE)
    fleet.failpoints("hostd/beta", faults)
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_for(f"{name}-1", "target_started")
    fleet.wait_running("beta", name)
    return started_at(fleet, "beta", name)


def started_at(fleet: Fleet, host: str, name: str) -> str:
    return str(fleet.present(host, name).attrs["State"]["StartedAt"])


def processes(host: Host, *words: bytes) -> list[int]:
    """Processes of a host whose command lines hold one of these words."""
    namespace = os.readlink(f"/proc/{host.pid}/ns/pid")
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(place / "ns" / "pid") == namespace:
                line = (place / "cmdline").read_bytes()
                if any(word in line for word in words):
                    found.append(int(place.name))
    return found


def kill(host: Host, *words: bytes) -> int:
    """SIGKILL to all of them, in one go. Returns how many there were."""
    found = processes(host, *words)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def references_to_source(host: Host, name: str, address: str) -> list[str]:
    """Whatever on the host still has to do with the source of a volume's data: mounts, processes, descriptors."""
    found = [
        line.split(" ")[4]
        for line in Path(f"/proc/{host.pid}/mountinfo").read_text(errors="replace").splitlines()
        if "fuse.sshfs" in line
    ]
    for pid in processes(host, b""):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if address.encode() in line or b"cargo-alpha" in line:
                found.append(line.decode(errors="replace"))
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if f"{name}/cargo/remote" in target:
                    found.append(f"{pid}: {target}")
    return found


# --- the link and its processes, during the fill -----------------------------------------------------


def test_a_container_reads_on_when_the_link_is_back_and_never_reads_anything_else(fleet: Fleet) -> None:
    """C1: a read of what has not arrived waits for the source."""
    began = federated(fleet, "link", faults="target.fill_replica:before_effect=pause")
    fleet.beta.cut(fleet.alpha)
    reader = fleet.beta.popen(["docker", "exec", "link", "sh", "-ec", CHECK])
    log = fleet.beta.path("/var/lib/docker/volumes/link/cargo/lower.log")
    wait_until(lambda: log.exists() and b"readers wait" in log.read_bytes(), "nobody waits for the source", 60)
    assert reader.poll() is None
    fleet.beta.heal(fleet.alpha)
    assert reader.wait(100) == 0, "the reads went on, with the right contents"
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("link-1", "completed")
    fleet.execute("beta", "link", CHECK)
    assert started_at(fleet, "beta", "link") == began
    fleet.assert_sound("link-1")


def test_whatever_of_the_transfer_is_killed_comes_back_under_the_running_container(fleet: Fleet) -> None:
    """A6, D14: sshfs, rsync, ssh, and both processes that serve the lower layer."""
    began = federated(fleet, "tools", faults="target.fill_replica:before_effect=pause")
    assert kill(fleet.beta, b"hostd.lower") == 2
    assert kill(fleet.beta, b"sshfs") >= 1
    fleet.execute("beta", "tools", 'cd /data/big; [ "$(sha256sum < 2)" = "$(cat 2.sum)" ]')
    fleet.control("tools-1", {"control": "bwlimit", "kib": 1500})
    fleet.failpoints("hostd/beta", "")
    for _ in range(2):
        wait_until(lambda: kill(fleet.beta, b"rsync\0") > 0, "no rsync is seen", 60)
    kill(fleet.beta, b"sshfs")
    fleet.control("tools-1", {"control": "bwlimit", "kib": 0})
    fleet.wait_end("tools-1", "completed", timeout_seconds=100)
    fleet.execute("beta", "tools", CHECK)
    assert started_at(fleet, "beta", "tools") == began
    fleet.assert_sound("tools-1")


def test_a_container_whose_data_nobody_can_serve_is_paused_and_one_stop_mends_it(fleet: Fleet) -> None:
    """D14: paused, not fed errors; it stays so until a person decides."""
    federated(fleet, "frozen", faults="target.fill_replica:before_effect=pause")
    fleet.beta.hostd.kill()
    assert kill(fleet.beta, b"hostd.lower") == 2
    fleet.beta.hostd.start()
    wait_until(lambda: fleet.present("beta", "frozen").status == "paused", "nobody pauses it", 60)
    fleet.failpoints("hostd/beta", "")
    failed = fleet.wait_for("frozen-1", "step_failed").data
    assert isinstance(failed, schema.StepFailed)
    assert "docker stop frozen" in failed.reason
    fleet.beta.run(["docker", "stop", "-t", "2", "frozen"])
    fleet.wait_running("beta", "frozen", timeout_seconds=60)
    fleet.execute("beta", "frozen", CHECK)
    fleet.wait_end("frozen-1", "completed", timeout_seconds=100)
    fleet.execute("beta", "frozen", CHECK)
    fleet.assert_sound("frozen-1")


def test_a_docker_daemon_that_is_restarted_during_the_fill_finds_the_data_in_place(fleet: Fleet) -> None:
    """A12: without live-restore the container ends with it; the agent starts it again, on the same union."""
    federated(fleet, "engine", "target.fill_replica:before_effect=pause", restart_policy={"Name": "always"})
    fleet.beta.dockerd.stop()
    fleet.beta.dockerd.start()
    fleet.wait_running("beta", "engine", timeout_seconds=60)
    fleet.oracle.resume("beta")
    fleet.execute("beta", "engine", CHECK)
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("engine-1", "completed", timeout_seconds=100)
    fleet.execute("beta", "engine", CHECK)


# --- letting go ----------------------------------------------------------------------------------------


def test_after_the_release_the_source_may_be_switched_off_and_the_target_rebooted(fleet: Fleet) -> None:
    """P4, A11: every file, the descriptor, the mapping and the working directory; then a reboot without the source."""
    began = federated(fleet, "free", restart_policy={"Name": "always"})
    fleet.wait_end("free-1", "completed")
    [frozen] = fleet.describe("alpha", VOLUME_PATH.format("free"))
    fleet.alpha.power_cut()
    fleet.oracle.lost_power("alpha")

    assert references_to_source(fleet.beta, "free", fleet.alpha.spec.address) == []
    assert differences(frozen, *fleet.describe_seen("beta", "free", "/data")) == []
    held = """
        [ "$(readlink /proc/1/cwd)" = /data/big ]; [ "$(cd /proc/1/cwd && ls | wc -l)" = 9 ]
        [ "$(readlink /proc/1/fd/3)" = /data/big/1 ]; [ "$(sha256sum < /proc/1/fd/3)" = "$(cat /data/big/1.sum)" ]
        grep -q /data/big/busybox.tool /proc/[0-9]*/maps
        echo written > /data/big/new; echo more >> /data/big/2; sha256sum < /data/big/2 > /data/big/2.sum
    """
    fleet.execute("beta", "free", held)
    assert started_at(fleet, "beta", "free") == began, "no second outage"

    fleet.beta.power_cut()
    fleet.oracle.lost_power("beta")
    fleet.beta.boot()
    fleet.oracle.resume("beta")
    fleet.wait_running("beta", "free", timeout_seconds=60)
    fleet.execute("beta", "free", CHECK + '[ "$(cat /data/big/new)" = written ]')
    assert any("(overlay)" in mount for mount in fleet.mounts("beta")), "mounts first, container second"
    fleet.control("free-1", "finalise")
    fleet.wait_for("free-1", "finalised", timeout_seconds=60)
    fleet.execute("beta", "free", CHECK + '[ "$(cat /data/big/new)" = written ]')
    fleet.alpha.boot()
    fleet.oracle.resume("alpha")
    assert not fleet.running("alpha", "free.cargo-free-1")


# --- afterwards -----------------------------------------------------------------------------------------


def test_after_finalising_it_is_an_ordinary_container_that_moves_on_and_comes_back(wide: Fleet) -> None:
    """Inspect, restart by hand, a reboot, a third host, and home again: the data is the same everywhere."""
    fleet = wide
    place = fleet.volume("alpha", "round")
    grown = grow(place / "grown", 5, entries=30)
    assert grown.odd
    fleet.at_end(
        lambda: [
            fleet.lab.host(h).run(["rm", "-rf", "--", VOLUME_PATH.format("round") + "/grown"], check=False)
            for h in ("alpha", "beta", "gamma")
        ]
    )
    plain = fleet.docker["alpha"].volumes.get("round").attrs
    fleet.sleeper("round", volumes={"round": {"bind": "/data"}}, restart_policy={"Name": "always"})
    [first] = fleet.describe("alpha", VOLUME_PATH.format("round"))
    for number, (here, there) in enumerate((("alpha", "beta"), ("beta", "gamma"), ("gamma", "alpha")), start=1):
        migration = f"round-{number}"
        fleet.wait_listed(here, "round")
        fleet.migrate(migration, "round", source=here, target=there, on_release="remove")
        fleet.control(migration, "finalise")
        fleet.wait_for(migration, "finalised", timeout_seconds=60)
        assert (fleet.mounts(there), fleet.tools(there), fleet.stages(there)) == ([], [], [])
        assert differences(first, *fleet.describe_seen(there, "round", "/data")) == []
        fleet.wait_policy(there, "round", "always")
        assert fleet.container(here, "round") is None
        assert not fleet.has_volume(here, "round")
        if number == 1:
            assert_ordinary(fleet, there, plain)
            assert differences(first, *fleet.describe_seen(there, "round", "/data")) == []
        fleet.assert_sound(migration)


def assert_ordinary(fleet: Fleet, host: str, plain: dict[str, object]) -> None:
    """Docker knows nothing special about it; it survives a restart by hand and a reboot, without any help."""
    volume = fleet.docker[host].volumes.get("round").attrs
    for field in ("Name", "Driver", "Mountpoint", "Options", "Scope"):
        assert volume[field] == plain[field]
    assert fleet.beta.run(["mountpoint", "-q", VOLUME_PATH.format("round")], check=False).returncode != 0
    fleet.present(host, "round").restart()
    fleet.wait_running(host, "round")
    fleet.beta.power_cut()
    fleet.oracle.lost_power(host)
    fleet.beta.boot(agents=False)
    fleet.oracle.resume(host)
    fleet.wait_running(host, "round", timeout_seconds=60)
    fleet.beta.hostd.start()


def test_a_container_that_still_stands_on_a_union_is_not_moved_again_before_it_is_folded(wide: Fleet) -> None:
    """F1: refused with a reason that says what to do; afterwards it moves."""
    fleet = wide
    federated(fleet, "twice")
    fleet.wait_end("twice-1", "completed")
    fleet.wait_listed("beta", "twice")
    fleet.request("twice-2", "twice", source="beta", target="gamma")
    end = fleet.wait_for("twice-2", "rejected", "completed", timeout_seconds=60)
    if isinstance(end.data, schema.Rejected):
        assert "finalise" in " ".join(end.data.reasons), told(fleet.events("twice-2"))
        fleet.execute("beta", "twice", CHECK)
        fleet.control("twice-1", "finalise")
        fleet.wait_for("twice-1", "finalised", timeout_seconds=60)
        fleet.wait_listed("beta", "twice")
        fleet.migrate("twice-3", "twice", source="beta", target="gamma")
    fleet.execute("gamma", "twice", CHECK)
