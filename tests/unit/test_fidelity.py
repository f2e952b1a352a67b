"""What a target cannot keep of a container: found, named, refused, or left out with consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostd.fidelity import Target, apparmor_problem, dropped, known_name, refusals, shortfalls, stripped
from hostd.spec import ContainerSpec, decode_spec, encode_spec, from_inspect, to_create_body
from tests.support.inspected import container, image

SAMPLES = Path(__file__).parent / "samples"
ALL_LIMITS = ("MemoryLimit", "CPUShares", "CpuCfsPeriod", "CpuCfsQuota", "CPUSet", "PidsLimit", "OomKillDisable")


def spec_of(**changes: Any) -> ContainerSpec:
    return from_inspect(container(**changes), image())[0]


def target(**facts: Any) -> Target:
    known: dict[str, Any] = {
        "runtimes": ("runc",),
        "log_drivers": ("json-file", "journald", "syslog"),
        "security": ("seccomp", "cgroupns"),
        "abilities": (*ALL_LIMITS, "SwapLimit"),
        "cpus": 2,
        "cgroup_driver": "cgroupfs",
    }
    return Target(**{**known, **facts})


def nothing_there(_what: str) -> bool:
    return False


BARE = {"path_exists": nothing_there, "has_program": nothing_there}


def test_a_target_that_has_everything_lacks_nothing() -> None:
    assert shortfalls(spec_of(), target()) == []


@pytest.mark.parametrize(
    ("option", "value", "facts", "name"),
    [
        ("Runtime", "gvisor", {}, "runtime:gvisor"),
        ("Init", True, BARE, "init"),
        ("Devices", [{"PathOnHost": "/dev/kvm"}], BARE, "device:/dev/kvm"),
        ("BlkioDeviceReadBps", [{"Path": "/dev/sdx", "Rate": 1}], BARE, "blkio:/dev/sdx"),
        ("DeviceRequests", [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}], BARE, "gpu"),
        ("DeviceRequests", [{"Driver": "nvidia", "DeviceIDs": ["GPU-1"]}], {}, "gpu"),
        ("DeviceRequests", [{"Driver": "cdi", "DeviceIDs": ["vendor.com/x=y"]}], {}, "gpu"),
        ("LogConfig", {"Type": "splunk", "Config": {}}, {}, "log-driver:splunk"),
        ("LogConfig", {"Type": "journald", "Config": {}}, BARE, "log-driver:journald"),
        ("LogConfig", {"Type": "syslog", "Config": {}}, BARE, "log-driver:syslog"),
        ("SecurityOpt", ["apparmor=web"], {}, "apparmor:web"),
        ("SecurityOpt", ["apparmor:web"], {"security": ["apparmor"], "apparmor_profiles": {"other"}}, "apparmor:web"),
        ("SecurityOpt", ['seccomp={"defaultAction":"SCMP_ACT_ALLOW"}'], {"security": ()}, "seccomp"),
        ("CgroupnsMode", "private", {"security": ()}, "cgroupns"),
        ("Memory", 1 << 26, {"abilities": ()}, "limit:Memory"),
        ("MemorySwap", 1 << 27 | 1, {"abilities": ALL_LIMITS}, "limit:MemorySwap"),
        ("PidsLimit", 100, {"abilities": ("MemoryLimit",)}, "limit:PidsLimit"),
        ("OomKillDisable", True, {"abilities": ("MemoryLimit",)}, "limit:OomKillDisable"),
        ("NanoCpus", 2_500_000_000, {}, "limit:NanoCpus"),
        ("CpusetCpus", "0-1,3", {}, "limit:CpusetCpus"),
        ("Sysctls", {"net.core.odd": "1"}, BARE, "sysctl:net.core.odd"),
        ("CgroupParent", "web.slice", {}, "cgroup-parent"),
        ("CgroupParent", "/web", {"cgroup_driver": "systemd"}, "cgroup-parent"),
    ],
)
def test_what_is_missing_is_named_refused_and_can_be_left_out(
    option: str, value: Any, facts: dict[str, Any], name: str
) -> None:
    """F10: each by the one name that the refusal says and the consent takes; without it, nothing is missing."""
    spec = spec_of(**{f"HostConfig__{option}": value})
    [found] = shortfalls(spec, target(**facts))
    assert found.name == name
    assert f'"{name}"' in refusals([found])[0]
    assert known_name(name)
    left = stripped(spec, [name])
    assert shortfalls(left, target(**facts)) == []
    assert {key: left.host_config[key] for key in left.host_config if key != option} == {
        key: spec.host_config[key] for key in spec.host_config if key != option
    }, "nothing else is left out"


def test_what_the_target_has_is_kept() -> None:
    everything = spec_of(
        HostConfig__DeviceRequests=[{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}],
        HostConfig__SecurityOpt=["apparmor=web", "no-new-privileges", "seccomp=unconfined"],
        HostConfig__LogConfig={"Type": "syslog", "Config": {"syslog-address": "udp://10.0.0.1"}},
        HostConfig__MemorySwap=1 << 27,
        HostConfig__CpusetCpus="0,1",
        HostConfig__Sysctls={"net.core.somaxconn": "1"},
        HostConfig__Init=True,
    )
    assert shortfalls(everything, target(security=["apparmor", "seccomp"], apparmor_profiles={"web"})) == []


def test_selinux_counts_only_where_the_source_enforces_it() -> None:
    labelled = spec_of(ProcessLabel="system_u:system_r:container_t:s0", HostConfig__SecurityOpt=["label=level:s0:c1"])
    assert [found.name for found in shortfalls(labelled, target())] == ["selinux"]
    assert shortfalls(spec_of(HostConfig__SecurityOpt=["label=disable"]), target()) == []


@pytest.mark.parametrize("name", ["", "device", "device:", "gpu:0", "everything", "limit", "option"])
def test_a_name_that_means_nothing_is_no_consent(name: str) -> None:
    assert not known_name(name)


def test_consent_to_one_thing_leaves_the_others() -> None:
    spec = spec_of(
        HostConfig__Devices=[{"PathOnHost": "/dev/a"}, {"PathOnHost": "/dev/b"}],
        HostConfig__SecurityOpt=["apparmor=a", "no-new-privileges"],
        HostConfig__Sysctls={"net.a": "1", "net.b": "2"},
    )
    left = stripped(spec, ["device:/dev/a", "apparmor:a", "sysctl:net.a", "limit:RestartPolicy", "runtime:other"])
    assert left.host_config["Devices"] == [{"PathOnHost": "/dev/b"}]
    assert left.host_config["SecurityOpt"] == ["no-new-privileges"]
    assert left.host_config["Sysctls"] == {"net.b": "2"}
    assert left.host_config["RestartPolicy"] == spec.host_config["RestartPolicy"]
    assert left.host_config["Runtime"] == "runc"


# --- what Docker drops -------------------------------------------------------------------------------


def created(body: dict[str, Any]) -> dict[str, Any]:
    """What an engine that takes everything shows of the container that ``body`` made."""
    config = {key: value for key, value in body.items() if key not in ("HostConfig", "NetworkingConfig")}
    return {"Config": {**config, "Added": 1}, "HostConfig": {**body["HostConfig"], "Added": True}}


def test_an_engine_that_takes_everything_drops_nothing() -> None:
    body = to_create_body(spec_of(), image="busy:1", labels={"cargo.migration": "m"})
    assert dropped(body, created(body)) == []


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("Annotations", {"a": "b"}, None),
        ("Annotations", {"a": "b"}, {"a": "c"}),
        ("PidsLimit", 7, 0),
        ("CapAdd", ["A", "B"], ["A"]),
        ("Ulimits", [{"Name": "core", "Soft": 0, "Hard": 1}], [{"Name": "core", "Soft": 0, "Hard": 2}]),
        ("Init", True, None),
    ],
)
def test_an_option_that_docker_dropped_is_found_and_can_be_consented_to(option: str, value: Any, shown: Any) -> None:
    """F10, F11: an older engine ignores what it does not know, and says nothing."""
    spec = spec_of(**{f"HostConfig__{option}": value})
    body = to_create_body(spec, image="x")
    found = created(body)
    found["HostConfig"][option] = shown
    [lost] = dropped(body, found)
    assert lost.name == f"option:HostConfig.{option}"
    assert known_name(lost.name)
    less = to_create_body(stripped(spec, [lost.name]), image="x")
    assert dropped(less, found) == []


# --- stored samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.41", "1.45"])
def test_a_container_of_a_real_engine_makes_a_request_with_all_its_options(version: str) -> None:
    """F11: of Docker 20.10.24 and 26.1.5, as they wrote it: whatever asks for something is in the request again."""
    sample = json.loads((SAMPLES / f"inspect-{version}.json").read_text())
    raw, picture = sample["container"], sample["image"]
    spec, _, found = from_inspect(raw, picture)
    assert found == []
    assert decode_spec(encode_spec(spec)) == spec
    body = to_create_body(spec, image="x")
    apart = {
        "HostConfig": {"RestartPolicy", "PortBindings", "PublishAllPorts", "Binds"},
        "Config": {"Image", "Hostname"},
    }
    for part, request in (("HostConfig", body["HostConfig"]), ("Config", body)):
        for option, value in raw[part].items():
            if option not in apart[part] and value not in (None, [], {}, "", 0, False):
                assert request[option] == value, (part, option)
    assert request["MacAddress"] == sample["mac_address"]
    # The volume that had no name is asked for by the one that Docker gave it.
    assert [lost.name for lost in dropped(body, raw)] == ["option:HostConfig.Binds"]


def test_a_docker_that_cannot_load_its_apparmor_profile_is_foreseen() -> None:
    """P17: such a host starts no container, which would be found out with the source stopped."""
    assert "apparmor_parser is missing" in apparmor_problem(["apparmor", "seccomp"], has_parser=False)
    assert apparmor_problem(["apparmor"], has_parser=True) == ""
    assert apparmor_problem(["seccomp"], has_parser=False) == ""
