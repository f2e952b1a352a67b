"""Records of hosts and containers, sizes, shared data and ports, without a daemon."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from events.errors import SchemaError
from events.records import (
    MAX_RECORD_BYTES,
    ContainerRecord,
    HostRecord,
    decode_container,
    decode_host,
    encode_container,
    encode_host,
)
from events.schema import Mount, PortBinding
from hostd.engine import Engine
from hostd.inventory import Place, Sizer, TreeSize, container_record, measure_tree, port_problems, sharers
from tests.support.inspected import container

HOST = HostRecord(host="alpha", address="192.0.2.1", volumes=("a", "b"))


def record_of(raw: dict[str, Any], **options: Any) -> ContainerRecord:
    known: dict[str, Any] = {"volumes": {}, "used": [], "sizer": Sizer()}
    return container_record(raw, **{**known, **options})


# --- records ---------------------------------------------------------------------------------------------


def test_records_come_back_as_they_were() -> None:
    record = record_of(container())
    assert decode_container(encode_container(record)) == record
    assert decode_host(encode_host(HOST)) == HOST


def test_a_record_holds_no_secret() -> None:
    """F14: neither environment nor label values."""
    raw = encode_container(record_of(container(Config__Labels={"password": "label-secret"})))
    assert b"hush" not in raw
    assert b"label-secret" not in raw


def test_a_container_is_described() -> None:
    record = record_of(container(Config__Labels={"cargo.migration": "m-1"}))
    assert (record.name, record.running, record.paused, record.restarts) == ("web", True, False, 2)
    assert (record.restart_policy, record.network_mode, record.networks) == (
        "on-failure",
        "default",
        ("bridge",),
    )
    assert {port.host_port for port in record.ports} == {8080}
    assert [mount.name for mount in record.mounts] == ["fa836a88", "data", "more", "/srv/www"]
    assert record.migration == "m-1"
    assert record.refusals == ()


def test_what_cannot_move_says_so_in_its_record() -> None:
    (refusal,) = record_of(container(HostConfig__AutoRemove=True)).refusals
    assert "--rm" in refusal


def test_a_container_that_is_described_in_an_unknown_way_is_not_movable() -> None:
    record = record_of(container(State="running"))
    assert record.name == "web"
    assert not record.running
    assert record.refusals


def test_a_record_too_large_is_cut_and_says_so() -> None:
    """B8: a value stays under the limit, whatever the host holds."""
    volumes = tuple(f"{number:064d}" for number in range(3000))
    raw = encode_host(msgspec.structs.replace(HOST, volumes=volumes))
    assert len(raw) <= MAX_RECORD_BYTES
    found = decode_host(raw)
    assert found.truncated
    assert found.volumes == volumes[: len(found.volumes)]
    assert len(found.volumes) > 300
    assert not decode_host(encode_host(HOST)).truncated


def test_a_record_that_cannot_be_cut_is_not_written() -> None:
    with pytest.raises(SchemaError):
        encode_host(msgspec.structs.replace(HOST, address="x" * MAX_RECORD_BYTES))
    with pytest.raises(SchemaError):
        encode_host(msgspec.structs.replace(HOST, address="\ud800"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"{}", b"\xff\xfe", b"[" * 50_000, b'{"v":1,"host":7,"address":""}', b" " * 70_000],
)
def test_what_is_no_record_is_a_schema_error(raw: bytes) -> None:
    for decode in (decode_host, decode_container):
        with pytest.raises(SchemaError):
            decode(raw)


def test_a_newer_agents_field_is_accepted_and_another_version_is_not() -> None:
    raw = encode_host(HOST)
    assert decode_host(raw[:-1] + b',"field_of_tomorrow":1}') == HOST
    with pytest.raises(SchemaError, match="version 2"):
        decode_host(raw.replace(b'"v":1', b'"v":2'))


# --- shared data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "names"),
    [("/srv/a", ("peer",)), ("/srv/a/b", ("peer",)), ("/srv", ("peer",)), ("/srv/ab", ()), ("/", ("peer",))],
)
def test_data_is_shared_with_whoever_is_at_above_or_below_it(tree: str, names: tuple[str, ...]) -> None:
    """F9: the names of the other containers are known."""
    mount = Mount(kind="bind", name=tree, destination="/x", tree=tree)
    used = [Place("peer", "/srv/a", "/srv/a"), Place("web", tree, tree)]
    assert sharers(mount, "web", used) == names


# --- sizes -----------------------------------------------------------------------------------------------


def test_a_tree_is_measured_by_what_it_occupies(tmp_path: Path) -> None:
    """D16, D15: holes take nothing, hard links count once, links are not followed."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    full = tmp_path / "tree" / "deep" / "full"
    full.write_bytes(os.urandom(1_000_000))
    os.link(full, tmp_path / "tree" / "again")
    with (tmp_path / "tree" / "sparse").open("wb") as stream:
        stream.truncate(10**12)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "big").write_bytes(os.urandom(5_000_000))
    (tmp_path / "tree" / "way-out").symlink_to(tmp_path / "outside")
    os.mkfifo(os.fsencode(tmp_path) + b"/tree/\xff\nfifo")
    size = measure_tree(str(tmp_path / "tree"))
    assert size is not None
    assert size.files == 7
    assert 1_000_000 <= size.size_bytes < 1_200_000


