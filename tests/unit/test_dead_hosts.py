"""For every place of a migration there is a sentence about either host's death, and none that could hurt."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.dead_hosts import if_source_is_dead, if_target_is_dead
from coordinator.lifecycle import AFTER_CLAIM, BEFORE_CLAIM, TABLE, Lifecycle
from events.schema import Request

REQUEST = Request(container="web", source="alpha", target="beta")
SILENT_SOURCE = {"new", "rejected", "aborted", "finalise", "finalised"}
SILENT_TARGET = {"new", "rejected", "aborted", "rolled_back"}


def at(state: str, **more: object) -> Lifecycle:
    request = None if state == "new" else REQUEST
    return replace(Lifecycle(state=state, request=request), **more)


@pytest.mark.parametrize("state", TABLE.states)
def test_every_place_has_a_sentence_for_either_host(state: str) -> None:
    """P13: a wait for a dead host names the next step."""
    assert bool(if_source_is_dead(at(state))) == (state not in SILENT_SOURCE)
    assert bool(if_target_is_dead(at(state))) == (state not in SILENT_TARGET)


@pytest.mark.parametrize("state", BEFORE_CLAIM)
def test_before_the_claim_a_dead_target_is_answered_by_an_abort(state: str) -> None:
    """A10, C3: nothing can run there, so giving up is safe."""
    assert "`abort` is safe" in if_target_is_dead(at(state))


@pytest.mark.parametrize("state", AFTER_CLAIM)
def test_after_the_claim_a_dead_target_needs_a_person_who_vouches(state: str) -> None:
    """P12, C4: it may run there, and what it wrote is there alone."""
    said = if_target_is_dead(at(state))
    assert ("--target-off" in said) == at(state).reversible
    assert "`abort`" not in said


def test_a_stopped_container_is_never_said_to_be_on_the_target() -> None:
    """A9, B2: the copy over there is not complete, whoever asks."""
    said = if_source_is_dead(at("cut_over", source_stopped=True))
    assert "bring alpha back" in said
    assert "do not start anything from it" in said
    assert "do not start anything from it" in if_source_is_dead(at("cut_over"))


def test_without_a_copy_on_the_source_nobody_is_sent_there() -> None:
    said = if_target_is_dead(at("completed", kept_as=None))
    assert "the copy on alpha is gone" in said
    assert "--target-off" not in said
