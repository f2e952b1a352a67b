"""What an agent says of a container that it supervises: where it lives, and what its health check thinks."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from events.errors import SchemaError
from events.records import PlacementRecord, decode_placement, encode_placement
from events.schema import PortBinding
from hostd import source, target
from hostd.effects.announce_placement import AnnouncePlacement
from hostd.effects.base import Context, Workbench
from hostd.effects.watch_health import MAX_LOG_CHARACTERS, WatchHealth
from hostd.engine_calls import ContainerSummary
from hostd.turn import ENDS_STEP
from tests.support.histories import History
from tests.support.inspected import container

STARTED_ID = "d" * 64
"""Of the container that the histories say was started."""


@dataclass
class _Settings:
    name: str
    address: str = "10.0.0.9"
    state_dir: Path = Path("/nowhere")


class _Engine:
    """One container, which our migration made."""

    def __init__(self, raw: dict[str, Any] | None) -> None:
        self.raw = raw

    def inspect(self, _container_id: str) -> dict[str, Any] | None:
        return self.raw

    def find_by_label(self, _label: str, _value: str) -> list[ContainerSummary]:
        if self.raw is None:
            return []
        return [
            ContainerSummary(
                id=STARTED_ID, name="web", image="", image_id="", state="running", labels={}, volumes=(),
                published=(),
            )
        ]  # fmt: skip


@dataclass
class _Bench:
    settings: _Settings
    engine: _Engine
    placed: list[PlacementRecord] = field(default_factory=list)

    def place(self, container: str, record: PlacementRecord) -> None:
        assert container == record.container
        self.placed.append(record)


def surroundings(raw: dict[str, Any] | None, *, at: str = "target", after: str = "target_started") -> Context:
    plan, host = {"target": (target.PLAN, "beta"), "source": (source.PLAN, "alpha")}[at]
    history = History().up_to("target_started" if after == "health_reported" else after)
    if after == "health_reported":
        history.add("health_reported")
    return Context(
        migration="web-7",
        view=plan.fold(history.events),
        bench=cast(Workbench, _Bench(_Settings(host), _Engine(raw))),
        cancelled=threading.Event(),
        log=structlog.get_logger(),
    )


def placed(context: Context) -> list[PlacementRecord]:
    return cast(_Bench, context.bench).placed


def test_a_container_that_runs_is_said_to_live_here() -> None:
    context = surroundings(container())
    AnnouncePlacement().run(context)
    [record] = placed(context)
    assert (record.container, record.host, record.address) == ("web", "beta", "10.0.0.9")
    assert (record.migration, record.networks) == ("web-7", {"bridge": "172.17.0.2"})
    assert PortBinding(container_port="80/tcp", host_ip="0.0.0.0", host_port=8080) in record.ports
    assert decode_placement(encode_placement(record)) == record


@pytest.mark.parametrize("raw", [None, container(State__Running=False)])
def test_of_a_container_that_does_not_run_nothing_is_said(raw: dict[str, Any] | None) -> None:
    for at in ("source", "target"):
        context = surroundings(raw, at=at)
        AnnouncePlacement().run(context)
        assert placed(context) == []


def test_a_source_that_runs_it_again_says_so() -> None:
    context = surroundings(container(), at="source")
    AnnouncePlacement().run(context)
    assert [record.host for record in placed(context)] == ["alpha"]


def test_a_placement_that_is_too_large_is_not_cut() -> None:
    record = PlacementRecord(
        container="web",
        container_id="c",
        host="beta",
        address="10.0.0.9",
        networks={str(number): "10.1.1.1" for number in range(10_000)},
        migration="m",
    )
    with pytest.raises(SchemaError):
        encode_placement(record)


def health(status: str, output: str = "", **changes: Any) -> dict[str, Any]:
    raw = container(**changes)
    raw["State"]["Health"] = {"Status": status, "Log": [{"Output": "old"}, {"Output": output}]}
    return raw


def test_a_verdict_is_reported_with_the_end_of_what_was_said_but_without_secrets() -> None:
    """F14: the environment's values enter no event."""
    outcome = WatchHealth().run(surroundings(health("unhealthy", "x" * 600 + " token hush\n")))
    assert outcome is not None
    assert (outcome[ENDS_STEP], outcome["status"]) == (True, "unhealthy")
    assert outcome["log"].endswith("token …")
    assert len(outcome["log"]) == MAX_LOG_CHARACTERS


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (container(), "target_started"),
        (health("none"), "target_started"),
        (health("healthy", State__Running=False), "target_started"),
        (health("healthy"), "health_reported"),
        (None, "target_started"),
    ],
)
def test_there_is_nothing_to_report(raw: dict[str, Any] | None, after: str) -> None:
    context = surroundings(raw, after=after)
    assert WatchHealth().run(context) is None
    assert context.poke_after is None


def test_a_check_without_a_verdict_holds_up_the_folding_of_the_union_and_nothing_else() -> None:
    filling = surroundings(health("starting"))
    assert WatchHealth().run(filling) is None
    assert filling.poke_after is not None
    settled = surroundings(health("starting"), after="completed")
    assert settled.view.state == "settled"
    assert WatchHealth().run(settled) == {ENDS_STEP: True}
    assert settled.poke_after is not None
