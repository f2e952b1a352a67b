"""The units on a booted Debian 12: ready, in the journal, and confined, alone and at work; stops, kills, boots.

The host ``delta`` is a virtual machine with a kernel and a systemd of its own, on which the packages are installed; the other
hosts are the lab's. Long, because the machine is emulated. What the units say as text is in tests/integration/test_packages.py,
every kind of work under their capabilities alone in test_services.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from debkit.__main__ import main as build_deb
from labkit.waiting import wait_until
from tests.e2e.conftest import Ground
from tests.support.fleet import Fleet, differences
from tests.support.guest_host import CHECK, MAKE_STALE
from tests.support.systemd_guest import COORDINATOR, SystemdHost, booted_debian
from tests.support.systemd_guest import NAME as DELTA
from tests.support.trees import grow

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(5400)]

SLOW_SECONDS = 900.0
AGENT, MOUNTS, LEADER = "cargo-hostd", "cargo-hostd-mounts", "cargo-coordinator"
EXPOSURE = {LEADER: 1.5, AGENT: 7.4, MOUNTS: 6.6}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as scripts/build-deb makes them."""
    output = tmp_path_factory.mktemp("packages")
    assert build_deb(["--quick", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def guest(ground: Ground, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdHost]:
    """The third host, its services enabled and started as the operator's guide says."""
    began = time.monotonic()
    with booted_debian(ground.lab, packages, tmp_path_factory.mktemp("delta")) as made:
        print(f"the guest was up after {time.monotonic() - began:.0f} s")
        made.run(["systemctl", "enable", "--now", AGENT, LEADER])
        yield made


def active(guest: SystemdHost, *units: str) -> bool:
    """Whether all of them run, or have run and remain."""
    return set(guest.run(["systemctl", "is-active", *units], check=False).split()) == {"active"}


def failpoints(fleet: Fleet, guest: SystemdHost, text: str) -> None:
    """As ``Fleet.failpoints``, for the agent on the guest."""
    key = fleet.keys.failpoints(f"hostd/{DELTA}")
    if not text:
        fleet.store.delete(key)
        return

    def taken() -> int:
        return sum(line.get("failpoints") == text for line in guest.told(AGENT))

    before = taken()
    fleet.store.put(key, text.encode())
    wait_until(lambda: taken() > before, f"{text} was not taken", 300)


def begin(fleet: Fleet, name: str, **options: Any) -> None:
    """A container on alpha whose stop is near: much of its data has changed since the last round."""
    (fleet.volume("alpha", name) / "calm").write_text("calm\n")
    fleet.sleeper(name, volumes={name: {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/alpha", "source.disarm_restart:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request(f"{name}-1", name, target=DELTA, **options)
    fleet.wait_step(
        "alpha.hostd", '"point": "source.disarm_restart:before_effect"', since, timeout_seconds=SLOW_SECONDS
    )
    fleet.execute("alpha", name, MAKE_STALE)


def federated(fleet: Fleet, guest: SystemdHost, name: str) -> None:
    """The same, running on the guest, with nothing of what had changed on its disk, nor on its way."""
    failpoints(fleet, guest, "target.fill_replica:before_effect=pause")
    begin(fleet, name)
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_for(f"{name}-1", "target_started", timeout_seconds=SLOW_SECONDS)
    wait_running(guest, name)


def wait_running(guest: SystemdHost, name: str) -> None:
    wait_until(lambda: guest.running(name), f"{name} does not run", SLOW_SECONDS)


def kill(guest: SystemdHost, unit: str) -> None:
    """Its main process; returns when systemd has started it again."""
    before = guest.show(unit)
    guest.run(["systemctl", "kill", "--kill-who=main", "--signal=KILL", unit])

    def again() -> bool:
        now = guest.show(unit)
        return now["ActiveState"] == "active" and now["MainPID"] not in ("0", before["MainPID"])

    wait_until(again, f"{unit} is not started again", SLOW_SECONDS)
    assert int(guest.show(unit)["NRestarts"]) == int(before["NRestarts"]) + 1


def removed_at_end(fleet: Fleet, guest: SystemdHost, name: str) -> None:
    """A container that a failing test leaves would be in the way of the others."""

    def undo() -> None:
        guest.run(["docker", "rm", "-f", name], check=False)

    fleet.at_end(undo)


def sibling(fleet: Fleet, guest: SystemdHost, name: str, volume: str) -> None:
    """A container that Docker itself starts again, beside the one that was moved; it notes what it sees at each start."""
    line = ["docker", "run", "-d", "--name", name, "--restart", "always", "-v", f"{volume}:/data"]
    script = "cd /data && echo $(ls) >> /seen; trap 'exit 0' TERM; sleep 100000 & wait"
    guest.run([*line, fleet.images["busybox"], "sh", "-c", script])
    removed_at_end(fleet, guest, name)


def seen(guest: SystemdHost, name: str) -> list[str]:
    """What it saw at each of its starts."""
    return guest.execute(name, "cat /seen").splitlines()


def finish(fleet: Fleet, guest: SystemdHost, name: str, beside: str = "") -> None:
    """To the end, a plain volume, and nothing of it left on the guest; the container beside it goes before that."""
    failpoints(fleet, guest, "")
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=SLOW_SECONDS)
    if beside:  # as long as anybody else uses a union, it is not folded
        guest.run(["docker", "rm", "-f", beside])
    fleet.control(f"{name}-1", "finalise")
    fleet.wait_for(f"{name}-1", "finalised", timeout_seconds=SLOW_SECONDS)
    assert guest.mounts() == []
    guest.execute(name, CHECK)
    fleet.assert_sound(f"{name}-1")


def remove(guest: SystemdHost, name: str) -> None:
    guest.run(["docker", "rm", "-f", name])
    guest.run(["docker", "volume", "rm", name])


def bounding(unit: str) -> set[str]:
    """The capabilities of a unit of packaging/systemd."""
    text = (Path(__file__).parents[2] / "packaging/systemd" / f"{unit}.service").read_text()
    [names] = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    return {name.lower() for name in names.split()}


def status(guest: SystemdHost, unit: str) -> dict[str, str]:
    """``/proc/<main process>/status``, and its mount namespace."""
    process = guest.show(unit)["MainPID"]
    said = guest.shell(f"cat /proc/{process}/status; echo mnt: $(readlink /proc/{process}/ns/mnt)")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in said.splitlines())}


# --- as they stand ---------------------------------------------------------------------------------------


def test_the_services_are_ready_confined_and_in_the_journal(guest: SystemdHost) -> None:
    """O13, A12: as systemd has them, not as the files say."""
    assert active(guest, AGENT, LEADER, "docker", "etcd")
    assert guest.run(["systemctl", "is-enabled", MOUNTS]).strip() == "enabled", "by the installation"
    assert guest.show(MOUNTS)["ConditionResult"] == "no", "there was nothing to mount"
    own = guest.run(["readlink", "/proc/1/ns/mnt"]).strip()

    agent, leader = status(guest, AGENT), status(guest, LEADER)
    assert agent["mnt"] == own, "Docker sees what it mounts"
    assert leader["mnt"] != own
    for confined in (agent, leader):
        assert (confined["NoNewPrivs"], confined["Seccomp"]) == ("1", "2")
    assert set(guest.show(AGENT)["CapabilityBoundingSet"].split()) == bounding(AGENT)
    assert int(leader["CapBnd"], 16) == int(leader["CapEff"], 16) == 0
    assert leader["Uid"].split()[0] == guest.run(["id", "-u", "cargo-coordinator"]).strip() != "0"

    for unit, name in ((AGENT, DELTA), (LEADER, COORDINATOR)):
        lines = [line for line in guest.journal(unit) if line.get("_TRANSPORT") == "stdout"]
        assert lines
        told = [json.loads(line["MESSAGE"]) for line in lines]
        assert all({"event", "level", "timestamp"} <= line.keys() for line in told)
        assert {line["_SYSTEMD_UNIT"] for line in lines} == {f"{unit}.service"}
        assert any(name in line.values() for line in told), told[:3]
        loud = [line["MESSAGE"] for line in lines if line["PRIORITY"] == "4"]
        assert any("NOT SECURED" in line for line in loud), "a warning is one for the journal, too"

    for unit, most in EXPOSURE.items():
        said = guest.run(["systemd-analyze", "security", "--no-pager", unit], check=False)
        [exposure] = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
        print(f"systemd-analyze security {unit}: {exposure}")
        assert float(exposure) <= most

    said = guest.run(["cargo-hostd", "check", "-c", "/etc/cargo/hostd.cfg"], check=False)
    assert said.endswith(f"host {DELTA}: ready\n"), said
    line = ["runuser", "-u", "cargo-coordinator", "--", LEADER, "check", "-c", "/etc/cargo/coordinator.cfg"]
    assert guest.run(line, check=False).endswith(f"coordinator {COORDINATOR}: ready\n")


def test_whole_migrations_pass_under_the_confinement_in_both_directions(fleet: Fleet, guest: SystemdHost) -> None:
    """P4, P14: every kind of file, the writable layer, the view by NFS and by sshfs; coordinated by the confined one, too."""
    fleet.lab.coordinator.stop()
    fleet.at_end(fleet.lab.coordinator.start)
    grow(fleet.volume("alpha", "dkinds") / "tree", 7, entries=60, depth=4)
    fleet.sleeper("dkinds", volumes={"dkinds": {"bind": "/data"}})
    fleet.execute("alpha", "dkinds", "echo layer > /etc/mine; chmod 4755 /etc/mine")
    [expected] = fleet.describe("alpha", "/var/lib/docker/volumes/dkinds/_data")
    guest.run(["modprobe", "--remove", "nfsv4", "nfs"])  # the check has asked for it, as after a boot nobody has
    assert "nfs4" not in guest.run(["cat", "/proc/filesystems"])
    fleet.request("dkinds-3", "dkinds", target=DELTA, strategy="postcopy", remote="nfs", on_release="remove")
    fleet.wait_end("dkinds-3", "completed", timeout_seconds=SLOW_SECONDS)
    assert {event.by for event in fleet.events("dkinds-3")} >= {f"coordinator/{COORDINATOR}", f"hostd/{DELTA}"}
    assert differences(expected, guest.describe_seen("dkinds", "/data")) == []
    assert guest.execute("dkinds", "cat /etc/mine; stat -c %a /etc/mine").split() == ["layer", "4755"]
    fleet.control("dkinds-3", "finalise")
    fleet.wait_for("dkinds-3", "finalised", timeout_seconds=SLOW_SECONDS)
    fleet.assert_sound("dkinds-3")

    guest.execute("dkinds", "echo there > /data/written")
    expected = guest.describe_seen("dkinds", "/data")
    fleet.request("dkinds-4", "dkinds", source=DELTA, target="alpha", on_release="remove")
    fleet.wait_end("dkinds-4", "completed", timeout_seconds=SLOW_SECONDS)
    assert differences(expected, *fleet.describe_seen("alpha", "dkinds", "/data")) == []
    assert fleet.execute("alpha", "dkinds", "cat /etc/mine /data/written").split() == ["layer", "there"]
    fleet.control("dkinds-4", "finalise")
    fleet.wait_for("dkinds-4", "finalised", timeout_seconds=SLOW_SECONDS)
    fleet.assert_sound("dkinds-4")
    assert guest.mounts() == []
    wrong = [line for line in [*guest.told(AGENT), *guest.told(LEADER)] if line["level"] in ("error", "critical")]
    assert wrong == []


# --- stops and falls ---------------------------------------------------------------------------------------


def test_a_stop_in_the_middle_of_a_round_is_clean_and_the_migration_goes_on_afterwards(
    fleet: Fleet, guest: SystemdHost
) -> None:
    """A3: also of both services when they are killed; systemd brings them back."""
    place = fleet.volume("alpha", "dround")
    (place / "large").write_bytes(os.urandom(24 * 1024 * 1024))
    fleet.sleeper("dround", volumes={"dround": {"bind": "/data"}})
    fleet.request("dround-1", "dround", target=DELTA, bwlimit_kib=150)

    def copying() -> bool:
        said = guest.run(["pgrep", "-a", "-x", "rsync"], check=False)
        return bool(said) and "--server" not in said

    fleet.wait_for("dround-1", "sync_armed", timeout_seconds=SLOW_SECONDS)  # the image, too, is brought by rsync
    wait_until(copying, "no round is under way", SLOW_SECONDS)
    line = ["docker", "run", "-d", "--name", "dbeside", "-v", "/:/host:ro"]
    guest.run([*line, fleet.images["busybox"], "sleep", "100000"])
    removed_at_end(fleet, guest, "dbeside")
    began = time.monotonic()
    guest.run(["systemctl", "stop", AGENT])
    print(f"the agent was stopped within {time.monotonic() - began:.1f} s, a round under way")
    shown = guest.show(AGENT)
    assert (shown["ActiveState"], shown["Result"], shown["ExecMainStatus"]) == ("inactive", "success", "0")
    assert guest.run(["pgrep", "-a", "-x", "rsync"], check=False) == ""
    left = guest.run(["pgrep", "-af", "hostd"], check=False)
    assert "hostd.lower" not in left
    assert "cargo-hostd -c" not in left
    assert guest.running("dbeside")

    guest.run(["systemctl", "start", AGENT])
    wait_until(copying, "the round does not begin again", SLOW_SECONDS)
    for unit in (AGENT, LEADER):
        kill(guest, unit)
    fleet.control("dround-1", {"control": "bwlimit", "kib": 0})
    fleet.wait_end("dround-1", "completed", timeout_seconds=SLOW_SECONDS)
    fleet.control("dround-1", "finalise")
    fleet.wait_for("dround-1", "finalised", timeout_seconds=SLOW_SECONDS)
    assert guest.running("dbeside")
    fleet.assert_sound("dround-1")
    remove(guest, "dround")


def test_what_serves_a_running_container_outlives_the_agent(fleet: Fleet, guest: SystemdHost) -> None:
    """A3, A12: a stopped agent, then a killed one, then Docker restarted: the data is there all the time."""
    federated(fleet, guest, "dserve")
    sibling(fleet, guest, "dserved", "dserve")
    guest.run(["systemctl", "stop", AGENT])
    shown = guest.show(AGENT)
    assert (shown["ActiveState"], shown["Result"], shown["ExecMainStatus"]) == ("inactive", "success", "0")
    assert guest.running("dserve")
    guest.execute("dserve", '[ "$(sha256sum < /data/big/1)" = "$(cat /data/big/1.sum)" ]')
    guest.run(["systemctl", "start", AGENT])
    kill(guest, AGENT)
    guest.execute("dserve", '[ "$(sha256sum < /data/big/2)" = "$(cat /data/big/2.sum)" ]')

    before = guest.show(AGENT)["MainPID"]
    guest.run(["systemctl", "restart", "docker"])
    assert guest.show(AGENT)["MainPID"] == before, "a restart of Docker does not restart the agent"
    wait_running(guest, "dserved")
    wait_running(guest, "dserve")
    assert guest.show(MOUNTS)["ConditionResult"] == "no", "Docker asks once more: now they are the agent's"
    assert seen(guest, "dserved") == ["big calm", "big calm"]
    guest.execute("dserve", CHECK)
    finish(fleet, guest, "dserve", beside="dserved")
    remove(guest, "dserve")


# --- boots ---------------------------------------------------------------------------------------------


def in_order(guest: SystemdHost) -> None:
    """What this boot did first."""
    units = {unit: guest.show(unit) for unit in (MOUNTS, "docker", AGENT, "etcd", LEADER)}
    for first, then in ((MOUNTS, "docker"), ("docker", AGENT), (MOUNTS, AGENT), ("etcd", LEADER)):
        ready = int(units[first]["ActiveEnterTimestampMonotonic"])
        assert 0 < ready <= int(units[then]["ExecMainStartTimestampMonotonic"]), f"{then} did not wait for {first}"


def test_after_a_reboot_in_the_middle_of_a_fill_no_container_finds_an_empty_place(
    fleet: Fleet, guest: SystemdHost
) -> None:
    """A10, A11, A16: once in good order, once by a loss of power; the agent brings the moved container back."""
    federated(fleet, guest, "dboot")
    guest.execute("dboot", "echo mine > /data/written; sync")
    sibling(fleet, guest, "dbooted", "dboot")
    assert seen(guest, "dbooted") == ["big calm written"]

    since = guest.run(["date", "+@%s"]).strip()
    went_down = guest.reboot()
    print(f"the guest went down within {went_down:.0f} s")
    in_order(guest)
    wait_running(guest, "dbooted")
    assert seen(guest, "dbooted") == ["big calm written"] * 2
    mounted = [line for line in guest.told(MOUNTS) if line["event"] == "mounted again"]
    assert [line["place"] for line in mounted] == ["/var/lib/docker/volumes/dboot/_data"]
    left = [
        "journalctl",
        "--no-pager",
        "-o",
        "cat",
        "-b",
        "-1",
        "-u",
        AGENT,
        "--since",
        since,
        "-g",
        "Failed|timed out|Killing",
    ]
    assert guest.run(left, check=False) in ("", "-- No entries --\n"), "it did not go down in good order"
    wait_running(guest, "dboot")
    guest.execute("dboot", CHECK + '[ "$(cat /data/written)" = mine ]')

    guest.run(["sync"])
    guest.cut_power()
    guest.power_on()
    in_order(guest)
    wait_running(guest, "dbooted")
    assert seen(guest, "dbooted") == ["big calm written"] * 3
    wait_running(guest, "dboot")
    finish(fleet, guest, "dboot", beside="dbooted")
    guest.execute("dboot", '[ "$(cat /data/written)" = mine ]')
    remove(guest, "dboot")
