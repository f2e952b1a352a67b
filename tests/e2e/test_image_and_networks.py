"""What a container needs besides its data: its image and its networks arrive too, and go again when it does not stay."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import Any

import docker.errors
import docker.types
import pytest

from coordinator import lifecycle
from events import schema
from events.records import decode_placement
from events.schema import Event
from labkit.waiting import wait_until
from tests.support.fleet import ON_A_UNION, Container, Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

SLEEP = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
LAYER_BYTES = 300_000


def reasons_of(events: list[Event]) -> str:
    """Why the migration was aborted."""
    return next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))


def has_image(fleet: Fleet, host: str, reference: str) -> bool:
    try:
        fleet.docker[host].images.get(reference)
    except docker.errors.ImageNotFound:
        return False
    return True


def build(fleet: Fleet, tag: str, script: str, base: str = "busybox") -> str:
    """On alpha only: an image with one layer more than ``base``, which both hosts have. Returns its id."""
    builder = fleet.docker["alpha"].containers.create(fleet.images[base], command=["sh", "-ec", script])
    builder.start()
    assert builder.wait()["StatusCode"] == 0
    repository, _, version = tag.rpartition(":")
    image = builder.commit(repository, version)
    builder.remove()

    def forget() -> None:
        for client in fleet.docker.values():
            for container in client.containers.list(all=True, filters={"ancestor": image.id}):
                container.remove(force=True)
            for reference in (tag, image.id):
                if reference in {name for known in client.images.list() for name in (known.id, *known.tags)}:
                    client.images.remove(reference, force=True)

    fleet.at_end(forget)
    fleet.images = {**fleet.images, tag: tag}
    return str(image.id)


def payload(path: str = "/payload") -> str:
    return f"head -c {LAYER_BYTES} /dev/urandom > {path}"


def network(fleet: Fleet, name: str, subnet: str, *, host: str = "alpha", **more: Any) -> Any:
    """A bridge network on ``host``; whatever has that name is removed from both hosts in the end."""
    pool = docker.types.IPAMPool(subnet=subnet, gateway=subnet.replace(".0/24", ".254"))
    made = fleet.docker[host].networks.create(name, ipam=docker.types.IPAMConfig(pool_configs=[pool]), **more)

    fleet.forget_network(name)
    return made


def networks_of(fleet: Fleet, host: str) -> set[str]:
    return {known.name for known in fleet.docker[host].networks.list()}


def placed_on(fleet: Fleet, container: str) -> str:
    found = fleet.store.get(fleet.keys.placement(container))
    return decode_placement(found.value).host if found is not None else ""


# --- the image ---------------------------------------------------------------------------------------


def test_of_a_missing_image_only_the_missing_layer_travels_before_the_stop(fleet: Fleet) -> None:
    """F8: the image is brought host to host."""
    image_id = build(fleet, "shop/web:7", payload())
    fleet.docker["alpha"].images.get(image_id).tag("shop/web", "newest")
    digest = fleet.docker["alpha"].containers.run("shop/web:7", ["sha256sum", "/payload"], remove=True, stdout=True)
    fleet.sleeper("carried", image="shop/web:7", volumes={"carried-data": {"bind": "/data"}})
    events = fleet.migrate("carried-1", "carried")

    types = [event.type for event in events]
    assert types.index("image_wanted") < types.index("image_packed") < types.index("target_prepared")
    wanted = next(event.data for event in events if isinstance(event.data, schema.ImageWanted))
    packed = next(event.data for event in events if isinstance(event.data, schema.ImagePacked))
    base = fleet.docker["beta"].images.get(fleet.images["busybox"])
    assert list(wanted.layers) == base.attrs["RootFS"]["Layers"]
    assert packed.layers == 1
    assert LAYER_BYTES < packed.archive.size_bytes < LAYER_BYTES + 100_000
    assert packed.left_out_bytes > 500_000, "the base layer stayed where it was"
    moved = fleet.present("beta", "carried")
    assert moved.attrs["Image"] == image_id
    assert moved.attrs["Config"]["Image"] == "shop/web:7"
    assert set(fleet.docker["beta"].images.get(image_id).tags) == {"shop/web:7", "shop/web:newest"}
    assert fleet.execute("beta", "carried", "sha256sum /payload") == digest.decode()
    assert not fleet.records("alpha", "carried-1")
    assert not fleet.lab.host("beta").path("/var/lib/cargo/migrations/carried-1/image.tar").exists()
    fleet.assert_sound("carried-1")


def test_a_missing_image_travels_with_progress_and_no_registry_is_asked_although_one_has_it(fleet: Fleet) -> None:
    """F8: the image's name leads to a registry that answers; it is asked for nothing."""
    tag = f"{fleet.registry('alpha')}/shop/slowimage:1"
    size_bytes = 6_000_000
    image_id = build(fleet, tag, f"head -c {size_bytes} /dev/urandom > /payload")
    fleet.docker["alpha"].images.push(tag)
    fleet.sleeper("slowimage", image=tag)
    since = fleet.log_size("alpha.registry")
    fleet.request("slowimage-1", "slowimage", bwlimit_kib=2000)
    seen: list[dict[str, Any]] = []

    def travels() -> bool:
        told = json.loads(fleet.cargoctl("status", "slowimage-1", "--json").stdout)["progress"].get("beta", {})
        seen.append(told)
        return told.get("phase") == "image" and 0 < told["bytes"] < told["total_bytes"]

    wait_until(travels, f"nobody says how far the image is: {seen}", 30)
    assert size_bytes < seen[-1]["total_bytes"] < size_bytes + 100_000
    assert fleet.running("alpha", "slowimage"), "before the stop"
    fleet.wait_end("slowimage-1", "completed")
    assert fleet.docker["beta"].images.get(image_id).tags == [tag]
    told = (fleet.lab.spec.logs / "alpha.registry.log").read_bytes()[since:]
    assert b"/v2/" not in told, told.decode(errors="replace")
    fleet.assert_sound("slowimage-1")


