"""A fleet with TLS, roles and signed events, whose hosts joined by tokens: it moves containers, and lets a host go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from events.connecting import connect
from events.errors import StoreUnavailableError
from events.permissions import base
from events.settings import EtcdSettings
from events.store import Store
from hostd.pins import LOOK_SECONDS
from hostd.renewal import LOOK_SECONDS as RENEWAL_SECONDS
from labkit import Lab
from labkit import fleet as operator
from labkit.waiting import wait_until
from tests.e2e.conftest import NAME, SUBNET
from tests.support.fleet import Fleet, bring_up

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

REVOKED_SECONDS = 20.0
"""The coordinator looks around every five seconds; a loaded machine takes its time."""


@pytest.fixture(scope="module")
def secured() -> Iterator[tuple[Lab, dict[str, str]]]:
    """A lab of its own beside the usual one, in the network beside it."""
    first, second, third = SUBNET.split(".")
    name = f"{NAME[:8]}s"
    Lab(name).down()
    lab = Lab(name, f"{first}.{int(second) + 1}.{third}", secure=True)
    try:
        yield lab, bring_up(lab)
    finally:
        Lab(name).down()


@pytest.fixture
def fleet(secured: tuple[Lab, dict[str, str]]) -> Iterator[Fleet]:
    made = Fleet(*secured)
    yield made
    made.close()


def stolen(fleet: Fleet, host: str) -> Store:
    """A client with what lies on the host's disk."""
    trust = fleet.lab.host(host).path("/etc/cargo/trust")
    endpoints = tuple(fleet.lab.etcd.endpoints.split(","))
    return connect(EtcdSettings(endpoints, ca=trust / "ca.crt", cert=trust / "etcd.crt", key=trust / "etcd.key"))


def permissions_beyond_base(fleet: Fleet, host: str) -> list[str]:
    """Keys that the host may touch beside its own."""
    from events.etcd import EtcdStore  # noqa: PLC0415
    from events.etcd_users import EtcdUsers  # noqa: PLC0415

    assert isinstance(fleet.store, EtcdStore)
    assert fleet.store.trust is not None
    member = fleet.store.trust.members()[f"hostd/{host}"]
    return [one.key for one in EtcdUsers(fleet.store).permissions(member.user) - base(fleet.keys, host)]


def test_a_container_moves_in_a_secured_fleet_and_a_host_leaves_it(fleet: Fleet) -> None:
    """P15, B14: tokens, roles and signatures all the way; rights that end; and a removal that withdraws everything."""
    data = fleet.volume("alpha", "safe")
    (data / "file").write_text("kept")
    fleet.sleeper("safe", volumes={"safe": {"bind": "/data", "mode": "rw"}})
    fleet.request("safe-1", "safe", on_release="remove")
    fleet.wait_for("safe-1", "prepare_ordered")
    assert fleet.keys.migration("safe-1") in permissions_beyond_base(fleet, "beta")
    fleet.wait_end("safe-1", "completed")
    events = fleet.wait_end("safe-1", "finalised")
    assert all(event.signature for event in events)
    assert {event.by for event in events} == {"coordinator/c1", "hostd/alpha", "hostd/beta"}
    assert fleet.execute("beta", "safe", "cat /data/file") == "kept"
    said = fleet.cargoctl("verify", "safe-1")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "NOT SECURED" not in said.stderr

    for host in ("alpha", "beta"):
        wait_until(lambda host=host: not permissions_beyond_base(fleet, host), f"{host} keeps rights", REVOKED_SECONDS)
    fleet.assert_sound("safe-1")

    alpha, beta = fleet.lab.host("alpha"), fleet.lab.host("beta")
    authorized, known = beta.path("/etc/cargo/ssh/authorized_keys"), beta.path("/etc/cargo/ssh/known_hosts")
    assert "\nalpha " in known.read_text()
    assert "--peer alpha " in authorized.read_text()
    thief = stolen(fleet, "alpha")
    assert thief.get(fleet.keys.host("alpha")) is not None
    alpha.hostd.stop()
    operator.cargoctl(fleet.lab.spec, "remove", "alpha")
    with pytest.raises(StoreUnavailableError):
        thief.get(fleet.keys.host("alpha"))
    thief.close()
    wait_until(
        lambda: "alpha" not in known.read_text() + authorized.read_text(), "beta still pins alpha", 4 * LOOK_SECONDS
    )
    said = fleet.cargoctl("verify", "safe-1")
    assert said.returncode == 0, "what a removed host has said stays proven: " + said.stdout

    join_anew(fleet, "alpha")
    alpha.hostd.start()
    wait_until(
        lambda: "--peer alpha " in authorized.read_text() and "\nalpha " in known.read_text(),
        "beta does not let the new alpha in",
        4 * LOOK_SECONDS,
    )
    fleet.wait_listed("beta", "safe")
    events = fleet.migrate("safe-2", "safe", source="beta", target="alpha")
    assert fleet.execute("alpha", "safe", "cat /data/file") == "kept"
    fleet.assert_sound("safe-2")


