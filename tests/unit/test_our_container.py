"""Which container on the target is the migration's own, whatever people do to names and labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.schema import TargetStarted
from hostd.effects.arrival import our_container
from hostd.effects.base import Context

STARTED = TargetStarted(container_id="ours", started_at="then")


def found(rows: dict[str, str], started: TargetStarted | None = None) -> str | None:
    """``rows``: id → name of each container that has the migration's label."""
    summaries = [SimpleNamespace(id=key, name=name) for key, name in rows.items()]
    engine = SimpleNamespace(find_by_label=lambda _label, _value: summaries)
    facts: dict[str, Any] = {"target_started": started} if started else {}
    view = SimpleNamespace(facts=facts, source_prepared=SimpleNamespace(container_name="web"))
    context = SimpleNamespace(bench=SimpleNamespace(engine=engine), migration="web-1", view=view)
    return our_container(cast(Context, context))


@pytest.mark.parametrize("started", [None, STARTED])
def test_a_container_that_a_person_has_renamed_is_still_ours(started: TargetStarted | None) -> None:
    """F4, P1: one that is thought gone would run on beside the source's."""
    assert found({"ours": "renamed"}, started) == "ours"


def test_of_several_that_have_not_started_it_is_the_one_of_that_name() -> None:
    """F6"""
    assert found({"other": "renamed", "ours": "web"}) == "ours"


@pytest.mark.parametrize("name", ["web", "copy"])
def test_a_container_of_an_image_that_was_made_of_ours_is_not_ours(name: str) -> None:
    """F4: ``docker commit`` passes the labels on."""
    assert found({"a-copy": name, "ours": "renamed"}, STARTED) == "ours"
    assert found({"a-copy": name}, STARTED) is None


def test_nothing_is_ours_where_no_container_has_the_label() -> None:
    assert found({}) is None
    assert found({}, STARTED) is None