def test_an_image_for_another_architecture_is_refused_although_it_runs_on_the_source(fleet: Fleet) -> None:
    """F8: what it says of itself counts, before anything stops."""
    image_id = foreign(fleet, fleet.images["busybox"], "shop/foreign:1")
    fleet.sleeper("foreign", image="shop/foreign:1")
    assert fleet.present("alpha", "foreign").attrs["Image"] == image_id
    fleet.request("foreign-1", "foreign")
    events = fleet.wait_end("foreign-1", "aborted")
    assert "the image is for s390x, the target is" in reasons_of(events)
    assert not {"source_stopped", "image_wanted"} & {event.type for event in events}
    assert fleet.running("alpha", "foreign")
    fleet.assert_clean("beta", "foreign-1")


def foreign(fleet: Fleet, tag: str, name: str) -> str:
    """On alpha: the image ``tag`` under ``name``, which says that it is for another architecture. Returns its id."""
    client = fleet.docker["alpha"]
    given, made = io.BytesIO(b"".join(client.images.get(tag).save())), io.BytesIO()
    with tarfile.open(fileobj=given) as old, tarfile.open(fileobj=made, mode="w") as new:
        [manifest] = json.load(old.extractfile("manifest.json") or io.BytesIO())
        for member in old:
            data = old.extractfile(member)
            raw = data.read() if data is not None else b""
            if member.name == manifest["Config"]:
                raw = json.dumps({**json.loads(raw), "architecture": "s390x"}).encode()
            elif member.name == "manifest.json":
                raw = json.dumps([{**manifest, "RepoTags": [name]}]).encode()
            if member.name != "repositories":
                member.size = len(raw)
                new.addfile(member, io.BytesIO(raw) if data is not None else None)
    [image] = client.images.load(made.getvalue())

    def forget() -> None:
        for container in client.containers.list(all=True, filters={"ancestor": image.id}):
            container.remove(force=True)
        client.images.remove(name, force=True)

    fleet.at_end(forget)
    fleet.images = {**fleet.images, name: name}
    return str(image.id)


