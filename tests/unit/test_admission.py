"""F2, F3: every request that cannot work is answered with all reasons, in words, and crashes nothing."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.admission import World, examine
from events.records import ContainerRecord, HostRecord, MountRecord
from events.schema import PortBinding, Rejected, Requested

GOOD = {"container": "web", "source": "alpha", "target": "beta"}
PORT = PortBinding(container_port="80/tcp", host_ip="0.0.0.0", host_port=8080)
WEB = ContainerRecord(
    id="w" * 64,
    name="web",
    image="nginx",
    image_id="sha256:1",
    running=True,
    ports=(PORT,),
    mounts=(MountRecord(kind="volume", name="data", destination="/data", tree="/v/data/_data", size_bytes=1000),),
)


def host(name: str, **fields: Any) -> HostRecord:
    return HostRecord(host=name, address="10.0.0.1", free_bytes=10**9, **fields)


def world(**fields: Any) -> World:
    base: dict[str, Any] = {
        "hosts": {"alpha": host("alpha"), "beta": host("beta")},
        "containers": {"alpha": {"web": WEB}, "beta": {}},
    }
    return World(**(base | fields))


def reasons(request: Any, where: World | None = None, key: str = "web-7") -> str:
    raw = request if isinstance(request, bytes) else json.dumps(request).encode()
    answer = examine(key, raw, where or world())
    assert isinstance(answer, Rejected), answer
    assert answer.reasons
    return "\n".join(answer.reasons)


def test_a_good_request_is_admitted_with_its_defaults_filled_in() -> None:
    answer = examine("web-7", json.dumps(GOOD).encode(), world())
    assert isinstance(answer, Requested)
    assert answer.container_id == WEB.id
    assert answer.request.strategy == "hybrid"


@pytest.mark.parametrize(
    "raw",
    [b"", b"nonsense", b"{", b"[]", b"null", b'"web"', b"\xff\xfe", b"[" * 16_000, b'{"container":NaN}', b"1e999"],
)
def test_what_is_not_a_json_object_is_rejected(raw: bytes) -> None:
    assert "JSON" in reasons(raw)


def test_a_field_given_twice_is_rejected() -> None:
    assert "twice" in reasons(b'{"container":"a","container":"b","source":"alpha","target":"beta"}')


def test_an_oversize_request_is_rejected() -> None:
    assert "bytes long" in reasons(b" " * 20_000 + json.dumps(GOOD).encode())


def test_every_mistake_is_listed_at_once() -> None:
    text = reasons({"container": 5, "source": "alpha", "strategy": "magic", "colour": "red", "max_rounds": True})
    for part in ("'container'", "'target' is missing", "'strategy'", "'colour'", "'max_rounds'"):
        assert part in text


@pytest.mark.parametrize("key", ["", "../x", "a b", "-x", "ä", "x" * 65, "a/b", "\x00"])
def test_an_illegal_id_is_rejected(key: str) -> None:
    assert "the id" in reasons(GOOD, key=key)


def test_source_and_target_must_differ() -> None:
    """F3: before anything is asked of a host."""
    assert "must differ" in reasons({**GOOD, "target": "alpha"})


def test_unknown_and_silent_hosts_are_named_with_those_that_are_there() -> None:
    """F3: before anything is asked of a host."""
    text = reasons({**GOOD, "target": "gamma"})
    assert "'gamma'" in text
    assert "alpha, beta" in text


def test_a_container_that_is_not_there_is_named() -> None:
    assert "no container 'db' on alpha" in reasons({**GOOD, "container": "db"})


@pytest.mark.parametrize(("fields", "words"), [({"running": False}, "not running"), ({"paused": True}, "paused")])
def test_a_container_that_does_not_run_is_not_moved(fields: dict[str, bool], words: str) -> None:
    stopped = msgspec.structs.replace(WEB, **fields)
    assert words in reasons(GOOD, world(containers={"alpha": {"web": stopped}, "beta": {}}))


def test_a_container_that_is_being_moved_is_named_with_its_migration() -> None:
    assert "by migration web-6" in reasons(GOOD, world(active={WEB.id: "web-6"}))


def test_a_container_that_still_stands_on_a_union_is_refused_with_what_to_do_first() -> None:
    """F1: its stop would fold the union under the eyes of the next migration."""
    assert "`finalise` for web-5" in reasons(GOOD, world(federated_by="web-5"))


def test_a_taken_name_port_and_volume_on_the_target_are_all_listed() -> None:
    """F6, F7: collisions on the target are found before anything happens."""
    other = msgspec.structs.replace(WEB, id="o" * 64, mounts=())
    there = world(
        hosts={"alpha": host("alpha"), "beta": host("beta", volumes=("data",))},
        containers={"alpha": {"web": WEB}, "beta": {"web": other}},
    )
    text = reasons(GOOD, there)
    assert "container 'web' on beta already" in text
    assert "port 8080/tcp on beta" in text
    assert "volume 'data' on beta" in text


def test_a_stopped_container_on_the_target_holds_no_port() -> None:
    other = msgspec.structs.replace(WEB, id="o" * 64, name="other", mounts=(), running=False)
    answer = examine(
        "m", json.dumps(GOOD).encode(), world(containers={"alpha": {"web": WEB}, "beta": {"other": other}})
    )
    assert isinstance(answer, Requested)


def test_ports_on_different_addresses_do_not_collide() -> None:
    bound = msgspec.structs.replace(PORT, host_ip="10.0.0.2")
    mine = msgspec.structs.replace(WEB, ports=(msgspec.structs.replace(PORT, host_ip="10.0.0.1"),))
    other = msgspec.structs.replace(WEB, id="o" * 64, name="other", mounts=(), ports=(bound,))
    answer = examine(
        "m", json.dumps(GOOD).encode(), world(containers={"alpha": {"web": mine}, "beta": {"other": other}})
    )
    assert isinstance(answer, Requested)


def test_a_volume_that_another_running_container_uses_is_not_moved() -> None:
    """F9: the other's writes would be lost."""
    shared = msgspec.structs.replace(WEB.mounts[0], shared_with=("db",))
    text = reasons(
        GOOD, world(containers={"alpha": {"web": msgspec.structs.replace(WEB, mounts=(shared,))}, "beta": {}})
    )
    assert "'db'" in text


