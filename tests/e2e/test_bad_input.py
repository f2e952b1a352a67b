"""Requests and controls that cannot work, through real etcdctl puts against the running coordinator."""

from __future__ import annotations

import json
from typing import Any

import pytest

from events import schema
from events.keyspace import safe_id_for
from labkit.waiting import wait_until
from tests.support.fleet import Fleet, without_state
from tests.support.oracle import LABEL

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

GOOD: dict[str, Any] = {"container": "shop", "source": "alpha", "target": "beta"}
BURST = 1000
BURST_SECONDS = 60.0


def rejection(fleet: Fleet, migration: str, timeout_seconds: float = 10) -> schema.Rejected:
    """The answer to a request that cannot work: one event, with every reason."""

    def answered() -> bool:
        return bool(fleet.events(migration))

    wait_until(answered, f"the request {migration} is not answered", timeout_seconds)
    [event] = fleet.events(migration)
    assert isinstance(event.data, schema.Rejected), event.type
    head = fleet.store.head(migration)
    assert head is not None
    assert head.phase == "rejected"
    return event.data


# --- what is wrong in itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "value", "reasons"),
    [
        ("empty", b"", ["not valid JSON"]),
        ("cut", b'{"container": "shop", "source', ["not valid JSON"]),
        ("binary", b"\xff\xfe\x00\x01\x1b[31m", ["not valid JSON"]),
        ("deep", b"[" * 5000 + b"]" * 5000, ["not valid JSON"]),
        ("list", b'["shop", "alpha", "beta"]', ["not a JSON object"]),
        ("twice", b'{"container": "shop", "container": "other", "source": "alpha", "target": "beta"}', ["given twice"]),
        ("nan", b'{"container": "shop", "source": "alpha", "target": "beta", "max_rounds": NaN}', ["not valid JSON"]),
        ("large", json.dumps({**GOOD, "comment": "x" * 20_000}).encode(), ["the limit is"]),
        ("nothing", b"{}", ["'container' is missing", "'source' is missing", "'target' is missing"]),
        (
            "types",
            json.dumps(
                {"container": 7, "source": ["alpha"], "target": None, "max_rounds": "3", "on_release": {}}
            ).encode(),
            ["'container' is 7", "'source' is", "'target' is None", "'max_rounds' is", "'on_release' is"],
        ),
        (
            "ranges",
            json.dumps({**GOOD, "max_rounds": 0, "bwlimit_kib": -1, "stop_timeout_seconds": 1e9}).encode(),
            ["'max_rounds' is 0", "'bwlimit_kib' is -1", "'stop_timeout_seconds' is"],
        ),
        (
            "fields",
            json.dumps({**GOOD, "tempo": "presto", "Container": "shop"}).encode(),
            ["'tempo' is not a known field", "'Container' is not a known field"],
        ),
        ("strategy", json.dumps({**GOOD, "strategy": "teleport"}).encode(), ["'strategy' is", "hybrid"]),
        (
            "names",
            json.dumps({**GOOD, "container": "../../etc", "source": "a b"}).encode(),
            ["'container' is", "'source' is"],
        ),
        ("same", json.dumps({**GOOD, "target": "alpha"}).encode(), ["source and target are both 'alpha'"]),
    ],
)
def test_a_request_that_is_wrong_in_itself_is_rejected_with_every_reason(
    fleet: Fleet, what: str, value: bytes, reasons: list[str]
) -> None:
    fleet.put_request(f"bad-{what}", value)
    answer = rejection(fleet, f"bad-{what}")
    said = "\n".join(answer.reasons)
    for reason in reasons:
        assert reason in said, said
    assert "Traceback" not in said
    assert "\x1b" not in said + answer.request_text


@pytest.mark.parametrize("request_id", ["two words", "..", "a/b/c", "-dash", "é", "x" * 65, "semi;colon", "new\nline"])
def test_a_request_under_an_impossible_name_is_rejected_under_a_safe_one(fleet: Fleet, request_id: str) -> None:
    fleet.put_request(request_id, json.dumps(GOOD))
    answer = rejection(fleet, safe_id_for(request_id))
    assert any("is not usable" in reason for reason in answer.reasons)
    assert "\n" not in answer.request_key


# --- what the fleet cannot do ---------------------------------------------------------------------------


