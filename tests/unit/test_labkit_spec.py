"""Names, addresses and files that follow from what a lab is."""

from __future__ import annotations

import configparser
import tempfile
from pathlib import Path

import pytest

from labkit.errors import LabError
from labkit.network import Cut, cut_rules, hardware_address
from labkit.spec import HostSpec, LabSpec, load_spec, make_hosts, with_described
from labkit.trust import coordinator_config, hostd_config, without_locked_root


def spec(root: Path = Path("/var/lib/cargo-lab/demo"), name: str = "demo", **more: object) -> LabSpec:
    fields: dict[str, object] = {"subnet": "10.77.0", "hosts": make_hosts(("alpha", "beta"), "10.77.0")}
    return LabSpec(name=name, root=root, **(fields | more))  # type: ignore[arg-type]


def test_hosts_get_the_addresses_after_the_gateway() -> None:
    made = spec()
    assert made.gateway == "10.77.0.1"
    assert [(host.name, host.address, host.root) for host in made.hosts] == [
        ("alpha", "10.77.0.2", "/"),
        ("beta", "10.77.0.3", "/"),
    ]


def test_a_host_can_be_given_a_root_tree_and_options_for_its_docker() -> None:
    hosts = make_hosts(("alpha", "gamma=debian13,containerd", "delta=liverestore"), "10.77.0")
    assert [(host.name, host.root, host.containerd, host.liverestore) for host in hosts] == [
        ("alpha", "/", False, False),
        ("gamma", "debian13", True, False),
        ("delta", "/", False, True),
    ]


@pytest.mark.parametrize("words", ["gamma=debian12", "gamma=x", "gamma= debian13", "=debian13"])
def test_an_option_of_a_host_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(LabError):
        make_hosts((words,), "10.77.0")


def test_describing_a_host_describes_one_that_is_there_or_adds_it() -> None:
    assert with_described(("alpha", "beta"), ["beta=containerd", "gamma=debian13"]) == [
        "alpha",
        "beta=containerd",
        "gamma=debian13",
    ]
    assert with_described(("alpha",), []) == ["alpha"]


def test_the_state_file_keeps_what_a_host_is(tmp_path: Path) -> None:
    made = spec(tmp_path, hosts=make_hosts(("alpha", "gamma=debian13,containerd,liverestore"), "10.77.0"))
    made.save()
    assert load_spec(tmp_path) == made


def test_the_interface_name_of_the_longest_lab_name_fits_the_kernel() -> None:
    assert len(spec(name="abcdefgh9").prefix) <= 15


@pytest.mark.parametrize("name", ["", "Demo", "de-mo", "demo/..", "1demo", "toolongname", "a b"])
def test_a_name_that_could_not_work_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="is no name for a lab"):
        spec(name=name)


@pytest.mark.parametrize("subnet", ["10.77", "10.77.0.0", "10.77.256", "a.b.c", "10.77.0/24", ""])
def test_a_subnet_that_is_none_is_refused(subnet: str) -> None:
    with pytest.raises(LabError, match="is no subnet"):
        spec(subnet=subnet)


@pytest.mark.parametrize("name", ["etcd", "outside", "br0", "al pha", "-x", "../x", ""])
def test_a_host_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="is no name for a lab host"):
        HostSpec(name, "10.77.0.2")


@pytest.mark.parametrize("root", ["relative", "/with space", "/a/../b", "/a,b", "/" + "x" * 90])
def test_a_directory_that_mounts_or_sockets_cannot_use_is_refused(root: str) -> None:
    with pytest.raises(LabError, match="the lab's directory"):
        spec(root=Path(root))


def test_a_host_may_not_appear_twice() -> None:
    with pytest.raises(LabError, match="each name once"):
        spec(hosts=make_hosts(("alpha", "alpha"), "10.77.0"))


def test_a_saved_spec_is_read_back_as_it_was() -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories have names too long for sockets
        made = spec(root=Path(place), etcd_members=3, agents=False, visible=("/tmp/x",))
        made.save()
        assert load_spec(Path(place)) == made


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "demo"}', '{"hosts": 5, "root": "/x"}'])
def test_a_damaged_state_file_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "lab.json").write_text(text)
    assert load_spec(tmp_path) is None


def test_three_members_of_etcd_have_an_endpoint_each() -> None:
    assert spec(etcd_members=3).endpoints == "10.77.0.1:2379,10.77.0.1:2389,10.77.0.1:2399"


def test_a_hosts_hardware_address_outlasts_its_reboots() -> None:
    assert hardware_address("10.77.0.2") == "02:ca:0a:4d:00:02"


def test_roots_password_is_made_unusable_but_not_locked_and_others_stay() -> None:
    text = "root:!:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nrooty:!x:1::::::\n"
    assert without_locked_root(text) == text.replace("root:!:", "root:*:", 1)


def test_a_cut_drops_both_ways_and_a_one_way_cut_only_what_leaves() -> None:
    addresses = {"beta": "10.77.0.3", "gamma": "10.77.0.4"}
    rules = cut_rules([Cut("beta"), Cut("gamma", one_way=True)], addresses, "10.77.0.1").splitlines()
    assert [line.strip() for line in rules if line.endswith("drop")] == [
        "ip daddr 10.77.0.3 drop",
        "ip daddr 10.77.0.4 drop",
        "ip saddr 10.77.0.3 drop",
    ]


def test_a_cut_from_etcd_leaves_other_traffic_with_the_machine_alone() -> None:
    rules = cut_rules([Cut("etcd")], {}, "10.77.0.1")
    assert "ip daddr 10.77.0.1 tcp dport 2379-2479 drop" in rules
    assert "ip daddr 10.77.0.1 drop" not in rules


def test_the_configuration_of_the_daemons_names_the_same_store() -> None:
    made = spec()
    read = {}
    texts = {"c": coordinator_config(made), "h": hostd_config(made, "beta", "10.77.0.3")}
    for name, text in texts.items():
        read[name] = configparser.ConfigParser(interpolation=None)
        read[name].read_string(text)
    assert (
        dict(read["c"]["etcd"])
        == dict(read["h"]["etcd"])
        == {
            "endpoints": "10.77.0.1:2379",
            "prefix": "/cargo",
        }
    )
    assert read["h"]["host"]["name"] == "beta"
    assert read["h"]["ssh"]["known_hosts"] == "/etc/cargo/ssh/known_hosts"