def busy(fleet: Fleet, name: str) -> None:
    """A migration ``NAME-1`` from alpha to beta whose first round takes longer than anything that is done to it."""
    (fleet.volume("alpha", name) / "large").write_bytes(os.urandom(24 << 20))
    fleet.sleeper(name, volumes={name: {"bind": "/data", "mode": "rw"}})
    fleet.request(f"{name}-1", name, bwlimit_kib=256)
    fleet.wait_for(f"{name}-1", "sync_armed")
    wait_until(lambda: sending(fleet), "nothing is transferred", 20)


def sending(fleet: Fleet) -> bool:
    """Whether alpha's gate serves anybody."""
    return any("--sender" in line for line in fleet.tools("alpha"))


def join_anew(fleet: Fleet, name: str) -> None:
    """A host that was removed comes back, with new keys."""
    host = fleet.lab.host(name)
    for old in ("trust", "ssh/id_ed25519", "ssh/id_ed25519.pub"):
        place = host.path(f"/etc/cargo/{old}")
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    operator.join(fleet.lab.spec, host)


def test_all_certificates_are_renewed_in_the_middle_of_a_migration(fleet: Fleet) -> None:
    """B14: nothing is restarted, but etcd, which shows that everybody comes back with what is new."""
    busy(fleet, "renew")
    hosts, spec = [fleet.lab.host(name) for name in ("alpha", "beta")], fleet.lab.spec
    files = [host.path("/etc/cargo/trust/etcd.crt") for host in hosts]
    before = [file.read_bytes() for file in files]
    pids = [host.hostd.pid for host in hosts] + [fleet.lab.coordinator.pid]
    said = operator.cargoctl(spec, "renew", "alpha", "beta", "etcd", "operator", f"coordinator/{operator.COORDINATOR}")
    assert set(said["renewed"]) == {"hostd/alpha", "hostd/beta", "etcd", "operator", "coordinator/c1"}
    wait_until(
        lambda: all(file.read_bytes() != old for file, old in zip(files, before, strict=True)),
        "the hosts do not fetch their certificates",
        4 * RENEWAL_SECONDS,
    )
    fleet.lab.etcd.kill()
    fleet.lab.etcd.start()
    assert sending(fleet)
    fleet.control("renew-1", {"control": "bwlimit", "kib": 0})
    fleet.wait_end("renew-1", "completed")
    assert [host.hostd.pid for host in hosts] + [fleet.lab.coordinator.pid] == pids
    told = hosts[0].run(
        [hosts[0].python, "-m", "hostd.main", "check", "--json", "-c", "/etc/cargo/hostd.cfg"],
        env={"PYTHONPATH": hosts[0].python_path},
        check=False,
    )
    levels = {found["about"]: found["level"] for found in json.loads(told.stdout)["findings"]}
    assert [levels[about] for about in ("certificate", "authority", "etcd-certificate")] == ["ok"] * 3
    fleet.wait_end("renew-1", "finalised")
    fleet.assert_sound("renew-1")


def test_a_host_that_is_removed_in_the_middle_of_a_transfer_loses_everything_at_once(fleet: Fleet) -> None:
    """P15: its user, what it may ask for by SSH, and what it was admitted to before; the container stays where it is."""
    busy(fleet, "gone")
    thief = stolen(fleet, "beta")
    assert thief.get(fleet.keys.host("beta")) is not None
    assert fleet.grants("alpha", "gone-1")
    fleet.lab.host("beta").hostd.stop()  # by now it is somebody else's, who goes on with its connections
    pulling = fleet.lab.host("beta").popen(
        ["ssh", "-F", "none", "-i", "/etc/cargo/ssh/id_ed25519", "-o", "UserKnownHostsFile=/etc/cargo/ssh/known_hosts",
         "-o", "HostKeyAlias=alpha", "-s", f"root@{fleet.lab.host('alpha').spec.address}", "sftp"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert pulling.stdin is not None and pulling.stdout is not None
        pulling.stdin.write(bytes([0, 0, 0, 5, 1, 0, 0, 0, 3]))  # SSH_FXP_INIT, version 3
        pulling.stdin.flush()
        assert pulling.stdout.read(5)[4] == 2, "the view is open"
        assert operator.cargoctl(fleet.lab.spec, "remove", "beta", "--force")["under_way"] == ["gone-1"]
        with pytest.raises(StoreUnavailableError):
            thief.get(fleet.keys.host("beta"))
        wait_until(lambda: not fleet.grants("alpha", "gone-1"), "alpha still admits beta", 4 * LOOK_SECONDS)
        assert pulling.wait(10) != 0, "what was admitted before has ended"
    finally:
        pulling.kill()
        thief.close()
    assert fleet.running("alpha", "gone")
    assert "gone-1" in fleet.cargoctl("why", "gone-1").stdout

    join_anew(fleet, "beta")
    fleet.lab.host("beta").hostd.start()
    fleet.control("gone-1", "abort")
    fleet.wait_end("gone-1", "aborted")
    assert fleet.running("alpha", "gone")
    fleet.assert_sound("gone-1")
    fleet.migrate("gone-2", "gone")  # who has joined is let in, and need not wait until somebody looks
    fleet.assert_sound("gone-2")