def test_what_the_agent_says_against_moving_a_container_is_passed_on() -> None:
    """F10: the agent's own findings reach the person."""
    refusing = msgspec.structs.replace(WEB, refusals=("the container is linked to others",))
    assert "linked to others" in reasons(GOOD, world(containers={"alpha": {"web": refusing}, "beta": {}}))


def test_too_little_space_is_found_early() -> None:
    """P17: shortage costs no downtime."""
    small = HostRecord(host="beta", address="10.0.0.2", free_bytes=500)
    assert "500 bytes free" in reasons(GOOD, world(hosts={"alpha": host("alpha"), "beta": small}))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@given(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_no_request_crashes_admission(raw: bytes) -> None:
    """F2: garbage is answered, never raised."""
    answer = examine("x", raw, world())
    assert isinstance(answer, Rejected)


@given(st.dictionaries(st.sampled_from([*GOOD, "strategy", "max_rounds", "bwlimit_kib", "on_release", "x"]), values))
def test_no_combination_of_fields_crashes_admission(fields: dict[str, Any]) -> None:
    """F2: wrong types are listed."""
    examine("x", json.dumps({**GOOD, **fields}).encode(), world())


@pytest.mark.parametrize("strategy", ["hybrid", "postcopy", "precopy", "cold", "auto"])
def test_every_strategy_may_be_asked_for(strategy: str) -> None:
    answer = examine("web-7", json.dumps(GOOD | {"strategy": strategy}).encode(), world())
    assert isinstance(answer, Requested)
    assert answer.request.strategy == strategy


@pytest.mark.parametrize("budget", [0, 2, 0.5, 3600])
def test_a_downtime_budget_is_a_number_of_seconds(budget: float) -> None:
    answer = examine("web-7", json.dumps(GOOD | {"downtime_budget_seconds": budget}).encode(), world())
    assert isinstance(answer, Requested)
    assert answer.request.downtime_budget_seconds == budget


@pytest.mark.parametrize("budget", ["-1", "3601", "1e999", '"2"', "true", "null", "[]"])
def test_anything_else_is_no_downtime_budget(budget: str) -> None:
    raw = json.dumps(GOOD).removesuffix("}") + f', "downtime_budget_seconds": {budget}}}'
    assert "'downtime_budget_seconds'" in reasons(raw.encode())
