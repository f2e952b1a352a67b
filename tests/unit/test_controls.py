"""What a person may ask of a migration under way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.controls import answer, parse
from coordinator.lifecycle import fold
from events import schema
from tests.support.histories import History


def test_a_bare_word_and_json_mean_the_same() -> None:
    assert parse(b"abort").name == parse(b' {"control": "abort"} ').name == "abort"


@pytest.mark.parametrize("raw", [b"", b"explode", b"[]", b'{"control":1}', b'{"control":"abort","x":1}', b"\xff"])
def test_what_cannot_be_understood_is_refused_with_a_reason(raw: bytes) -> None:
    reply = answer(parse(raw), fold(History().up_to("prepare_ordered").events))
    assert isinstance(reply, schema.ControlRefused)
    assert reply.reason


@given(st.binary(max_size=5000))
def test_no_control_crashes_the_parser(raw: bytes) -> None:
    parse(raw)


@pytest.mark.parametrize("reached", ["requested", "prepare_ordered", "sync_armed", "source_stopped"])
def test_an_abort_is_obeyed_before_the_claim(reached: str) -> None:
    reply = answer(parse(b'{"control":"abort","reason":"changed my mind"}'), fold(History().up_to(reached).events))
    assert reply == schema.AbortOrdered(reason="changed my mind", by_person=True)


@pytest.mark.parametrize("reached", ["target_claimed", "verified", "completed"])
def test_an_abort_after_the_claim_is_answered_with_a_reason(reached: str) -> None:
    reply = answer(parse(b"abort"), fold(History().up_to(reached).events))
    assert isinstance(reply, schema.ControlRefused)


def test_asking_twice_changes_nothing() -> None:
    history = History().up_to("prepare_ordered")
    history.add("abort_ordered")
    assert answer(parse(b"abort"), fold(history.events)) is None


def test_pausing_is_possible_until_the_stop() -> None:
    assert isinstance(answer(parse(b"pause"), fold(History().up_to("sync_armed").events)), schema.Paused)
    assert isinstance(answer(parse(b"pause"), fold(History().up_to("source_stopped").events)), schema.ControlRefused)


def test_the_limit_of_transfers_can_be_changed_while_data_travels() -> None:
    limit = parse(b'{"control":"bwlimit","kib":500}')
    history = History().up_to("target_started")
    assert answer(limit, fold(history.events)) == schema.BwlimitOrdered(kib=500)
    history.add(schema.BwlimitOrdered(kib=500))
    assert answer(limit, fold(history.events)) is None, "it is so already"
    assert answer(parse(b'{"control":"bwlimit","kib":0}'), fold(history.events)) == schema.BwlimitOrdered(kib=0)


@pytest.mark.parametrize(
    "raw",
    [b"bwlimit", b'{"control":"bwlimit"}', b'{"control":"bwlimit","kib":-1}', b'{"control":"bwlimit","kib":true}'],
)
def test_a_limit_that_is_no_number_is_refused(raw: bytes) -> None:
    assert isinstance(answer(parse(raw), fold(History().up_to("sync_armed").events)), schema.ControlRefused)


def test_a_limit_is_refused_once_everything_has_arrived() -> None:
    reply = answer(parse(b'{"control":"bwlimit","kib":5}'), fold(History().up_to("fill_finished").events))
    assert isinstance(reply, schema.ControlRefused)


def test_a_retry_is_answered_while_a_step_fails_and_refused_otherwise() -> None:
    history = History().up_to("target_started")
    assert isinstance(answer(parse(b"retry"), fold(history.events)), schema.ControlRefused)
    failed = schema.StepFailed(step="fill", reason="no room", retrying=True, attempt=1, advice="make room")
    history.add(failed, by="hostd/beta")
    reply = answer(parse(b'{"control":"retry","reason":"there is room"}'), fold(history.events))
    assert reply == schema.Resumed(by_person="there is room")


def test_a_retry_moves_no_machine() -> None:
    history = History().up_to("target_started")
    history.add(schema.StepFailed(step="fill", reason="no room", retrying=True, attempt=1, advice=""), by="hostd/beta")
    before = fold(history.events)
    history.add("resumed")
    after = fold(history.events)
    assert (after.state, after.failures, after.paused) == (before.state, before.failures, before.paused)


def test_a_retry_does_not_end_a_pause() -> None:
    history = History().up_to("sync_armed")
    history.add("paused")
    history.add(schema.StepFailed(step="sync", reason="no room", retrying=True, attempt=1, advice=""), by="hostd/beta")
    assert isinstance(answer(parse(b"retry"), fold(history.events)), schema.ControlRefused)


def test_a_target_that_dies_after_it_has_stopped_may_still_be_given_up() -> None:
    """There is always a way out: what it had listed cannot be fetched any more."""
    history = History().up_to("target_started")
    history.add("rollback_ordered")
    history.add("target_stopped")
    wish = parse(b'{"control":"rollback","discard_target_writes":true,"target_off":"ada"}')
    assert answer(wish, fold(history.events)) == schema.TargetAssertedOff(who="ada")
    history.add("target_asserted_off")
    assert answer(wish, fold(history.events)) is None
    for name in ("carried_back", "source_restored", "rolled_back"):
        history.add(name)
    assert fold(history.events).terminal
