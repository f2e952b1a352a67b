"""What packages and units promise, on hosts that work: the check, the order of a boot, and the confinement."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkit import Host
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.fleet import ON_A_UNION, Fleet, differences
from tests.support.trees import grow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

CONFIG = "/etc/cargo/hostd.cfg"
PATIENT = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
"""Does nothing, and stops at once."""
UNITS = REPOSITORY / "packaging" / "systemd"


def hostd(host: Host, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``cargo-hostd COMMAND`` on a host."""
    line = [host.python, "-m", "hostd.main", command, "-c", CONFIG, *arguments]
    return host.run(line, check=False, env={"PYTHONPATH": host.python_path}, cwd=str(REPOSITORY))


def checked(said: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the findings by what they are about."""
    assert said.stdout, said.stderr
    return said.returncode, {found["about"]: found for found in json.loads(said.stdout)["findings"]}


# --- the check -----------------------------------------------------------------------------------------


def test_a_host_of_the_lab_is_ready_and_says_what_it_lacks_when_something_is_taken_away(fleet: Fleet) -> None:
    """O13 among the things looked at: Docker sees what is mounted."""
    files = set(fleet.alpha.path("/var/lib/docker").iterdir())
    code, found = checked(hostd(fleet.alpha, "check", "--json"))
    assert code == 0, found
    for about in (
        "kernel",
        "docker",
        "mount-namespace",
        "union",
        "sshd",
        "ssh-key",
        "etcd",
        "clock",
        "etcd-write",
        "peer",
    ):
        assert found[about]["level"] == "ok", found[about]
    assert set(fleet.alpha.path("/var/lib/docker").iterdir()) == files, "looking leaves nothing"

    fleet.alpha.sshd.kill()
    try:
        code, found = checked(hostd(fleet.alpha, "check", "--json"))
        assert (code, found["sshd"]["level"]) == (1, "problem")
        assert "openssh-server" in found["sshd"]["remedy"]
        code, found = checked(hostd(fleet.beta, "check", "--json"))
        assert (code, found["peer"]["level"]) == (0, "advice"), "another host's trouble makes this one no less fit"
        assert "alpha" in found["peer"]["says"]
    finally:
        fleet.alpha.sshd.start()
    words = hostd(fleet.alpha, "check")
    assert words.returncode == 0
    assert words.stdout.endswith("host alpha: ready\n")


def test_a_coordinator_is_told_whether_its_bus_is_fit(fleet: Fleet, tmp_path: Path) -> None:
    config = tmp_path / "c.cfg"

    def check(endpoints: str) -> tuple[int, dict[str, dict[str, Any]]]:
        config.write_text(f"[coordinator]\nname = c9\n[etcd]\nendpoints = {endpoints}\n")
        line = [sys.executable, "-m", "coordinator.main", "check", "--json", "-c", str(config)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return checked(subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False))

    before = fleet.store.revision()
    code, found = check(fleet.lab.etcd.endpoints)
    assert code == 0, found
    assert found["etcd-members"]["level"] == "advice"
    assert fleet.store.get(fleet.keys.leader) is not None, "the one that leads is not disturbed"
    assert all(found[about]["level"] == "ok" for about in ("etcd", "etcd-version", "etcd-read", "etcd-write"))
    assert fleet.store.revision() >= before
    code, found = check("127.0.0.1:1")
    assert (code, found["etcd"]["level"]) == (1, "problem")


def remove(fleet: Fleet, name: str) -> None:
    """From beta, if it is there."""
    found = fleet.container("beta", name)
    if found is not None:
        found.remove(force=True)


# --- the order of a boot -------------------------------------------------------------------------------


def test_after_a_reboot_the_data_is_there_before_docker_starts_a_container(fleet: Fleet) -> None:
    """A11: a container that shares the volume, and that Docker starts by itself, never sees the empty place below it."""
    (fleet.volume("alpha", "first") / "calm").write_text("calm\n")
    fleet.run("first", command=PATIENT, volumes={"first": {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/alpha", "source.disarm_restart:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request("first-1", "first", **ON_A_UNION)
    fleet.wait_step("alpha.hostd", '"point": "source.disarm_restart:before_effect"', since)
    fleet.execute(
        "alpha", "first", "head -c 3000000 /dev/urandom > /data/late; sha256sum < /data/late > /data/late.sum"
    )
    fleet.failpoints("hostd/beta", "target.fill_replica:before_effect=pause")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_for("first-1", "target_started")
    fleet.execute("beta", "first", "echo mine > /data/written")
    beside = fleet.docker["beta"].containers.run(
        fleet.images["busybox"], ["sh", "-c", "ls /data > /seen; exec sleep 100000"], name="beside", detach=True,
        volumes={"first": {"bind": "/data"}}, restart_policy={"Name": "always"},
    )  # fmt: skip
    fleet.at_end(lambda: remove(fleet, "beside"))

    fleet.beta.power_cut()
    fleet.oracle.lost_power("beta")
    fleet.beta.power_on()
    mounted = hostd(fleet.beta, "mounts")
    assert mounted.returncode == 0, mounted.stderr
    assert "mounted again" in mounted.stderr
    fleet.beta.start_services()
    fleet.oracle.resume("beta")
    wait_until(lambda: fleet.running("beta", "beside"), "Docker does not start it", 20)
    beside.reload()
    assert fleet.execute("beta", "beside", "cat /seen").split() == ["calm", "late", "late.sum", "written"]
    assert not fleet.running("beta", "first"), "its own start is for the agent, which the history tells what is true"

    fleet.failpoints("hostd/beta", "")
    fleet.beta.hostd.start()
    fleet.wait_running("beta", "first", timeout_seconds=60)
    fleet.execute("beta", "first", '[ "$(sha256sum < /data/late)" = "$(cat /data/late.sum)" ]')
    fleet.wait_end("first-1", "completed", timeout_seconds=60)
    assert fleet.execute("beta", "beside", "cat /data/written") == "mine\n"
    remove(fleet, "beside")
    fleet.control("first-1", "finalise")
    fleet.wait_for("first-1", "finalised", timeout_seconds=60)
    assert hostd(fleet.beta, "mounts").stderr.strip() == "", "what is plain again is left alone"
    fleet.assert_sound("first-1")


# --- confinement ---------------------------------------------------------------------------------------


def confined(unit: str) -> list[str]:
    """The unit's capabilities, and its refusal of more, for a process that systemd does not start."""
    text = (UNITS / unit).read_text()
    [names] = re.findall(r"^CapabilityBoundingSet=(.+)$", text, re.MULTILINE)
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in names.split())
    assert "\nNoNewPrivileges=yes\n" in text
    return ["setpriv", "--no-new-privs", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--"]


def test_the_agents_do_all_their_work_within_the_capabilities_of_their_unit(fleet: Fleet) -> None:
    """Every kind of file, the writable layer, a union with something to fill, finalise, a roll back: nothing needs more."""
    plain = {host: list(host.hostd.argv) for host in (fleet.alpha, fleet.beta)}

    def restart(prefix: list[str]) -> None:
        for host, argv in plain.items():
            host.hostd.stop(10)
            host.hostd.argv[:] = [*prefix, *argv]
            host.hostd.start()

    fleet.at_end(lambda: restart([]))
    restart(confined("cargo-hostd.service"))
    for host in plain:
        [bounding] = re.findall(r"CapBnd:\s*(\w+)", Path(f"/proc/{host.hostd.pid}/status").read_text())
        assert not int(bounding, 16) & (1 << 16 | 1 << 25), "neither modules nor the clock"

    grow(fleet.volume("alpha", "kinds") / "tree", 7, entries=60, depth=4)
    fleet.run("kinds", command=PATIENT, volumes={"kinds": {"bind": "/data"}})
    fleet.execute("alpha", "kinds", "echo layer > /etc/mine; chmod 4755 /etc/mine")
    expected = fleet.describe("alpha", "/var/lib/docker/volumes/kinds/_data")
    fleet.migrate("kinds-1", "kinds", strategy="postcopy")
    assert differences(*expected, *fleet.describe_seen("beta", "kinds", "/data")) == []
    assert fleet.execute("beta", "kinds", "cat /etc/mine; stat -c %a /etc/mine").split() == ["layer", "4755"]
    fleet.control("kinds-1", "finalise")
    fleet.wait_for("kinds-1", "finalised", timeout_seconds=60)
    fleet.assert_sound("kinds-1")

    (fleet.volume("alpha", "back") / "calm").write_text("calm\n")
    fleet.run("back", command=PATIENT, volumes={"back": {"bind": "/data"}})
    fleet.migrate("back-1", "back")
    fleet.execute("beta", "back", "echo written there > /data/new")
    fleet.control("back-1", "rollback")
    fleet.wait_for("back-1", "rolled_back", timeout_seconds=60)
    assert fleet.execute("alpha", "back", "cat /data/new") == "written there\n"
