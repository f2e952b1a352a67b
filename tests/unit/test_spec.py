"""From Docker's description of a container to its specification, and on to a create request."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.errors import PermanentError
from events.schema import Mount, PortBinding
from hostd.spec import (
    ContainerSpec,
    data_mounts,
    decode_spec,
    encode_spec,
    from_inspect,
    further_networks,
    missing_ports,
    port_bindings,
    to_create_body,
)
from hostd.spec_file import read_spec, write_spec
from hostd.spec_rules import target_problems
from tests.support.inspected import CONTAINER_ID, IMAGE_ID, container, image, mount

NETWORK = "NetworkSettings__Networks"


def spec_of(**changes: Any) -> ContainerSpec:
    return from_inspect(container(**changes), image())[0]


def refusals_of(raw: dict[str, Any], **options: Any) -> list[str]:
    return from_inspect(raw, image(), **options)[2]


def warnings_of(**changes: Any) -> list[str]:
    return from_inspect(container(**changes), image())[1]


def with_mount(**changes: Any) -> dict[str, Any]:
    raw = container()
    raw["Mounts"].append(mount(**changes))
    return raw


# --- what is carried ---------------------------------------------------------------------------------


def test_fields_that_this_version_does_not_know_pass_unchanged() -> None:
    body = to_create_body(spec_of(), image="busy:1")
    assert body["AFieldOfTomorrow"] == {"kept": True}
    assert body["HostConfig"]["AnOptionOfTomorrow"] == [1, 2]
    assert body["HostConfig"]["Memory"] == 67108864
    assert body["Env"] == ["TOKEN=hush", "PATH=/bin"]


def test_the_request_gets_policy_labels_and_image_from_the_caller() -> None:
    body = to_create_body(spec_of(), image="sha256:f00", labels={"cargo.migration": "m"})
    assert body["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    assert body["Labels"] == {"a": "b", "cargo.migration": "m"}
    assert body["Image"] == "sha256:f00"
    armed = to_create_body(spec_of(), image="x", restart_policy="on-failure", restart_max_retries=3)
    assert armed["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}


def test_the_original_policy_is_in_the_specification() -> None:
    spec = spec_of()
    assert (spec.restart_policy, spec.restart_max_retries) == ("on-failure", 3)


def test_a_host_name_that_is_the_id_is_left_out_and_an_explicit_one_kept() -> None:
    assert spec_of().config["Hostname"] == ""
    assert spec_of(Config__Hostname="mine").config["Hostname"] == "mine"


def test_the_hosts_name_is_left_out_only_with_the_hosts_network() -> None:
    on_host = container(Config__Hostname="alpha", HostConfig__NetworkMode="host")
    assert from_inspect(on_host, image(), host_name="alpha")[0].config["Hostname"] == ""
    assert from_inspect(on_host, image(), host_name="beta")[0].config["Hostname"] == "alpha"
    elsewhere = container(Config__Hostname="alpha")
    assert from_inspect(elsewhere, image(), host_name="alpha")[0].config["Hostname"] == "alpha"


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_entrypoint_is_kept_from_becoming_the_images(empty: Any) -> None:
    assert to_create_body(spec_of(Config__Entrypoint=empty), image="x")["Entrypoint"] == [""]
    assert to_create_body(spec_of(Config__Entrypoint=["/a"]), image="x")["Entrypoint"] == ["/a"]


# --- ports -------------------------------------------------------------------------------------------


def test_bindings_are_the_ports_in_force() -> None:
    assert port_bindings(container()) == (
        PortBinding(container_port="80/tcp", host_ip="0.0.0.0", host_port=8080),
        PortBinding(container_port="80/tcp", host_ip="::", host_port=8080),
    )


def fixed_ports(asked: Any, actual: Any, **changes: Any) -> Any:
    spec = spec_of(HostConfig__PortBindings=asked, NetworkSettings__Ports=actual, **changes)
    assert spec.host_config["PublishAllPorts"] is False
    return spec.host_config["PortBindings"]


def ports(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"HostIp": ip, "HostPort": port} for ip, port in pairs]


@pytest.mark.parametrize("random", ["", "0", "9000-9010"])
def test_a_port_that_docker_chose_is_asked_for_by_number(random: str) -> None:
    actual = {"80/tcp": ports(("0.0.0.0", "9003"), ("::", "9003"))}
    assert fixed_ports({"80/tcp": ports(("", random))}, actual) == {"80/tcp": ports(("", "9003"))}


def test_a_chosen_port_keeps_the_address_that_was_asked_for() -> None:
    asked = {"80/tcp": ports(("127.0.0.1", ""), ("10.0.0.1", "80"))}
    actual = {"80/tcp": ports(("127.0.0.1", "9003"), ("10.0.0.1", "80"))}
    assert fixed_ports(asked, actual) == {"80/tcp": ports(("10.0.0.1", "80"), ("127.0.0.1", "9003"))}


def test_ports_that_differ_by_address_are_asked_for_by_address() -> None:
    actual = {"80/tcp": ports(("0.0.0.0", "9003"), ("::", "9004"))}
    assert fixed_ports({"80/tcp": ports(("", ""))}, actual) == actual


def test_all_ports_published_become_those_that_are() -> None:
    actual = {"80/tcp": ports(("0.0.0.0", "9003"), ("::", "9003")), "81/tcp": None}
    assert fixed_ports({}, actual, HostConfig__PublishAllPorts=True) == {"80/tcp": ports(("", "9003"))}


def test_a_random_port_of_a_stopped_container_is_warned_about() -> None:
    asked = {"80/tcp": ports(("", ""))}
    assert fixed_ports(asked, {}) == asked
    assert any("80/tcp" in line for line in warnings_of(HostConfig__PortBindings=asked, NetworkSettings__Ports={}))


def test_ports_that_did_not_come_up_are_named() -> None:
    """F7: a start without its ports does not count as one with them."""
    assert missing_ports(spec_of(), container()) == []
    assert missing_ports(spec_of(), container(NetworkSettings__Ports={})) == ["port 8080 for 80/tcp"] * 2


# --- mounts --------------------------------------------------------------------------------------------


def test_data_mounts_are_volumes_and_binds_by_destination() -> None:
    assert [(m.kind, m.name, m.destination, m.read_only) for m in data_mounts(container())] == [
        ("volume", "fa836a88", "/anonymous", False),
        ("volume", "data", "/data", False),
        ("volume", "more", "/more", False),
        ("bind", "/srv/www", "/www", True),
    ]
    assert data_mounts(container())[1] == Mount(
        kind="volume", name="data", destination="/data", tree="/var/lib/docker/volumes/data/_data"
    )


def test_a_volume_without_a_name_is_asked_for_by_the_name_it_has() -> None:
    assert "fa836a88:/anonymous" in spec_of().host_config["Binds"]


def test_a_nameless_mount_is_asked_for_by_the_name_it_has() -> None:
    raw = container(HostConfig__Mounts=[{"Type": "volume", "Source": "", "Target": "/more"}])
    spec = from_inspect(raw, image())[0]
    assert spec.host_config["Mounts"] == [{"Type": "volume", "Source": "more", "Target": "/more"}]


def test_a_nameless_volume_at_a_place_with_a_colon_is_asked_for_in_the_long_form() -> None:
    odd = mount(Type="volume", Name="abc", Source="/var/lib/docker/volumes/abc/_data", Destination="/a:rslave")
    raw = container(HostConfig__Mounts=None, HostConfig__Binds=None, Mounts=[odd], Config__Volumes={"/a:rslave": {}})
    spec, _, _ = from_inspect(raw, image())
    (asked,) = to_create_body(spec, image="x")["HostConfig"]["Mounts"]
    assert asked == {"Type": "volume", "Source": "abc", "Target": "/a:rslave", "ReadOnly": False}


def test_a_mount_shared_with_the_host_is_warned_about() -> None:
    """F9: whatever is mounted there already is found when the data is measured, and refused."""
    _, warnings, refusals = from_inspect(with_mount(Source="/srv/x", Propagation="rslave"), image())
    assert refusals == []
    assert any("rslave" in warning for warning in warnings)


def test_a_destination_asked_for_in_another_spelling_is_not_mounted_twice() -> None:
    spec = spec_of(HostConfig__Binds=["data:/data/", "/srv/www:/www:ro", "/anonymous"])
    assert spec.host_config["Binds"] == ["data:/data/", "/srv/www:/www:ro", "fa836a88:/anonymous"]


def test_places_on_the_target_replace_those_on_the_source() -> None:
    body = to_create_body(spec_of(), image="x", places={"data": "data-2", "more": "more-2", "/srv/www": "/srv/w2"})
    assert body["HostConfig"]["Binds"] == ["data-2:/data", "/srv/w2:/www:ro", "fa836a88:/anonymous"]
    assert body["HostConfig"]["Mounts"][0]["Source"] == "more-2"


def test_a_place_with_a_colon_is_refused() -> None:
    with pytest.raises(PermanentError, match="colon"):
        to_create_body(spec_of(), image="x", places={"data": "a:b"})


# --- networks ------------------------------------------------------------------------------------------


def endpoint(**changes: Any) -> dict[str, Any]:
    base = {"NetworkID": "abcdef123", "IPAddress": "10.1.0.2", "MacAddress": "02:42:0a:01:00:02"}
    return {**base, **changes}


def test_the_default_network_needs_no_endpoint() -> None:
    assert to_create_body(spec_of(), image="x")["NetworkingConfig"] == {}


def test_of_an_endpoint_only_what_a_person_chose_is_kept() -> None:
    networks = {
        "web": endpoint(
            Aliases=["front", CONTAINER_ID[:12]],
            IPAMConfig={"IPv4Address": "10.1.0.2"},
            DriverOpts={"a": "b"},
        ),
        "back": endpoint(Aliases=[CONTAINER_ID[:12]]),
    }
    spec = spec_of(HostConfig__NetworkMode="web", **{NETWORK: networks})
    assert to_create_body(spec, image="x")["NetworkingConfig"] == {
        "EndpointsConfig": {
            "web": {
                "Aliases": ["front"],
                "IPAMConfig": {"IPv4Address": "10.1.0.2"},
                "DriverOpts": {"a": "b"},
            }
        }
    }
    assert further_networks(spec) == {"back": {}}


def test_a_mac_address_that_a_person_fixed_is_asked_for_again() -> None:
    """Engines since API 1.44 keep it with the endpoint, those before with the container; both are told."""
    mine = "02:42:0a:00:00:77"
    networks = {"web": endpoint(MacAddress=mine), "back": endpoint(MacAddress=mine)}
    body = to_create_body(spec := spec_of(HostConfig__NetworkMode="web", **{NETWORK: networks}), image="x")
    assert body["NetworkingConfig"]["EndpointsConfig"]["web"]["MacAddress"] == mine
    assert body["MacAddress"] == mine
    assert further_networks(spec) == {"back": {"MacAddress": mine}}
    assert "MacAddress" not in to_create_body(spec_of(), image="x")
    bridged = {"bridge": {"IPAddress": "172.17.0.2", "MacAddress": mine}}
    assert to_create_body(spec_of(**{NETWORK: bridged}), image="x")["MacAddress"] == mine


def test_namespaces_that_are_shared_are_refused_with_the_other_containers_name() -> None:
    """F10: whoever shares, and whose is shared, cannot move alone."""
    other = container(Id="b" * 64, Name="/other")
    sharer = container(HostConfig__NetworkMode=f"container:{'b' * 64}", HostConfig__PidMode="container:other")
    assert [line for line in refusals_of(sharer, others=[other]) if "'other'" in line] == refusals_of(
        sharer, others=[other]
    )
    assert len(refusals_of(sharer, others=[other])) == 2
    theirs = container(Id="c" * 64, Name="/theirs", HostConfig__IpcMode=f"container:{CONTAINER_ID}")
    assert refusals_of(container(), others=[other, theirs]) == [
        "the running container 'theirs' uses the ipc namespace of this one and would lose it; stop that one first"
    ]
    stopped = container(Id="c" * 64, Name="/theirs", HostConfig__IpcMode="container:web", State__Running=False)
    assert refusals_of(container(), others=[stopped]) == []


def test_a_network_named_by_its_id_is_named_by_its_name() -> None:
    spec = spec_of(HostConfig__NetworkMode="abcdef", **{NETWORK: {"web": endpoint()}})
    assert spec.network_mode == "web"


# --- refusals ------------------------------------------------------------------------------------------


def test_an_ordinary_container_is_not_refused() -> None:
    spec, warnings, refusals = from_inspect(container(), image())
    assert refusals == []
    assert len(warnings) == 1  # about the host name
    assert (spec.name, spec.container_id, spec.image_id) == ("web", CONTAINER_ID, IMAGE_ID)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("HostConfig__AutoRemove", True, "--rm"),
        ("HostConfig__NetworkMode", "container:abc", "network namespace"),
        ("HostConfig__PidMode", "container:abc", "pid namespace"),
        ("HostConfig__IpcMode", "container:abc", "ipc namespace"),
        ("HostConfig__Links", ["/db:/web/db"], "linked"),
        (NETWORK, {"web": {"Links": ["db"]}}, "linked"),
        ("Config__Labels", {"com.docker.swarm.task.id": "x"}, "Swarm"),
        ("Config__Labels", {"io.kubernetes.pod.name": "x"}, "Kubernetes"),
    ],
)
def test_what_cannot_move_is_refused_in_words(field: str, value: Any, words: str) -> None:
    """F10, A15: before anything is stopped."""
    refusals = refusals_of(container(**{field: value}))
    assert len(refusals) == 1
    assert words in refusals[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Source": "/var/run/docker.sock"}, "container engine"),
        ({"Source": "/"}, "own system"),
        ({"Source": "/proc/sys"}, "own system"),
        ({"Source": "/srv/x\ufffd"}, "UTF-8"),
        ({"Source": "relative"}, "no usable place"),
        ({"Source": "/srv/../etc"}, "no usable place"),
        ({"Source": ""}, "no usable place"),
        ({"Source": "/srv/www/deeper"}, "share data"),
        ({"Source": "/srv"}, "share data"),
        ({"Source": "/srv/www"}, "share data"),
        ({"Type": "npipe"}, "'npipe'"),
        ({"Type": "volume", "Name": "n", "Driver": "rexray"}, "'rexray'"),
        ({"Type": "volume", "Name": None, "Driver": "local"}, "without a name"),
    ],
)
def test_a_mount_that_cannot_move_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    """F9: sockets, foreign drivers, parts of the host, overlapping data."""
    refusals = refusals_of(with_mount(**changes))
    assert len(refusals) == 1
    assert words in refusals[0]


def test_neighbours_by_name_do_not_overlap() -> None:
    assert refusals_of(with_mount(Source="/srv/www-2")) == []


def test_a_volume_with_options_is_refused_and_one_without_is_not() -> None:
    """F9: a mount of any kind behind the local driver; shared storage is tested in test_shared_storage.py."""
    disk = {"Name": "data", "Driver": "local", "Options": {"type": "xfs", "device": "/dev/sdb"}}
    refusals = refusals_of(container(), volumes={"data": disk, "more": {"Name": "more", "Options": None}})
    assert len(refusals) == 1
    assert "of the type 'xfs'" in refusals[0]


def test_all_refusals_are_listed_together() -> None:
    raw = with_mount(Source="/proc")
    raw["HostConfig"]["AutoRemove"] = True
    raw["HostConfig"]["PidMode"] = "container:x"
    assert len(refusals_of(raw)) == 3


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("HostConfig__Privileged", True, "privileged"),
        ("HostConfig__NetworkMode", "host", "host's network"),
        ("HostConfig__Devices", [{"PathOnHost": "/dev/kvm"}], "/dev/kvm"),
        ("HostConfig__VolumesFrom", ["other"], "--volumes-from"),
        ("Config__Labels", {"com.docker.compose.project": "shop"}, "'shop'"),
    ],
)
def test_what_a_person_should_know_is_a_warning(field: str, value: Any, words: str) -> None:
    assert refusals_of(container(**{field: value})) == []
    assert any(words in line for line in warnings_of(**{field: value}))


def test_tmpfs_mounts_are_no_data() -> None:
    raw = with_mount(Type="tmpfs", Source="", Destination="/scratch")
    assert refusals_of(raw) == []
    assert "/scratch" not in {found.destination for found in data_mounts(raw)}


# --- the target ----------------------------------------------------------------------------------------


def problems(spec: ContainerSpec, **facts: Any) -> list[str]:
    known: dict[str, Any] = {
        "networks": {},
        "architecture": "x86_64",
    }
    return target_problems(spec, **{**known, **facts})


def test_a_target_that_has_everything_has_no_problems() -> None:
    assert problems(spec_of()) == []


def test_everything_that_the_target_lacks_is_listed() -> None:
    """F8, F10, D21: networks, architecture, owners of files. The rest is in test_fidelity.py."""
    spec = spec_of(
        HostConfig__NetworkMode="web",
        **{NETWORK: {"web": endpoint(), "back": endpoint()}},
    )
    assert problems(spec, architecture="aarch64", user_namespace="1000.1000") == [
        "the network 'back' does not exist on the target; create it with 'docker network create'",
        "the network 'web' does not exist on the target; create it with 'docker network create'",
        "the image is for amd64, the target is arm64",
        "Docker maps the container's users to the same ones on the source and to 1000.1000 on the target "
        "(userns-remap): its files would belong to others there",
    ]
    spec = spec_of(HostConfig__UsernsMode="host")
    assert problems(spec, user_namespace="1000.1000") == []


def test_a_part_of_a_volume_needs_an_engine_that_knows_how_to_show_one() -> None:
    """F9: an older one shows all of the volume, and says nothing."""
    mount = {"Type": "volume", "Source": "more", "Target": "/more", "VolumeOptions": {"Subpath": "a"}}
    spec = spec_of(HostConfig__Mounts=[mount])
    assert "/more" in problems(spec, api_version="1.41")[0]
    assert problems(spec, api_version="") != []
    assert problems(spec, api_version="1.45") == []
    assert problems(spec_of(), api_version="1.41") == []


def test_labels_of_volumes_travel_without_those_of_an_earlier_migration() -> None:
    labels = {"shop": "web", "cargo.migration": "earlier", "cargo.source": "beta"}
    raw = {"Name": "data", "Driver": "local", "Mountpoint": "/x", "Labels": labels, "Options": None}
    volumes = {"data": raw, "more": {**raw, "Name": "more", "Labels": None}}
    spec, _, refusals = from_inspect(container(), image(), volumes=volumes)
    assert refusals == []
    assert spec.volume_labels == {"data": {"shop": "web"}}


def test_a_fixed_address_must_fit_the_targets_network() -> None:
    networks = {"web": endpoint(IPAMConfig={"IPv4Address": "10.1.0.2"})}
    spec = spec_of(HostConfig__NetworkMode="web", **{NETWORK: networks})
    fits = {"web": {"IPAM": {"Config": [{"Subnet": "10.1.0.0/16"}]}}}
    assert problems(spec, networks=fits) == []
    other = {"web": {"IPAM": {"Config": [{"Subnet": "10.2.0.0/16"}]}}}
    assert "10.1.0.2" in problems(spec, networks=other)[0]


# --- on disk -------------------------------------------------------------------------------------------


def test_a_specification_comes_back_as_it_was() -> None:
    assert decode_spec(encode_spec(spec_of())) == spec_of()


def test_the_file_is_private_and_checked(tmp_path: Path) -> None:
    """F14: environment values are secrets."""
    file = tmp_path / "spec.json"
    reference = write_spec(file, spec_of())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert write_spec(file, spec_of()) == reference
    assert read_spec(file, reference) == spec_of()
    assert [entry.name for entry in tmp_path.iterdir()] == ["spec.json"]
    file.write_bytes(file.read_bytes().replace(b"hush", b"loud"))
    with pytest.raises(PermanentError, match="not the one"):
        read_spec(file, reference)


def test_secrets_do_not_show_in_a_traceback() -> None:
    assert "hush" not in repr(spec_of())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        encode_spec(spec_of()).replace(b'"version":1', b'"version":2'),
        encode_spec(spec_of()).replace(b'"name":"web"', b'"name":"../etc"'),
        b" " * (5 * 1024 * 1024),
    ],
)
def test_a_file_that_is_no_specification_is_refused(raw: bytes) -> None:
    with pytest.raises(PermanentError):
        decode_spec(raw)


@pytest.mark.parametrize("field", ["Binds", "Mounts"])
@pytest.mark.parametrize("value", [7, [7], {"a": 1}])
def test_a_specification_with_nonsense_mounts_makes_no_request(field: str, value: Any) -> None:
    spec = spec_of()
    damaged = msgspec.structs.replace(spec, host_config={**spec.host_config, field: value})
    with pytest.raises(PermanentError):
        to_create_body(damaged, image="x")
