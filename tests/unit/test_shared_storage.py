"""Storage that both hosts reach: found, described without its secrets, and recognised on the other host."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.admission import World, examine
from events.records import HostRecord, encode_container
from events.schema import Mount, Requested
from hostd.docker_json import VolumeView
from hostd.inventory import SharedKinds, Sizer, container_record
from hostd.mounts import MountRecord, parse_mountinfo_line
from hostd.shared_storage import (
    SharedPlace,
    bind_problem,
    covering,
    find_shared,
    told,
    volume_problem,
    without_secrets,
)
from hostd.spec import decode_spec, encode_spec, from_inspect, to_create_body
from tests.support.inspected import container, image, mount

SECRET = "hunter2"
OPTIONS = {"type": "cifs", "device": "//10.0.0.5/web", "o": f"addr=10.0.0.5,username=web,password={SECRET}"}
VOLUME = {"Name": "data", "Driver": "local", "Mountpoint": "/v/data/_data", "Options": OPTIONS}
TABLE = [
    record
    for line in (
        b"1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        b"2 1 0:40 / /mnt/web rw - nfs4 10.0.0.5:/export/web rw,vers=4.2",
        b"3 1 0:41 /deep /mnt/deep rw - nfs4 10.0.0.5:/export rw",
    )
    if (record := parse_mountinfo_line(line)) is not None
]


def bind(tree: str) -> Mount:
    return Mount(kind="bind", name=tree, destination="/www", tree=tree)


def found(tree: str, table: list[MountRecord] = TABLE) -> SharedPlace | None:
    return find_shared([bind(tree)], {}, table).get("/www")


def cifs_place() -> SharedPlace:
    view = VolumeView(name="data", driver="local", options=OPTIONS)
    data = Mount(kind="volume", name="data", destination="/data", tree="/v/data/_data")
    return find_shared([data], {"data": view}, TABLE)["/data"]


def test_a_bind_below_a_share_is_found_with_its_place_in_the_share() -> None:
    """F9."""
    place = found("/mnt/web/a b/c")
    assert place is not None
    assert (place.file_system, place.share, place.path) == ("nfs4", "10.0.0.5:/export/web", "/a b/c")


@pytest.mark.parametrize("tree", ["/mnt", "/mnt/webs", "/srv/www"])
def test_a_bind_beside_a_share_moves(tree: str) -> None:
    assert found(tree) is None


def test_of_several_mounts_on_one_point_the_last_counts() -> None:
    over = parse_mountinfo_line(b"9 2 8:9 / /mnt/web rw - ext4 /dev/sdb rw")
    assert over is not None
    assert covering(b"/mnt/web/x", [*TABLE, over]) is over
    assert found("/mnt/web/x", [*TABLE, over]) is None


def test_the_same_place_of_the_same_share_is_recognised_however_it_is_mounted() -> None:
    place = found("/mnt/deep/x")
    assert place is not None
    whole = parse_mountinfo_line(b"2 1 0:40 / /mnt rw - nfs 10.0.0.5:/export rw")
    assert whole is not None
    assert bind_problem(place, b"/mnt/deep/x", [TABLE[0], whole]) == ""


@pytest.mark.parametrize(
    "line",
    [
        b"2 1 0:40 / /mnt/deep rw - nfs4 10.0.0.5:/export rw",
        b"2 1 0:40 /deep /mnt/deep rw - nfs4 10.0.0.6:/export rw",
        b"2 1 0:40 /deep /mnt/deep rw - ext4 10.0.0.5:/export rw",
    ],
)
def test_another_share_at_the_same_place_is_refused_with_what_to_do(line: bytes) -> None:
    """F9."""
    place = found("/mnt/deep/x")
    other = parse_mountinfo_line(line)
    assert place is not None
    assert other is not None
    assert "mount '10.0.0.5:/export' here" in bind_problem(place, b"/mnt/deep/x", [TABLE[0], other])
    assert "it lies on '/dev/sda1' (ext4)" in bind_problem(place, b"/mnt/deep/x", TABLE[:1])


def test_a_volume_of_another_share_is_refused_without_showing_its_options() -> None:
    """F9, F14."""
    place = cifs_place()
    assert volume_problem(place, OPTIONS) == ""
    for other in (None, {}, {**OPTIONS, "o": "password=other"}, {**OPTIONS, "extra": "x"}):
        problem = volume_problem(place, other)
        assert "is not the source's share" in problem
        assert SECRET not in problem
        assert "other" not in problem


def test_options_are_in_the_specification_and_nowhere_else() -> None:
    """F14: a share's password goes by SSH only."""
    raw = container()
    spec, warnings, refusals = from_inspect(raw, image(), volumes={"data": VOLUME}, shared={"/data": cifs_place()})
    assert refusals == []
    assert [m.destination for m in spec.mounts if m.destination == "/data"] == []
    assert decode_spec(encode_spec(spec)).shared[0].options == OPTIONS
    shown = [repr(spec), repr(spec.shared), repr(warnings), msgspec.json.encode(told(spec.shared)).decode()]
    record = container_record(raw, volumes={"data": VOLUME}, used=[], sizer=Sizer(), shared=SharedKinds())
    shown.append(encode_container(record).decode())
    assert not any(SECRET in text for text in shown)