def test_an_abort_removes_the_image_that_was_brought_and_no_other(fleet: Fleet) -> None:
    image_id = build(fleet, "shop/tried:1", payload())
    fleet.docker["beta"].images.get(fleet.images["busybox"]).tag("shop/tried", "other")
    fleet.at_end(lambda: fleet.docker["beta"].images.remove("shop/tried:other"))
    fleet.docker["alpha"].images.get(image_id).tag("shop/tried", "other")
    fleet.at_end(lambda: fleet.docker["alpha"].images.remove("shop/tried:other"))
    before = {image.id for image in fleet.docker["beta"].images.list(all=True)}
    fleet.sleeper("tried", image="shop/tried:1")
    fleet.failpoints("hostd/beta", "target.create_container:after_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("tried-1", "tried")
    fleet.wait_step("beta.hostd", '"point": "target.create_container:after_effect"', since)
    assert fleet.docker["beta"].images.get(image_id).tags == ["shop/tried:1"]
    fleet.control("tried-1", "abort")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("tried-1", "aborted")
    assert {image.id for image in fleet.docker["beta"].images.list(all=True)} == before
    base = fleet.docker["beta"].images.get(fleet.images["busybox"])
    assert "shop/tried:other" in base.tags, "a name that meant something here was not taken away"
    fleet.assert_clean("beta", "tried-1")
    fleet.assert_clean("alpha", "tried-1")
    assert fleet.running("alpha", "tried")


@pytest.mark.parametrize(
    ("host", "point"),
    [
        ("alpha", "source.pack_image:after_effect=kill@1"),
        ("beta", "target.prepare:after_event=kill@1"),
        ("beta", "target.provide_image:after_effect=kill@2"),
    ],
)
def test_an_agent_that_dies_while_an_image_is_brought_goes_on_where_it_was(fleet: Fleet, host: str, point: str) -> None:
    """A2, A3, A4: what was done is observed; the way back still knows what was brought."""
    name = point.partition(":")[0].replace(".", "-")
    image_id = build(fleet, f"shop/{name}:1", payload())
    before = {image.id for image in fleet.docker["beta"].images.list(all=True)}
    fleet.sleeper(name, image=f"shop/{name}:1")
    agent = fleet.lab.host(host).hostd
    agent.stop()
    agent.start(env={"CARGO_FAILPOINTS": point})
    fleet.wait_listed("alpha", name)
    fleet.request(f"{name}-1", name)
    wait_until(lambda: not agent.running, "the agent does not die", 40)
    agent.start()
    fleet.wait_end(f"{name}-1", "completed")
    assert fleet.docker["beta"].images.get(image_id).tags == [f"shop/{name}:1"]
    assert fleet.types(f"{name}-1").count("image_packed") == 1
    fleet.control(f"{name}-1", "rollback")
    fleet.wait_end(f"{name}-1", "rolled_back")
    assert {image.id for image in fleet.docker["beta"].images.list(all=True)} == before
    fleet.assert_clean("beta", f"{name}-1")
    fleet.assert_sound(f"{name}-1")


def test_a_missing_image_that_the_request_forbids_to_bring_is_found_before_anything_stops(fleet: Fleet) -> None:
    image_id = build(fleet, "shop/refused:1", payload())
    fleet.sleeper("refused", image="shop/refused:1")
    fleet.request("refused-1", "refused", image="refuse")
    events = fleet.wait_end("refused-1", "aborted")
    assert "is not on beta" in reasons_of(events)
    assert not {"source_stopped", "image_wanted"} & {event.type for event in events}
    assert not has_image(fleet, "beta", image_id)
    assert fleet.running("alpha", "refused")


def test_an_image_is_asked_of_its_registry_only_when_the_request_says_so(fleet: Fleet) -> None:
    build(fleet, "127.0.0.1:9/pulled:1", payload())
    fleet.sleeper("pulled", image="127.0.0.1:9/pulled:1")
    fleet.request("pulled-1", "pulled", image="pull")
    failed = fleet.wait_for("pulled-1", "step_failed").data
    assert isinstance(failed, schema.StepFailed)
    assert "pulling the image '127.0.0.1:9/pulled:1'" in failed.reason
    fleet.control("pulled-1", "abort")
    events = fleet.wait_end("pulled-1", "aborted")
    assert not {"source_stopped", "image_wanted"} & {event.type for event in events}
    assert fleet.running("alpha", "pulled")
    fleet.assert_clean("beta", "pulled-1")


def test_an_image_that_is_pulled_keeps_its_digest_and_the_container_its_name_for_it(fleet: Fleet) -> None:
    """F8: asked for by digest, so a tag that has moved on in the registry means nothing."""
    tag = f"{fleet.registry('alpha')}/shop/pulled:1"
    image_id = build(fleet, tag, payload())
    alpha, beta = fleet.docker["alpha"], fleet.docker["beta"]
    alpha.images.push(tag)
    (digest,) = alpha.images.get(image_id).attrs["RepoDigests"]
    fleet.images = {**fleet.images, "by digest": digest}
    fleet.sleeper("digested", image="by digest")
    moved_on = build(fleet, tag, payload("/other"))
    alpha.images.push(tag)
    fleet.at_end(lambda: alpha.images.remove(image_id, force=True))
    fleet.at_end(lambda: [row.remove(force=True) for row in alpha.containers.list(all=True)] and None)
    events = fleet.migrate("digested-1", "digested", image="pull", on_release="remove")
    assert "image_wanted" not in {event.type for event in events}
    moved = fleet.present("beta", "digested").attrs
    assert (moved["Image"], moved["Config"]["Image"]) == (image_id, digest)
    assert beta.images.get(image_id).attrs["RepoDigests"] == [digest]
    assert not has_image(fleet, "beta", moved_on)
    fleet.present("beta", "digested").remove(force=True)
    beta.images.remove(image_id, force=True)


def test_what_the_image_has_at_a_mounts_place_does_not_appear_in_the_data(fleet: Fleet) -> None:
    """Docker fills an empty volume from the image; the source's volume is not empty of it by chance."""
    build(fleet, "shop/filled:1", "mkdir -p /data/inside && echo image > /data/from-image && echo x > /data/inside/x")
    place = fleet.volume("alpha", "plain-data")
    fleet.sleeper("plain", image="shop/filled:1", volumes={"plain-data": {"bind": "/data"}})
    fleet.execute("alpha", "plain", "rm -r /data/inside /data/from-image; echo mine > /data/mine")
    assert sorted(os.listdir(place)) == ["mine"]
    fleet.migrate("plain-1", "plain")
    assert fleet.execute("beta", "plain", "ls -A /data; cat /data/mine").split() == ["mine", "mine"]
    fleet.control("plain-1", "finalise")
    fleet.wait_for("plain-1", "finalised")
    fleet.wait_running("beta", "plain")
    assert fleet.execute("beta", "plain", "ls -A /data").split() == ["mine"]


# --- networks ----------------------------------------------------------------------------------------


def on_two_networks(fleet: Fleet, name: str) -> Container:
    """A container on two networks of its own, with aliases and fixed addresses."""
    network(fleet, "front", "10.201.0.0/24", labels={"team": "web"}, options={"com.docker.network.driver.mtu": "1400"})
    back = network(fleet, "back", "10.202.0.0/24", internal=True)
    client = fleet.docker["alpha"]
    endpoint = client.api.create_endpoint_config(ipv4_address="10.201.0.7", aliases=["www"])
    made = client.api.create_container(
        fleet.images["busybox"],
        command=SLEEP,
        name=name,
        labels={"cargo.test": name},
        networking_config=client.api.create_networking_config({"front": endpoint}),
        host_config=client.api.create_host_config(network_mode="front"),
    )
    back.connect(made["Id"], ipv4_address="10.202.0.9", aliases=["store", "keep"])
    container: Container = client.containers.get(made["Id"])
    container.start()
    fleet.wait_listed("alpha", name)
    return container


def endpoints(container: Container) -> dict[str, tuple[str, frozenset[str]]]:
    own = container.id[:12]
    return {
        name: (endpoint["IPAddress"], frozenset(endpoint["Aliases"] or ()) - {own})
        for name, endpoint in container.attrs["NetworkSettings"]["Networks"].items()
    }


def test_a_container_arrives_on_all_its_networks_and_the_placement_key_follows_it(fleet: Fleet) -> None:
    """F10: networks are created where they are missing, and everybody is told where the container is."""
    before = endpoints_of = on_two_networks(fleet, "wired")
    before.reload()
    expected = endpoints(endpoints_of)
    assert expected == {
        "front": ("10.201.0.7", frozenset({"www"})),
        "back": ("10.202.0.9", frozenset({"store", "keep"})),
    }
    fleet.migrate("wired-1", "wired")
    moved = fleet.present("beta", "wired")
    assert endpoints(moved) == expected
    made = {known.name: known.attrs for known in fleet.docker["beta"].networks.list(names=["front", "back"])}
    original = {known.name: known.attrs for known in fleet.docker["alpha"].networks.list(names=["front", "back"])}
    for name in ("front", "back"):
        for field in ("Driver", "IPAM", "Internal", "Attachable", "EnableIPv6", "Options"):
            assert made[name][field] == original[name][field], (name, field)
    assert made["front"]["Labels"] == {"team": "web", "cargo.migration": "wired-1", "cargo.source": "alpha"}

    found = fleet.store.get(fleet.keys.placement("wired"))
    assert found is not None
    placement = decode_placement(found.value)
    assert (placement.host, placement.address) == ("beta", fleet.beta.spec.address)
    assert (placement.container_id, placement.migration) == (moved.id, "wired-1")
    assert placement.networks == {"front": "10.201.0.7", "back": "10.202.0.9"}

    fleet.control("wired-1", "rollback")
    fleet.wait_end("wired-1", "rolled_back")
    assert placed_on(fleet, "wired") == "alpha"
    assert endpoints(fleet.present("alpha", "wired")) == expected
    assert not {"front", "back"} & networks_of(fleet, "beta"), "what the migration created is gone"


def test_an_abort_removes_the_networks_it_created_but_not_those_it_found(fleet: Fleet) -> None:
    network(fleet, "back", "10.202.0.0/24", host="beta")
    on_two_networks(fleet, "unwired")
    fleet.failpoints("hostd/beta", "target.create_container:after_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("unwired-1", "unwired")
    fleet.wait_step("beta.hostd", '"point": "target.create_container:after_effect"', since)
    assert {"front", "back"} <= networks_of(fleet, "beta")
    fleet.control("unwired-1", "abort")
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("unwired-1", "aborted")
    assert {"front", "back"} & networks_of(fleet, "beta") == {"back"}
    assert placed_on(fleet, "unwired") == ""
    fleet.assert_clean("beta", "unwired-1")


def test_a_network_whose_addresses_are_in_use_on_the_target_is_refused_with_the_reason(fleet: Fleet) -> None:
    network(fleet, "somebodys", "10.201.0.0/24", host="beta")
    on_two_networks(fleet, "clash")
    fleet.request("clash-1", "clash")
    reasons = reasons_of(fleet.wait_end("clash-1", "aborted"))
    assert "'front'" in reasons
    assert "10.201.0.0/24 of the network 'somebodys'" in reasons
    assert fleet.running("alpha", "clash")
    assert not {"front", "back"} & networks_of(fleet, "beta")


def test_a_placement_that_somebody_removed_is_written_again(fleet: Fleet) -> None:
    """The agent writes it with every look at the container that it supervises."""
    (fleet.volume("alpha", "lost-data") / "file").write_text("x")
    fleet.sleeper("lost", volumes={"lost-data": {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/alpha", "source.vouch_for_tracking:before_effect=pause")
    since = fleet.log_size("alpha.hostd")
    fleet.request("lost-1", "lost", **ON_A_UNION)
    fleet.wait_step("alpha.hostd", '"point": "source.vouch_for_tracking:before_effect"', since)
    fleet.execute("alpha", "lost", "echo late > /data/late")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_end("lost-1", "completed")
    assert placed_on(fleet, "lost") == "beta"
    # No restart of it: the agent may take its stop for the moment to fold the union, and supervises it no more.
    fleet.store.delete(fleet.keys.placement("lost"))
    wait_until(lambda: placed_on(fleet, "lost") == "beta", "nobody says where it is", 20)


# --- health ------------------------------------------------------------------------------------------

CHECK = "echo the password is $PASSWORD; test -e /data/well"


@pytest.mark.parametrize(("contents", "status"), [("well", "healthy"), ("ill", "unhealthy")])
def test_the_verdict_of_a_health_check_is_recorded_without_secrets(fleet: Fleet, contents: str, status: str) -> None:
    """F12: nothing is undone by itself; the way back is offered."""
    name = f"check-{contents}"
    (fleet.volume("alpha", f"{name}-data") / contents).write_text("x")
    second = 1_000_000_000
    fleet.sleeper(
        name,
        volumes={f"{name}-data": {"bind": "/data"}},
        environment={"PASSWORD": "open-sesame"},
        healthcheck={"test": ["CMD-SHELL", CHECK], "interval": second, "timeout": 5 * second, "retries": 2},
    )
    fleet.request(f"{name}-1", name)
    fleet.wait_for(f"{name}-1", "completed")
    reported = fleet.wait_for(f"{name}-1", "health_reported").data
    assert isinstance(reported, schema.HealthReported)
    assert reported.status == status
    assert reported.log == "the password is …"
    assert ("rollback" in lifecycle.waiting_for(lifecycle.fold(fleet.events(f"{name}-1")))) == (status == "unhealthy")
    fleet.wait_for(f"{name}-1", "finalised")
    assert fleet.types(f"{name}-1").count("health_reported") == 1
    assert fleet.running("beta", name)
    fleet.assert_sound(f"{name}-1")
