"""Whose a container's stop was, a person's or that of a Docker which went away; and what looking at Docker costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.memory import MemoryStore
from events.records import decode_host
from hostd.engine_calls import ContainerSummary, DiskFree, DockerEvent, EngineInfo
from hostd.moves import Moves
from hostd.spec import data_mounts
from hostd.telling import FORGIVEN_SECONDS, Telling
from tests.support.inspected import container

INFO = EngineInfo(
    engine_version="20.10",
    api_version="1.41",
    storage_driver="overlay2",
    containerd_snapshotter=False,
    cgroup_version="1",
    live_restore=False,
    userns_remap=False,
    data_root="/var/lib/docker",
    host_name="alpha",
    kernel="6.1",
    architecture="x86_64",
    runtimes=("runc",),
)


@pytest.mark.parametrize(
    ("before_loss", "left"),
    [(FORGIVEN_SECONDS / 2, set()), (FORGIVEN_SECONDS * 2, {"c"})],
)
def test_what_docker_stopped_as_it_went_down_is_not_a_persons_stop_however_long_it_was_away(
    monkeypatch: pytest.MonkeyPatch, before_loss: float, left: set[str]
) -> None:
    """A12: a dockerd that came back after 40 s had the container stay down."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    changed: list[str] = []

    def events(_stop: object) -> Iterator[DockerEvent]:
        yield DockerEvent(kind="resync")
        yield DockerEvent(kind="container", action="kill", id="c")
        clock[0] += before_loss
        for _ in range(100):  # each attempt to reach it again that fails
            yield DockerEvent(kind="lost")
            clock[0] += FORGIVEN_SECONDS
        changed.clear()
        yield DockerEvent(kind="resync")

    bench = SimpleNamespace(
        settings=SimpleNamespace(name="beta"),
        engine=SimpleNamespace(events=events),
        manual_stops={},
        guarded={"c": "m"},
    )
    telling = Telling(
        cast(Any, SimpleNamespace(keys=None)), cast(Any, None), cast(Any, bench), changed.append, cast(Any, None)
    )
    telling._listen()
    assert bench.manual_stops.keys() == left
    assert changed == ["m"]


# --- what a look costs ---------------------------------------------------------------------------------------

RAW = container()


class Docker:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.rows = [summary(RAW["Id"], "running")]
        self.free = 1000

    def containers(self) -> list[ContainerSummary]:
        self.asked.append("list")
        return list(self.rows)

    def inspect_all(self, rows: Sequence[ContainerSummary]) -> list[dict[str, Any]]:
        self.asked += ["inspect"] * len(rows)
        return [RAW for _ in rows]

    def info(self) -> EngineInfo:
        self.asked.append("info")
        return INFO

    def volumes(self) -> list[dict[str, Any]]:
        self.asked.append("volumes")
        return []

    def networks(self) -> dict[str, dict[str, Any]]:
        self.asked.append("networks")
        return {}

    def disk_free(self, data_root: str) -> DiskFree:
        assert data_root == INFO.data_root
        return DiskFree(free_bytes=self.free, free_inodes=1)


class Shown:
    """The host's registration."""

    def __init__(self) -> None:
        self.values: list[tuple[int, bool]] = []

    def update(self, value: bytes, *, soon: bool = True) -> None:
        self.values.append((decode_host(value).free_bytes, soon))


def summary(container_id: str, state: str) -> ContainerSummary:
    return ContainerSummary(
        id=container_id, name="web", image="i", image_id="i", state=state, labels={}, volumes=(), published=()
    )


def told(docker: Docker) -> tuple[Telling, Shown, MemoryStore]:
    store, shown = MemoryStore(), Shown()
    settings = SimpleNamespace(
        name="alpha", address="192.0.2.1", ssh_port=22, shared_file_systems=frozenset(), moves=Moves()
    )
    bench = SimpleNamespace(settings=settings, engine=docker, boot="b", manual_stops={}, guarded={})
    return Telling(store, cast(Any, shown), cast(Any, bench), lambda _: None, cast(Any, None)), shown, store


def test_a_look_that_nothing_woke_asks_docker_for_its_list_alone() -> None:
    """An idle agent must cost next to nothing; free space is told all the same."""
    docker = Docker()
    telling, shown, store = told(docker)
    telling._publish_once(whole=False)
    assert "inspect" in docker.asked, "the first look is a whole one"
    docker.asked.clear()
    docker.free = 900
    asked = [mount.tree for mount in data_mounts(RAW)]
    assert asked
    telling._sizer._known.clear()
    telling._publish_once(whole=False)
    assert docker.asked == ["list"]
    assert sorted(telling._sizer._known) == sorted(asked), "a size that nobody asks about is forgotten"
    assert shown.values == [(1000, True), (900, False)]
    assert store.get(store.keys.inventory_item("alpha", "web")) is not None


@pytest.mark.parametrize("why", ["woken", "another list", "trouble before"])
def test_whatever_may_have_changed_makes_it_look_at_everything(why: str) -> None:
    """Docker keeps 256 events only: one that was lost shows in the list."""
    docker = Docker()
    telling, shown, _ = told(docker)
    telling._publish_once(whole=False)
    docker.asked.clear()
    if why == "another list":
        docker.rows = [summary(RAW["Id"], "exited")]
    if why == "trouble before":
        telling._record = None
    telling._publish_once(whole=why == "woken")
    assert "inspect" in docker.asked
    assert shown.values[-1] == (1000, True)
    docker.asked.clear()
    telling._publish_once(whole=False)
    assert docker.asked == ["list"]


@pytest.mark.parametrize(
    ("action", "looks"),
    [("exec_create: redis-cli ping", False), ("exec_start: redis-cli ping", False), ("exec_die", False), ("die", True)],
)
def test_a_health_check_that_looks_makes_the_agent_look_at_nothing(action: str, looks: bool) -> None:
    """Docker tells three events for every look of every health check on the host."""
    bench = SimpleNamespace(
        settings=SimpleNamespace(name="alpha"),
        engine=SimpleNamespace(events=lambda _: iter([DockerEvent(kind="container", action=action, id="c")])),
        manual_stops={},
        guarded={},
    )
    telling = Telling(
        cast(Any, SimpleNamespace(keys=None)), cast(Any, None), cast(Any, bench), lambda _: None, cast(Any, None)
    )
    telling._listen()
    assert telling._dirty.is_set() is looks
