"""A fleet with TLS, roles and signed events, whose hosts joined by tokens: it moves containers, and lets a host go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from events.connecting import connect
from events.errors import StoreUnavailableError
from events.permissions import base
from events.settings import EtcdSettings
from events.store import Store
from hostd.pins import LOOK_SECONDS
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

    for kept in ("trust", "ssh/id_ed25519", "ssh/id_ed25519.pub"):
        place = alpha.path(f"/etc/cargo/{kept}")
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    operator.join(fleet.lab.spec, alpha)
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
