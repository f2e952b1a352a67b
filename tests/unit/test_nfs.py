"""The remote view by NFS: what is asked for, and to whom and where it is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.admission import World, examine
from events.records import ContainerRecord, HostRecord
from events.schema import Rejected, Requested
from hostd.nfs_client import Export, client_problem
from hostd.nfs_server import problems

WORLD = World(
    hosts={
        "alpha": HostRecord(host="alpha", address="192.0.2.1", free_bytes=2**40),
        "beta": HostRecord(host="beta", address="192.0.2.2", free_bytes=2**40),
    },
    containers={"alpha": {"web": ContainerRecord(id="c1", name="web", image="i", image_id="i", running=True)}},
)


def asked(**more: object) -> object:
    raw = json.dumps({"container": "web", "source": "alpha", "target": "beta", **more}).encode()
    return examine("web-1", raw, WORLD)


@pytest.mark.parametrize("remote", ["sshfs", "nfs"])
def test_a_request_chooses_the_transport_of_the_remote_view(remote: str) -> None:
    answer = asked(remote=remote)
    assert isinstance(answer, Requested)
    assert answer.request.remote == remote


def test_the_target_that_may_look_is_the_one_that_was_registered_at_admission() -> None:
    answer = asked()
    assert isinstance(answer, Requested)
    assert answer.target_address == "192.0.2.2"
    assert answer.source_address == "192.0.2.1"
    assert answer.request.remote == "", "the source's own setting decides"


@pytest.mark.parametrize("remote", ["smb", 1, None, ["nfs"]])
def test_an_unknown_transport_is_refused(remote: object) -> None:
    answer = asked(remote=remote)
    assert isinstance(answer, Rejected)
    assert "it must be sshfs or nfs" in answer.reasons[0]


def test_a_kernel_with_the_client_is_recognised(tmp_path: Path) -> None:
    known = tmp_path / "filesystems"
    known.write_text("nodev\tsysfs\n\text4\nnodev\tnfs\nnodev\tnfs4\n")
    assert client_problem(known) == ""
    known.write_text("nodev\tsysfs\nnodev\tnfs4x\n")
    assert "ask for remote sshfs" in client_problem(known)


def test_an_address_of_six_is_written_in_brackets() -> None:
    assert Export("192.0.2.1", 20490, "/cargo-0").source == "192.0.2.1:/cargo-0"
    assert Export("2001:db8::1", 20490, "/cargo-0").source == "[2001:db8::1]:/cargo-0"


def test_every_path_that_docker_gives_a_volume_can_be_exported() -> None:
    assert not [why for why in problems({0: "/var/lib/docker/volumes/web-7_data.x/_data"}) if "characters" in why]
