"""P15: what a host's key opens on the other hosts, before, during and after a migration."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from labkit.trust import SSH_DIRECTORY
from labkit.waiting import wait_until
from tests.support.fleet import VOLUMES, Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

TREE = f"{VOLUMES}/gated-data/_data"
DIRECTORY = "/var/lib/cargo/migrations"


class Intruder:
    """Somebody with root on ``host``, and so with its key, who wants something of ``victim``."""

    def __init__(self, fleet: Fleet, host: str, victim: str) -> None:
        self.fleet, self.host, self.victim = fleet, fleet.lab.host(host), fleet.lab.host(victim)
        options = ("BatchMode=yes", f"UserKnownHostsFile={SSH_DIRECTORY}/known_hosts", "StrictHostKeyChecking=yes")
        self.ssh = ["ssh", "-i", f"{SSH_DIRECTORY}/id_ed25519", *(word for text in options for word in ("-o", text))]
        self.there = f"root@{self.victim.spec.address}"

    def run(self, *line: str) -> subprocess.CompletedProcess[str]:
        return self.host.run(list(line), check=False, timeout_seconds=30)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.ssh, self.there, *words)

    def rsync(self, path: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            "rsync", "-e", " ".join(self.ssh), "--secluded-args", "-r", "--list-only", f"{self.there}:{path}"
        )

    def sftp_opens(self) -> bool:
        """Whether an SFTP server answers."""
        line = ["sftp", "-q", "-b", "/dev/stdin", *self.ssh[1:], self.there]
        return self.run("sh", "-c", f"echo pwd | {' '.join(line)}").returncode == 0

    def assert_opens_nothing(self, *paths: str) -> None:
        for path in paths:
            done = self.rsync(path)
            assert done.returncode != 0 and "cargo-gate on" in done.stderr, (path, done)
        assert not self.sftp_opens()
        done = self.command("id")
        assert done.returncode != 0 and "is nothing that a migration needs" in done.stderr, done
        assert "opens no shell" in self.command().stderr


def test_a_hosts_key_opens_what_its_migration_needs_and_nothing_once_it_has_ended(fleet: Fleet) -> None:
    """P15, P11: the grant ends with the phase, in both directions, and survives the agent's death in between."""
    (fleet.volume("alpha", "gated-data") / "file").write_text("data")
    fleet.volume("alpha", "gated-other")
    from_beta, from_alpha = Intruder(fleet, "beta", "alpha"), Intruder(fleet, "alpha", "beta")
    other = f"{VOLUMES}/gated-other/_data/"
    own = f"{DIRECTORY}/gated-1/spec.json"
    fleet.sleeper("gated", volumes={"gated-data": {"bind": "/data"}})
    from_beta.assert_opens_nothing(f"{TREE}/", other, own, "/etc/")

    fleet.failpoints("hostd/beta", "target.fill_replica:before_effect=pause")
    fleet.request("gated-1", "gated", strategy="postcopy")
    fleet.wait_for("gated-1", "target_started")
    assert fleet.grants("alpha") == ["beta/gated-1"]
    assert fleet.grants("beta") == []
    assert "file" in from_beta.rsync(f"{TREE}/").stdout
    assert "spec.json" in from_beta.rsync(own).stdout
    assert from_beta.sftp_opens()
    for path in (other, "/etc/", f"{TREE}/../", f"{DIRECTORY}/gated-1/", "/"):
        assert "cargo-gate on alpha: refused" in from_beta.rsync(path).stderr, path
    assert "is nothing that a migration needs" in from_beta.command("id").stderr
    from_alpha.assert_opens_nothing(f"{TREE}/", f"{DIRECTORY}/gated-1/spec.json")

    alpha = fleet.lab.host("alpha")
    alpha.hostd.kill()
    assert "file" in from_beta.rsync(f"{TREE}/").stdout, "what is in progress does not depend on the agent's life"
    alpha.hostd.start()
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("gated-1", "completed")
    assert fleet.grants("alpha") == []
    from_beta.assert_opens_nothing(f"{TREE}/", other, own, "/etc/")
    from_alpha.assert_opens_nothing(f"{TREE}/", other)
    refused = [json.loads(line) for line in refusals(fleet, "alpha")]
    assert {"beta"} == {record["peer"] for record in refused}
    assert any(record["reason"].endswith("/etc/") for record in refused)
    fleet.wait_step("alpha.hostd", "refused by the SSH gate", 0)

    fleet.control("gated-1", "rollback")
    fleet.wait_end("gated-1", "rolled_back")
    admitted = [json.loads(line) for line in (gate(fleet, "beta") / "admitted").read_text().splitlines()]
    assert [record["migration"] for record in admitted if record["peer"] == "alpha"][-1:] == ["gated-1"]
    wait_until(lambda: not fleet.grants("beta") and not fleet.grants("alpha"), "a grant outlives its migration", 10)
    from_alpha.assert_opens_nothing(f"{TREE}/", other)
    from_beta.assert_opens_nothing(f"{TREE}/", own)


def gate(fleet: Fleet, host: str) -> Path:
    return fleet.lab.host(host).path("/var/lib/cargo/gate")


def refusals(fleet: Fleet, host: str) -> list[str]:
    return (gate(fleet, host) / "refused").read_text().splitlines()
