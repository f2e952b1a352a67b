"""Whose a container's stop was: a person's, or that of a Docker which went away and takes its time to come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostd.engine_calls import DockerEvent
from hostd.telling import FORGIVEN_SECONDS, Telling


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
