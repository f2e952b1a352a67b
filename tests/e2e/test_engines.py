"""Docker 20.10 and 26, with Docker's own image store and with containerd's, on either side."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator

import pytest

from events import schema
from labkit.waiting import wait_until
from labkit.witness import Witness, wait_until_answering
from tests.e2e.conftest import Ground, lent
from tests.e2e.test_configuration import EVERYTHING, moved, start
from tests.e2e.test_image_and_networks import network, reasons_of
from tests.support import same_container
from tests.support.fleet import ON_A_UNION, Container, Fleet, differences

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]

HOSTS = {
    "alpha": "20.10, overlay2",
    "beta": "20.10, overlay2",
    "gamma=debian13": "26.1, overlay2",
    "delta=debian13,containerd": "26.1, containerd",
    "epsilon=debian13,containerd,liverestore": "26.1, containerd, live-restore",
}
PAIRS = [
    ("alpha", "gamma"),
    ("gamma", "alpha"),
    ("alpha", "delta"),
    ("delta", "alpha"),
    ("gamma", "delta"),
    ("delta", "gamma"),
    ("delta", "epsilon"),
]
LAYER_BYTES = 300_000


@pytest.fixture(scope="module")
def all_kinds(ground: Ground) -> Iterator[Ground]:
    """The usual lab with hosts of every kind; the two usual ones again afterwards."""
    ground.extend(list(HOSTS))
    yield ground
    ground.hosts = None
    ground.rebuild()


@pytest.fixture
def fleet(all_kinds: Ground) -> Iterator[Fleet]:
    yield from lent(all_kinds)


def build(fleet: Fleet, host: str, tag: str) -> None:
    """On that host only: an image with everything that an image can say, and one layer more than the base."""
    client = fleet.docker[host]
    script = f"head -c {LAYER_BYTES} /dev/urandom > /payload; mkdir /declared; echo from the image > /declared/file"
    builder = client.containers.create(fleet.images["busybox"], ["sh", "-ec", script], stop_signal="SIGINT")
    builder.start()
    assert builder.wait()["StatusCode"] == 0
    changes = ["ENV COLOUR=green", "LABEL shop=web", "VOLUME /declared", "EXPOSE 80/tcp", "WORKDIR /tmp"]
    repository, _, version = tag.rpartition(":")
    builder.commit(repository, version, author="a person", changes=[*changes, "ONBUILD RUN true"])
    builder.remove()

    def forget() -> None:
        for everywhere in fleet.docker.values():
            for container in everywhere.containers.list(all=True):
                container.remove(force=True)
            for image in everywhere.images.list(all=True):
                if tag in image.tags:
                    everywhere.images.remove(image.id, force=True)

    fleet.at_end(forget)
    fleet.images = {**fleet.images, tag: tag}


def image_of(fleet: Fleet, host: str, container: str) -> str:
    return str(fleet.present(host, container).attrs["Image"])


def assert_can_be_packed(fleet: Fleet, host: str, image: str) -> None:
    """Everything that the archive speaks of is in it, so the image can be carried on from here."""
    raw = b"".join(fleet.docker[host].images.get(image).save())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        names = set(tar.getnames())
        described = tar.extractfile("manifest.json")
        assert described is not None
        (manifest,) = json.load(described)
    assert {manifest["Config"], *manifest["Layers"]} <= names


def told_by(container: Container) -> dict[str, object]:
    """What an image says to a container, and what was asked for."""
    config, host_config = container.attrs["Config"], container.attrs["HostConfig"]
    names = (
        "Env",
        "Cmd",
        "Entrypoint",
        "WorkingDir",
        "ExposedPorts",
        "Volumes",
        "StopSignal",
        "OnBuild",
        "Image",
        "User",
    )
    labels = {name: value for name, value in config["Labels"].items() if not name.startswith("cargo.")}
    limits = {
        name: host_config[name] for name in ("Memory", "CapAdd", "Ulimits", "ExtraHosts", "Tmpfs", "ReadonlyRootfs")
    }
    return {**{name: config.get(name) for name in names}, "Labels": labels, **limits}


@pytest.mark.parametrize("target", ["gamma", "delta"])
def test_a_container_goes_on_from_its_gate_on_a_newer_engine(fleet: Fleet, target: str) -> None:
    """The runtime is installed by its one command, which restarts nothing; a restart and an exec are as before."""
    name, host = f"warm-{target}", fleet.lab.host(target)
    command = [host.python, "-m", "hostd.runtime.install"]
    environment = {"PYTHONPATH": host.python_path}
    fleet.sleeper(f"{name}-beside", host=target)
    before = fleet.present(target, f"{name}-beside").attrs["State"]["StartedAt"]
    host.run([*command, "install"], env=environment)
    fleet.at_end(lambda: host.run([*command, "remove", "--force"], env=environment) and None)
    wait_until(lambda: "cargo" in fleet.docker[target].info()["Runtimes"], "Docker does not know the runtime", 20)
    fleet.sleeper(name, working_dir="/data", volumes={name: {"bind": "/data"}})
    fleet.execute("alpha", name, "echo one > /data/file; echo two > /etc/mine")
    events = fleet.migrate(f"{name}-1", name, target=target)
    said = next(event.data for event in events if isinstance(event.data, schema.TargetStarted))
    assert (said.start, said.why_cold) == ("warm", "")
    assert fleet.execute(target, name, "cat /data/file /etc/mine; readlink /proc/1/cwd") == "one\ntwo\n/data\n"
    assert fleet.gates(target) == []
    fleet.present(target, name).restart(timeout=5)
    fleet.wait_running(target, name)
    assert fleet.execute(target, name, "cat /data/file") == "one\n"
    assert fleet.present(target, f"{name}-beside").attrs["State"]["StartedAt"] == before
    fleet.assert_sound(f"{name}-1")
    refused = host.run([*command, "remove"], env=environment, check=False)
    assert (refused.returncode, f"without it: {name}. Make them" in refused.stderr) == (1, True), refused.stderr
    host.run([*command, "remove", "--force"], env=environment)
    wait_until(lambda: "cargo" not in fleet.docker[target].info()["Runtimes"], "Docker goes on knowing it", 20)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_container_moves_between_engines_and_stores_and_back(fleet: Fleet, source: str, target: str) -> None:
    """F8, F11: the same image has another id in another kind of store; each is found by what is in it."""
    name, tag = f"web-{source}-{target}", f"shop/{source}-{target}:1"
    build(fleet, source, tag)
    fleet.sleeper(
        name,
        host=source,
        image=tag,
        volumes={f"{name}-data": {"bind": "/data"}},
        mem_limit="64m",
        cap_add=["NET_ADMIN"],
        extra_hosts={"other": "10.9.8.7"},
        tmpfs={"/scratch": "size=1m"},
    )
    fleet.execute(
        source, name, "mkdir /data/d; echo one > /data/d/file; ln /data/d/file /data/link; echo two > /declared/mine"
    )
    fleet.execute(
        source, name, "echo three > /etc/mine; rm /etc/nsswitch.conf; rm -rf /run; mkdir /run; touch /run/new"
    )
    written = "cat /etc/mine; ls /run; [ ! -e /etc/nsswitch.conf ]"
    asked, content = told_by(fleet.present(source, name)), fleet.execute(source, name, "sha256sum /payload")
    (before,) = fleet.describe_seen(source, name, "/data")

    events = fleet.migrate(f"{name}-1", name, source=source, target=target, on_release="remove")
    packed = next(event.data for event in events if isinstance(event.data, schema.ImagePacked))
    assert packed.layers == 1
    assert packed.archive.size_bytes < LAYER_BYTES + 200_000, "the base layer, which both have, stayed where it was"
    fleet.wait_for(f"{name}-1", "finalised")
    assert told_by(fleet.present(target, name)) == asked
    assert fleet.execute(target, name, "sha256sum /payload") == content
    assert fleet.execute(target, name, written) == "three\nnew\n"
    assert fleet.execute(target, name, "cat /declared/file /declared/mine") == "from the image\ntwo\n"
    assert differences(before, fleet.describe_seen(target, name, "/data")[0]) == []
    assert tag in fleet.docker[target].images.get(image_of(fleet, target, name)).tags
    assert_can_be_packed(fleet, target, image_of(fleet, target, name))

    events = fleet.migrate(f"{name}-2", name, source=target, target=source, on_release="remove")
    assert "image_wanted" not in {event.type for event in events}, "the source still has it and knows it again"
    fleet.wait_for(f"{name}-2", "finalised")
    assert fleet.execute(source, name, written) == "three\nnew\n"
    assert told_by(fleet.present(source, name)) == asked
    assert differences(before, fleet.describe_seen(source, name, "/data")[0]) == []
    fleet.assert_clean(source, f"{name}-1")
    fleet.assert_clean(target, f"{name}-2")
    fleet.assert_sound(f"{name}-1")
    fleet.assert_sound(f"{name}-2")


@pytest.mark.parametrize(("source", "target"), [("alpha", "delta"), ("delta", "alpha"), ("gamma", "delta")])
def test_an_abort_removes_the_image_from_a_store_of_another_kind(fleet: Fleet, source: str, target: str) -> None:
    tag = f"shop/tried-{source}-{target}:1"
    build(fleet, source, tag)
    before = {image.id for image in fleet.docker[target].images.list(all=True)}
    fleet.sleeper("tried", host=source, image=tag)
    fleet.failpoints(f"hostd/{target}", "target.create_container:after_effect=pause")
    since = fleet.log_size(f"{target}.hostd")
    migration = f"tried-{source}-{target}"
    fleet.request(migration, "tried", source=source, target=target)
    fleet.wait_step(f"{target}.hostd", '"point": "target.create_container:after_effect"', since)
    (brought,) = {image.id for image in fleet.docker[target].images.list(all=True)} - before
    assert fleet.docker[target].images.get(tag).id == brought
    fleet.control(migration, "abort")
    fleet.failpoints(f"hostd/{target}", "")
    fleet.wait_end(migration, "aborted")
    assert {image.id for image in fleet.docker[target].images.list(all=True)} == before
    assert fleet.running(source, "tried")
    for host in (source, target):
        fleet.assert_clean(host, migration)


@pytest.mark.parametrize(("source", "target"), [("alpha", "delta"), ("delta", "alpha"), ("delta", "gamma")])
def test_a_redis_in_use_moves_between_engines_and_rolls_back_without_losing_a_record(
    fleet: Fleet, source: str, target: str
) -> None:
    """What is written between the last round and the stop stays on the source and is read through the union."""
    name, migration = "cache", f"cache-{source}-{target}"
    fleet.run(name, host=source, image="redis", ports={"6379/tcp": 6379}, volumes={f"{migration}": {"bind": "/data"}})
    addresses = [fleet.lab.host(host).spec.address for host in (source, target)]
    wait_until_answering(addresses[0], 6379)
    witness = Witness(addresses, 6379)
    witness.start()
    fleet.at_end(witness.stop)
    witness.wait_for_more(100)
    events = fleet.migrate(migration, name, source=source, target=target, **ON_A_UNION)
    assert next(event.data for event in events if isinstance(event.data, schema.TargetClaimed)).remainder == "federated"
    witness.wait_for_more(100)
    assert witness.answers[-1].address == addresses[1]
    fleet.control(migration, "rollback")
    fleet.wait_end(migration, "rolled_back")
    witness.wait_for_more(100)
    assert witness.answers[-1].address == addresses[0]
    witness.stop()
    assert witness.missing_from(addresses[0]) == []
    fleet.assert_clean(target, migration)
    fleet.assert_sound(migration)


@pytest.mark.parametrize(("source", "target"), [("alpha", "delta"), ("delta", "alpha")])
def test_an_image_is_pulled_into_a_store_of_another_kind(fleet: Fleet, source: str, target: str) -> None:
    """F8, F11: what comes from the registry is known to be the same image."""
    tag = f"{fleet.registry('alpha')}/shop/from-{source}:1"
    build(fleet, source, tag)
    said = fleet.docker[source].images.push(tag)
    assert '"error"' not in said
    (digest,) = set(fleet.docker[source].images.get(tag).attrs["RepoDigests"])
    fleet.sleeper("pulled", host=source, image=tag)
    events = fleet.migrate(f"pulled-{source}", "pulled", source=source, target=target, image="pull")
    assert "image_wanted" not in {event.type for event in events}
    assert fleet.present(target, "pulled").attrs["Config"]["Image"] == tag
    for name in (digest, tag):
        assert fleet.docker[target].images.get(name).id == image_of(fleet, target, "pulled")


def part_of_a_volume(fleet: Fleet, name: str) -> None:
    """A container on gamma that sees only the directory ``part`` of its volume."""
    place = fleet.volume("gamma", f"{name}-data")
    (place / "part").mkdir()
    (place / "part" / "file").write_text("shown")
    (place / "hidden").write_text("hidden")
    client = fleet.docker["gamma"].api
    part = {"Type": "volume", "Source": f"{name}-data", "Target": "/part", "VolumeOptions": {"Subpath": "part"}}
    made = client.create_container(
        fleet.images["busybox"], ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"], name=name, labels={"e2e": name},
        host_config={**client.create_host_config(), "Mounts": [part]},
    )  # fmt: skip
    client.start(made["Id"])
    fleet.wait_listed("gamma", name)


def test_a_part_of_a_volume_is_shown_on_the_target_too_and_all_of_it_moves(fleet: Fleet) -> None:
    """F9"""
    part_of_a_volume(fleet, "parted")
    fleet.migrate("parted-1", "parted", source="gamma", target="delta")
    assert fleet.execute("delta", "parted", "ls /part; cat /part/file").split() == ["file", "shown"]
    fleet.execute("delta", "parted", "echo more > /part/more")
    fleet.control("parted-1", "rollback")
    fleet.wait_end("parted-1", "rolled_back")
    assert fleet.execute("gamma", "parted", "cat /part/more") == "more\n"
    assert (fleet.volume_path("gamma", "parted-data") / "hidden").read_text() == "hidden"


def test_a_part_of_a_volume_is_refused_by_an_engine_that_would_show_all_of_it(fleet: Fleet) -> None:
    """F9"""
    part_of_a_volume(fleet, "whole")
    fleet.request("whole-1", "whole", source="gamma", target="alpha")
    events = fleet.wait_end("whole-1", "aborted")
    reasons = next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))
    assert "volume-subpath" in reasons
    assert fleet.running("gamma", "whole")


def test_every_option_of_a_new_engine_arrives_and_what_an_old_one_would_drop_is_refused_by_name(fleet: Fleet) -> None:
    """F10, F11, P14: annotations are among them, which engines before API 1.43 do not know."""
    network(fleet, "front", "10.203.0.0/24", host="gamma", labels={"team": "web"})
    network(fleet, "back", "10.204.0.0/24", host="gamma", internal=True)
    noted = {"org.example.owner": "shop", "org.example.empty": ""}
    body = {**EVERYTHING, "HostConfig": {**EVERYTHING["HostConfig"], "Annotations": noted}}
    hardware = body.pop("MacAddress")  # a new engine wants it with the endpoint
    before = start(
        fleet,
        "modern",
        body,
        on="gamma",
        front={"IPAMConfig": {"IPv4Address": "10.203.0.7"}, "Aliases": ["www"], "MacAddress": hardware},
        back={"IPAMConfig": {"IPv4Address": "10.204.0.9"}},
    )
    assert before.attrs["HostConfig"]["Annotations"] == noted
    assert before.attrs["NetworkSettings"]["Networks"]["front"]["MacAddress"] == hardware
    after = moved(fleet, "modern", "gamma", "delta")
    store = {
        "Driver": "gamma keeps layers in Docker's own store, delta in containerd's",
        "Image": "and calls it by another id",
    }
    assert same_container.differences(before.attrs, after.attrs, apart_from=store, fixed_addresses=True) == []

    name = "option:HostConfig.Annotations"
    fleet.request("modern-2", "modern", source="delta", target="alpha")
    assert f'put "{name}" into the request\'s "without"' in reasons_of(fleet.wait_end("modern-2", "aborted"))
    fleet.migrate("modern-3", "modern", source="delta", target="alpha", without=[name])
    assert not fleet.present("alpha", "modern").attrs["HostConfig"].get("Annotations")
    fleet.assert_sound("modern-3")


def test_an_engine_that_is_restarted_leaves_the_container_and_the_migration_going(fleet: Fleet) -> None:
    """A13: with live-restore the container outlives its dockerd, and the agent finds it again."""
    fleet.volume("epsilon", "live-data")
    fleet.sleeper("live", host="epsilon", volumes={"live-data": {"bind": "/data"}})
    fleet.execute("epsilon", "live", "echo one > /data/file")
    pid = fleet.present("epsilon", "live").attrs["State"]["Pid"]
    fleet.failpoints("hostd/gamma", "target.sync:before_event=pause")
    since = fleet.log_size("gamma.hostd")
    fleet.request("live-1", "live", source="epsilon", target="gamma")
    fleet.wait_step("gamma.hostd", '"point": "target.sync:before_event"', since)
    fleet.lab.host("epsilon").dockerd.restart()
    fleet.oracle.resume("epsilon")
    assert fleet.present("epsilon", "live").attrs["State"]["Pid"] == pid
    fleet.execute("epsilon", "live", "echo two >> /data/file")
    fleet.failpoints("hostd/gamma", "")
    fleet.wait_end("live-1", "completed")
    assert fleet.execute("gamma", "live", "cat /data/file").split() == ["one", "two"]