def test_a_volume_with_options_of_another_kind_is_refused_without_showing_them() -> None:
    """F9, F14."""
    volume = {**VOLUME, "Options": {**OPTIONS, "type": "beegfs2"}}
    (refusal,) = from_inspect(container(), image(), volumes={"data": volume})[2]
    assert "shared_file_systems" in refusal
    assert SECRET not in refusal


def test_docker_is_told_not_to_fill_a_share_from_the_image() -> None:
    raw = container(HostConfig__Mounts=[{"Type": "volume", "Source": "other", "Target": "/other"}])
    raw["Mounts"].append(mount(Name="other", Source="/v/other/_data", Destination="/other"))
    places = {"/data": cifs_place(), "/other": msgspec.structs.replace(cifs_place(), name="other")}
    spec = from_inspect(raw, image(), volumes={}, shared=places)[0]
    host_config = to_create_body(spec, image="busy:1")["HostConfig"]
    assert "data:/data:nocopy" in host_config["Binds"]
    assert host_config["Mounts"][0]["VolumeOptions"]["NoCopy"] is True


def test_two_mounts_of_one_share_are_no_overlap() -> None:
    raw = container()
    raw["Mounts"].append(mount(Type="bind", Name="", Source="/mnt/web", Destination="/www2"))
    raw["Mounts"].append(mount(Type="bind", Name="", Source="/mnt/web/a", Destination="/www3"))
    mounts = [bind("/mnt/web"), bind("/mnt/web/a")]
    named = [msgspec.structs.replace(m, destination=f"/www{n}") for n, m in enumerate(mounts, 2)]
    assert from_inspect(raw, image(), shared=find_shared(named, {}, TABLE))[2] == []
    assert any("share data" in line for line in from_inspect(raw, image())[2])


def test_a_passwords_value_is_taken_out_of_what_docker_says() -> None:
    """F14."""
    words = f"mount //h/s, data: addr=1.2.3.4,username=u,password={SECRET},vers=3: permission denied"
    assert SECRET not in without_secrets(words)
    assert "username=u,password=…,vers=3: permission denied" in without_secrets(words)


def test_a_share_needs_no_room_on_the_target_and_may_be_there_already() -> None:
    """F9."""
    raw: dict[str, Any] = container()
    attached = container_record(raw, volumes={"data": VOLUME}, used=[], sizer=Sizer(), shared=SharedKinds())
    plain = container_record(raw, volumes={}, used=[], sizer=Sizer())
    hosts = {
        "alpha": HostRecord(host="alpha", address="192.0.2.1", free_bytes=2**40),
        "beta": HostRecord(host="beta", address="192.0.2.2", volumes=("data",), free_bytes=2**40),
    }
    asked = b'{"container":"web","source":"alpha","target":"beta"}'
    answer = examine("web-1", asked, World(hosts=hosts, containers={"alpha": {"web": attached}}))
    assert isinstance(answer, Requested), answer
    refused = examine("web-1", asked, World(hosts=hosts, containers={"alpha": {"web": plain}}))
    assert not isinstance(refused, Requested)