def test_a_single_file_has_a_size_and_a_missing_tree_has_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    size = measure_tree(str(tmp_path / "file"))
    assert size is not None
    assert size.files == 1
    assert measure_tree(str(tmp_path / "none")) is None


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def sizer_with(clock: Clock, seconds_each: float = 0.0) -> tuple[Sizer, list[str]]:
    measured: list[str] = []

    def measure(tree: str, _cancelled: Any) -> TreeSize:
        measured.append(tree)
        clock.now += seconds_each
        return TreeSize(len(measured), 1)

    return Sizer(measure, clock), measured


def test_a_size_is_unknown_until_it_was_measured() -> None:
    sizer, _ = sizer_with(Clock())
    assert sizer.size("/a") is None
    assert sizer.measure_due() == "/a"
    assert sizer.size("/a") == TreeSize(1, 1)


def test_a_tree_is_measured_again_only_after_its_pause() -> None:
    clock = Clock()
    sizer, measured = sizer_with(clock)
    sizer.size("/a")
    sizer.measure_due()
    clock.now += 599
    assert sizer.measure_due() is None
    clock.now += 2
    sizer.size("/a")
    assert sizer.measure_due() == "/a"
    assert measured == ["/a", "/a"]


def test_a_tree_that_took_long_is_measured_more_rarely() -> None:
    clock = Clock()
    sizer, _ = sizer_with(clock, seconds_each=10.0)
    sizer.size("/a")
    sizer.measure_due()
    for _ in range(6):
        clock.now += 3330
        sizer.size("/a")
        assert sizer.measure_due() is None
    clock.now += 30
    assert sizer.measure_due() == "/a"


def test_whoever_tells_the_sizes_learns_when_one_has_become_another() -> None:
    clock = Clock()
    told: list[float] = []
    sizes = iter([TreeSize(1, 1), TreeSize(1, 1), TreeSize(2, 1)])
    sizer = Sizer(lambda _tree, _cancelled: next(sizes), clock, measured=lambda: told.append(clock.now))
    for at in (0.0, 1000.0, 2000.0):
        clock.now = at
        sizer.size("/a")
        sizer.measure_due()
    assert told == [0.0, 2000.0]


def test_a_tree_that_nobody_asks_about_is_forgotten() -> None:
    clock = Clock()
    sizer, _ = sizer_with(clock)
    sizer.size("/a")
    clock.now += 3601
    assert sizer.measure_due() is None


def test_the_thread_measures_what_is_asked_for_and_ends_when_told() -> None:
    done = threading.Event()

    def measure(_tree: str, _cancelled: Any) -> TreeSize:
        done.set()
        return TreeSize(1, 1)

    sizer = Sizer(measure)
    sizer.start()
    sizer.size("/a")
    assert done.wait(20)
    sizer.stop()
    sizer.stop()


def test_a_measurement_under_way_is_given_up_when_the_sizer_ends() -> None:
    begun = threading.Event()

    def measure(_tree: str, cancelled: Any) -> None:
        begun.set()
        while not cancelled():
            pass

    sizer = Sizer(measure)
    sizer.size("/a")
    sizer.start()
    assert begun.wait(20)
    sizer.stop()


# --- ports -----------------------------------------------------------------------------------------------


class Published:
    """An engine that knows nothing but its published ports."""

    def __init__(self, **published: tuple[PortBinding, ...]) -> None:
        self._published = published

    def published_ports(self) -> dict[str, tuple[PortBinding, ...]]:
        return self._published


def binding(port: int, ip: str = "127.0.0.1", inner: str = "80/tcp") -> PortBinding:
    return PortBinding(container_port=inner, host_ip=ip, host_port=port)


def found_problems(wanted: PortBinding, **published: tuple[PortBinding, ...]) -> list[str]:
    return port_problems(cast(Engine, Published(**published)), [wanted])


def test_a_port_that_a_program_listens_on_is_taken() -> None:
    """F7: also one that Docker knows nothing of."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert found_problems(binding(port)) == [f"port {port}/tcp is taken by a program on this host"]
    assert found_problems(binding(port)) == []


def test_a_port_that_another_container_publishes_is_taken() -> None:
    """F7: also when nothing listens on it."""
    assert found_problems(binding(1, ""), peer=(binding(1, "0.0.0.0"),)) == [
        "port 1/tcp is taken by the container 'peer'"
    ]
    assert found_problems(binding(1, "127.0.0.1"), peer=(binding(1, "127.0.0.2"),)) == []
    assert found_problems(binding(1, "127.0.0.1"), peer=(binding(1, "::"),)) == []
    assert found_problems(binding(1, "127.0.0.1"), peer=(binding(1, "127.0.0.1", "80/udp"),)) == []


def test_an_address_that_the_host_lacks_is_named() -> None:
    (problem,) = found_problems(binding(8080, "192.0.2.77"))
    assert "192.0.2.77" in problem