def test_a_request_that_the_fleet_cannot_serve_is_rejected_with_every_reason_and_changes_nothing(fleet: Fleet) -> None:
    """All of them at once; the last one has several reasons."""
    fleet.volume("alpha", "shared")
    for name in ("left", "right"):
        fleet.sleeper(name, volumes={"shared": {"bind": "/data"}})
    fleet.volume("alpha", "mine")
    fleet.volume("beta", "mine")
    fleet.sleeper("keeper", volumes={"mine": {"bind": "/data"}})
    (fleet.volume("alpha", "huge") / "huge").write_bytes(bytes(2_000_000))
    fleet.sleeper("fat", volumes={"huge": {"bind": "/data"}})
    fleet.sleeper("twin")
    fleet.sleeper("twin", host="beta", labels={LABEL: "another"})
    fleet.sleeper("door", ports={"80/tcp": 8081})
    fleet.sleeper("doorman", host="beta", ports={"81/tcp": ("127.0.0.1", 8081)})
    fleet.sleeper("halted").stop()
    fleet.sleeper("frozen").pause()
    fleet.run("brief", command=["sh", "-c", "sleep 100000"], remove=True)
    fleet.sleeper("socketed", volumes={"/run/docker.sock": {"bind": "/run/docker.sock"}})
    wait_until(lambda: size_listed(fleet, "fat") > 2_000_000, "the size of huge is not known", 40)
    before = snapshot(fleet)
    fleet.beta.hostd.freeze()
    fleet.at_end(fleet.beta.hostd.thaw)
    tell_free_bytes(fleet, "beta", 1_000_000)
    expected: dict[str, tuple[dict[str, Any], list[str]]] = {
        "unknown-source": ({**GOOD, "source": "omega"}, ["no agent is registered for the source 'omega'"]),
        "unknown-target": ({**GOOD, "container": "twin", "target": "omega"}, ["the target 'omega'"]),
        "no-container": ({**GOOD, "container": "ghost"}, ["there is no container 'ghost' on alpha"]),
        "not-running": ({**GOOD, "container": "halted"}, ["is not running on alpha"]),
        "paused": ({**GOOD, "container": "frozen"}, ["is paused"]),
        "name-taken": ({**GOOD, "container": "twin"}, ["there is a container 'twin' on beta already"]),
        "port-taken": ({**GOOD, "container": "door"}, ["port 8081/tcp on beta is taken by the container 'doorman'"]),
        "shared": ({**GOOD, "container": "left"}, ["also used by the running container 'right'"]),
        "volume-taken": ({**GOOD, "container": "keeper"}, ["there is a volume 'mine' on beta already"]),
        "space": ({**GOOD, "container": "fat"}, ["bytes free, the data needs"]),
        "auto-remove": ({**GOOD, "container": "brief"}, ["--rm"]),
        "socket": ({**GOOD, "container": "socketed"}, ["docker.sock"]),
        "several": (
            {**GOOD, "source": "omega", "target": "psi", "container": "ghost"},
            ["the source 'omega'", "the target 'psi'"],
        ),
    }
    for name, (value, _) in expected.items():
        fleet.put_request(f"cannot-{name}", json.dumps(value))
    for name, (_, reasons) in expected.items():
        said = "\n".join(rejection(fleet, f"cannot-{name}").reasons)
        for reason in reasons:
            assert reason in said, (name, said)
    assert snapshot(fleet) == before


def size_listed(fleet: Fleet, name: str) -> int:
    """The size of a container's data that the inventory knows."""
    found = fleet.store.get(fleet.keys.inventory_item("alpha", name))
    record = json.loads(found.value) if found else {}
    return sum(mount.get("size_bytes") or 0 for mount in record.get("mounts", []))


def tell_free_bytes(fleet: Fleet, host: str, free_bytes: int) -> None:
    """Say in that host's place that it has so much space. Its agent corrects that when it is awake."""
    key = fleet.keys.host(host)
    found = fleet.store.get(key)
    assert found is not None
    fleet.store.put(key, json.dumps({**json.loads(found.value), "free_bytes": free_bytes}).encode())


def snapshot(fleet: Fleet) -> dict[str, Any]:
    """Containers and volumes of both hosts."""
    return {
        host: (
            {found.id: without_state(found.attrs) for found in client.containers.list(all=True)},
            sorted(volume.name for volume in client.volumes.list()),
        )
        for host, client in fleet.docker.items()
    }


