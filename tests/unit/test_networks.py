"""A container's networks on another host: found, created, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from events.errors import PermanentError
from hostd.networks import (
    create_body,
    creation_problems,
    definition,
    differing_subnets,
    existing_problems,
    network_names,
)

LABELS = {"cargo.migration": "web-1", "cargo.source": "alpha"}
FIXED = {"IPAMConfig": {"IPv4Address": "10.1.0.7"}}


def network(subnet: str = "10.1.0.0/24", gateway: str = "10.1.0.1", **more: Any) -> dict[str, Any]:
    """``docker network inspect``, as far as it matters."""
    entry = {"Subnet": subnet, "Gateway": gateway} if subnet else {}
    return {
        "Name": "web",
        "Id": "ab" * 32,
        "Scope": "local",
        "Driver": "bridge",
        "EnableIPv6": False,
        "IPAM": {"Driver": "default", "Options": None, "Config": [entry]},
        "Internal": True,
        "Attachable": False,
        "ConfigOnly": False,
        "Containers": {},
        "Options": {"com.docker.network.bridge.enable_icc": "false"},
        "Labels": {"team": "db", "cargo.migration": "an-earlier-one"},
        **more,
    }


def test_a_network_is_created_again_with_all_that_was_chosen_for_it_under_our_labels() -> None:
    assert create_body("web", definition(network()), None, LABELS) == {
        "Name": "web",
        "CheckDuplicate": True,
        "Driver": "bridge",
        "EnableIPv6": False,
        "Internal": True,
        "Attachable": False,
        "IPAM": {"Driver": "default", "Options": None, "Config": [{"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.1"}]},
        "Options": {"com.docker.network.bridge.enable_icc": "false"},
        "Labels": {"team": "db", **LABELS},
    }


@pytest.mark.parametrize(
    ("subnet", "gateway"),
    [("172.19.0.0/16", "172.19.0.1"), ("172.31.0.0/16", "172.31.0.1"), ("192.168.32.0/20", "192.168.32.1")],
)
def test_a_subnet_that_docker_picked_is_left_to_the_targets_docker(subnet: str, gateway: str) -> None:
    picked = network(subnet, gateway)
    assert create_body("web", definition(picked), None, {})["IPAM"]["Config"] == []
    assert list(creation_problems("web", definition(picked), None, {"other": picked})) == []
    [kept] = create_body("web", definition(picked), {"IPAMConfig": {"IPv4Address": "172.19.0.7"}}, {})["IPAM"]["Config"]
    assert kept["Subnet"] == subnet, "an address in it was chosen by a person"


@pytest.mark.parametrize(("subnet", "gateway"), [("172.19.0.0/24", "172.19.0.1"), ("172.19.0.0/16", "172.19.9.9")])
def test_a_subnet_that_a_person_chose_is_asked_for(subnet: str, gateway: str) -> None:
    [kept] = create_body("web", definition(network(subnet, gateway)), None, {})["IPAM"]["Config"]
    assert kept["Subnet"] == subnet


def test_a_subnet_that_overlaps_another_network_of_the_target_is_refused_by_name() -> None:
    [reason] = creation_problems("web", definition(network()), None, {"old": network("10.0.0.0/8")})
    assert "10.1.0.0/24 overlaps 10.0.0.0/8 of the network 'old'" in reason


def test_a_network_must_not_cover_the_addresses_by_which_the_hosts_reach_each_other() -> None:
    [reason] = creation_problems("web", definition(network()), None, {}, ("10.1.0.200", "host.example"))
    assert "10.1.0.200" in reason


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (None, "docker network create"),
        (network(Driver="macvlan"), "'macvlan'"),
        (network(ConfigOnly=True), "only bridge networks"),
        (network(IPAM={"Driver": "dhcp", "Config": None}), "'dhcp'"),
    ],
)
def test_what_a_migration_does_not_create_is_asked_of_a_person(wanted: dict[str, Any] | None, words: str) -> None:
    known = None if wanted is None else definition(wanted)
    [reason] = creation_problems("web", known, None, {})
    assert words in reason


def test_a_network_of_that_name_is_used_if_it_fits() -> None:
    wanted = definition(network())
    assert list(existing_problems("web", wanted, FIXED, network())) == []
    assert differing_subnets("web", wanted, network()) == []
    other = network("10.9.0.0/24")
    assert list(existing_problems("web", wanted, None, other)) == []
    [warning] = differing_subnets("web", wanted, other)
    assert "10.9.0.0/24" in warning


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (network(Driver="overlay"), "of the driver 'overlay'"),
        (network("10.9.0.0/24"), "10.1.0.7 is outside"),
        (network(Containers={"c": {"Name": "squatter", "IPv4Address": "10.1.0.7/24"}}), "'squatter'"),
    ],
)
def test_a_network_of_that_name_that_does_not_fit_is_refused(found: dict[str, Any], words: str) -> None:
    [reason] = existing_problems("web", definition(network()), FIXED, found)
    assert words in reason


def test_built_in_networks_are_on_every_host() -> None:
    assert network_names(["bridge", "web", "back"], "web") == ["back", "web"]
    assert network_names([], "host") == []
    assert network_names([], "web") == ["web"]


def test_a_definition_that_is_none_is_not_sent_to_docker() -> None:
    with pytest.raises(PermanentError):
        create_body("web", {"Driver": 7}, None, {})