def test_a_host_whose_agent_has_gone_is_named_in_the_rejection(fleet: Fleet) -> None:
    fleet.sleeper("alone")
    fleet.beta.hostd.stop()
    fleet.put_request("silent-1", json.dumps({**GOOD, "container": "alone"}))
    assert "no agent is registered for the target 'beta'" in "\n".join(rejection(fleet, "silent-1").reasons)
    fleet.beta.hostd.start()
    fleet.migrate("silent-2", "alone")


def test_a_container_that_is_being_moved_is_not_moved_a_second_time(fleet: Fleet) -> None:
    fleet.sleeper("busy")
    fleet.failpoints("hostd/beta", "target.create_container:before_effect=pause")
    fleet.request("busy-1", "busy")
    fleet.wait_for("busy-1", "source_prepared")
    fleet.put_request("busy-2", json.dumps({**GOOD, "container": "busy"}))
    assert "being moved already, by migration busy-1" in "\n".join(rejection(fleet, "busy-2").reasons)
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("busy-1", "completed")
    fleet.assert_sound("busy-1")


def test_the_same_request_put_again_and_again_makes_one_migration(fleet: Fleet) -> None:
    fleet.sleeper("once")
    again = json.dumps({**GOOD, "container": "once"})
    fleet.request("once-1", "once")
    fleet.put_request("once-1", again)
    fleet.wait_for("once-1", "prepare_ordered")
    fleet.put_request("once-1", again)
    fleet.wait_end("once-1", "completed")
    fleet.wait_for("once-1", "finalised")
    seq = len(fleet.events("once-1"))
    fleet.put_request("once-1", json.dumps({**GOOD, "container": "once", "source": "beta", "target": "alpha"}))
    fleet.put_request("once-2", b"not JSON")
    rejection(fleet, "once-2")
    assert len(fleet.events("once-1")) == seq, "a key that has had its answer gets no other one"
    fleet.assert_sound("once-1")


def test_a_burst_of_garbage_leaves_the_coordinator_able_to_serve_the_next_request(fleet: Fleet) -> None:
    fleet.sleeper("calm")
    pid = fleet.lab.coordinator.pid
    garbage = [b"", b"{", b"\x00\xff", b"[]", b"null", b'{"container": 1}', b"{" * 900, b"x" * 10_000]
    for number in range(BURST):
        fleet.store.put(f"{fleet.keys.requests}burst-{number}", garbage[number % len(garbage)])
    fleet.request("calm-1", "calm")
    fleet.wait_end("calm-1", "completed", timeout_seconds=BURST_SECONDS)
    heads = fleet.store.heads().heads
    assert {heads[f"burst-{number}"].phase for number in range(BURST)} == {"rejected"}
    assert fleet.lab.coordinator.pid == pid


# --- controls -------------------------------------------------------------------------------------------


WRONG_CONTROLS: tuple[tuple[str | bytes, str], ...] = (
    ("explode", "not a known control"),
    (b"\xff\x00", "not a known control"),
    ('{"control": "abort", "force": true}', "unknown or wrongly typed options: force"),
    ('{"control": "rollback", "discard_target_writes": "yes"}', "wrongly typed"),
    ("x" * 5000, "at most"),
    ("finalise", "only a completed migration can be finalised"),
    ("rollback", "`abort` is the way back"),
    ('{"control": "rollback", "target_off": "ada"}', "discard_target_writes"),
)


def test_a_control_that_cannot_be_obeyed_is_refused_with_its_reason_and_changes_nothing(fleet: Fleet) -> None:
    fleet.sleeper("steady")
    fleet.failpoints("hostd/alpha", "source.describe_container:before_effect=pause")
    fleet.request("steady-1", "steady")
    fleet.wait_for("steady-1", "prepare_ordered")
    for wish, reason in WRONG_CONTROLS:
        fleet.control("steady-1", wish)
        refused = fleet.events("steady-1")[-1].data
        assert isinstance(refused, schema.ControlRefused), wish
        assert reason in refused.reason
    assert fleet.types("steady-1") == ["requested", "prepare_ordered", *["control_refused"] * len(WRONG_CONTROLS)]
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_end("steady-1", "completed")
    fleet.assert_sound("steady-1")


def test_a_control_for_nothing_is_taken_away_without_a_trace(fleet: Fleet) -> None:
    fleet.control("never-was", "abort")
    fleet.control("two words", "abort")
    assert fleet.store.head("never-was") is None
