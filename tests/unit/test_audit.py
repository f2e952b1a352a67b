"""What ``cargoctl verify`` finds in a history, and what it does not complain of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.audit import audit, audit_together
from coordinator.recording import Recording
from events import schema
from events.schema import decode_head
from tests.support import played
from tests.support.histories import COORDINATOR, SAMPLES, SOURCE, TARGET
from tests.support.played import Player, Row, chained, rebuilt, recorded

Rows = list[Row]


def failed_to_brace() -> schema.StepFailed:
    """As targets told it between two rounds, when they still opened their views there."""
    return schema.StepFailed(step="brace", reason="the source is away", retrying=True, attempt=1, advice="wait")


LEGAL: dict[str, Callable[[], Player]] = {
    "completed": played.completed,
    "aborted": played.aborted,
    "finalised": played.finalised,
    "rolled back": played.rolled_back,
    "rolled back at once": lambda: played.rolled_back("target_claimed"),
    "rolled back after finalising": lambda: (
        played.finalised().control("rollback", discard_target_writes=True).run("rolled_back")
    ),
    "rolled back without a target": played.rolled_back_without_target,
    "aborted before anything": lambda: Player().control("abort").run("aborted"),
    "paused": lambda: Player().run("target_prepared").control("pause").control("resume").run("completed"),
    "failing for a while": lambda: (
        Player().run("target_started").fail(TARGET, "no room").control("retry").run("completed")
    ),
    "failing for good": lambda: Player().run("source_prepared").fail(TARGET, "no", retrying=False).run("aborted"),
    "failing in a step that only earlier versions have": lambda: (
        Player().run("sync_finished").tell(TARGET, failed_to_brace()).run("completed")
    ),
    "healthy": lambda: Player().run("target_started").report(TARGET, SAMPLES["health_reported"]).run("completed"),
    "image brought": lambda: (
        Player()
        .run("source_prepared")
        .report(TARGET, SAMPLES["image_wanted"])
        .report(SOURCE, SAMPLES["image_packed"])
        .run("completed")
    ),
    "cold": lambda: Player(schema.Request(container="w", source="alpha", target="beta", strategy="cold")).run(),
}


def rules(recording: Recording) -> set[str]:
    return {finding.rule for finding in audit(recording)}


@cache
def legal(name: str) -> Player:
    return LEGAL[name]()


def rows_of(name: str) -> Rows:
    return list(legal(name).rows)


def place(rows: Rows, kind: str) -> int:
    return next(at for at, row in enumerate(rows) if schema.TYPE_OF[type(row.data)] == kind)


def without(rows: Rows, kind: str) -> Rows:
    """The history as if that had never happened; later answers point where they should again."""
    at = place(rows, kind)
    return [replace(row, cause=row.cause - (row.cause > at)) for row in rows[:at] + rows[at + 1 :]]


def changed(rows: Rows, kind: str, **fields: object) -> Rows:
    at = place(rows, kind)
    data = msgspec.structs.replace(rows[at].data, **fields)
    return [*rows[:at], replace(rows[at], data=data), *rows[at + 1 :]]


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEGAL)
def test_nothing_is_found_in_what_the_cores_write(name: str) -> None:
    """P6: a history that the machines themselves wrote is well formed."""
    assert audit(legal(name).recording()) == []


@pytest.mark.parametrize("name", LEGAL)
def test_nothing_is_found_in_any_beginning_of_a_legal_history(name: str) -> None:
    """P5, P6: a migration that is still under way is sound at every event."""
    events = legal(name).events
    assert [audit(recorded(events[:length])) for length in range(1, len(events))] == [[]] * (len(events) - 1)


def test_a_rejected_request_is_sound() -> None:
    """P6: a rejection is the whole history."""
    assert audit(recorded(played.rejected())) == []


# --- the form ------------------------------------------------------------------------------------


def test_an_edited_event_breaks_the_chain_where_it_was_edited() -> None:
    """P6, B15: an edit is found, even one that leaves the event readable."""
    good = played.completed().recording()
    texts = list(good.texts)
    texts[2] = (3, texts[2][1].replace(b"/v/data/_data", b"/v/evil/_data"))
    findings = audit(replace(good, texts=tuple(texts)))
    assert [(finding.seq, finding.rule) for finding in findings] == [(4, "chain")]


def test_an_edit_of_the_newest_event_is_found_by_the_head() -> None:
    """P6, B15: nothing follows the newest event, but the head remembers it."""
    good = played.completed().recording()
    seq, text = good.texts[-1]
    forged = replace(good, texts=(*good.texts[:-1], (seq, text.replace(b"2020-", b"2021-"))))
    assert rules(forged) == {"head"}


@pytest.mark.parametrize("missing", [1, 2, 9, 17])
def test_a_missing_event_is_found_wherever_it_stood(missing: int) -> None:
    """P6, B13, B15: a gap is no shorter history."""
    good = played.completed().recording()
    cut = replace(good, texts=tuple(pair for pair in good.texts if pair[0] != missing))
    assert "sequence" in rules(cut) or (missing == len(good.texts) and "head" in rules(cut))


def test_a_tail_that_is_gone_is_found_by_the_head() -> None:
    """B13: a restored snapshot that lost the newest events does not look like a younger migration."""
    good = played.completed().recording()
    assert rules(replace(good, texts=good.texts[:-3])) == {"head"}


def test_a_head_without_events_and_events_without_a_head_are_found() -> None:
    """B15: both are what a deletion by hand leaves."""
    good = played.completed().recording()
    assert rules(replace(good, texts=())) == {"sequence"}
    assert rules(replace(good, head=None)) == {"head"}


def test_a_head_that_says_something_else_than_the_events_is_found() -> None:
    """P5: the summary is recomputed, not believed."""
    good = played.completed().recording()
    assert good.head is not None
    head = schema.encode_head(msgspec.structs.replace(decode_head(good.head), phase="fill", source="gamma"))
    findings = audit(replace(good, head=head))
    assert {finding.rule for finding in findings} == {"head"}
    assert len(findings) == 2


def test_a_key_that_belongs_nowhere_is_found() -> None:
    good = played.completed().recording()
    assert rules(replace(good, strange=("/cargo/migrations/web-1/ev/7",))) == {"key"}


def test_an_event_under_the_number_of_another_is_found() -> None:
    """P6: the key and the event say the same number."""
    good = played.completed().recording()
    texts = list(good.texts)
    texts[4], texts[5] = (5, texts[5][1]), (6, texts[4][1])
    assert {"sequence", "chain"} <= rules(replace(good, texts=tuple(texts)))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"v":2}', b'{"type":"flown"}', b"[" * 5000])
def test_what_cannot_be_read_is_a_finding_and_the_rest_is_still_looked_at(text: bytes) -> None:
    """P6, A17: an unknown or malformed event is named; it neither crashes the audit nor hides other trouble."""
    good = played.completed().recording()
    texts = list(good.texts)
    texts[5] = (6, text)
    findings = audit(replace(good, texts=tuple(texts), strange=("x",)))
    assert {"schema", "key"} <= {finding.rule for finding in findings}
    assert any(finding.seq == 6 for finding in findings)


@given(st.lists(st.tuples(st.integers(1, 40), st.binary(max_size=60))), st.none() | st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_garbage_crashes_the_audit(texts: list[tuple[int, bytes]], head: bytes | None) -> None:
    """P6: the audit works on broken histories."""
    audit(Recording("x", tuple(sorted(dict(texts).items())), head))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_change_of_one_byte_is_found(data: st.DataObject) -> None:
    """P6, B15: whichever byte of whichever event is changed, something is found."""
    good = _COMPLETED
    at = data.draw(st.integers(0, len(good.texts) - 1))
    seq, text = good.texts[at]
    byte = data.draw(st.integers(0, len(text) - 1))
    new = bytes([text[byte] ^ (1 << data.draw(st.integers(0, 7)))])
    texts = [*good.texts[:at], (seq, text[:byte] + new + text[byte + 1 :]), *good.texts[at + 1 :]]
    assert audit(replace(good, texts=tuple(texts)))


_COMPLETED = played.completed().recording()


# --- who, when, in answer to what ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "author"),
    [
        ("source_stopped", TARGET),
        ("target_claimed", SOURCE),
        ("target_started", "hostd/gamma"),
        ("completed", SOURCE),
        ("verified", COORDINATOR),
    ],
)
def test_an_event_by_somebody_who_may_not_write_it_is_found(kind: str, author: str) -> None:
    """P6: one author a type."""
    rows = rows_of("completed")
    at = place(rows, kind)
    rows[at] = replace(rows[at], by=author)
    assert "author" in rules(rebuilt(rows))


def test_an_order_of_an_older_epoch_is_found() -> None:
    """P6: no coordinator that was replaced is heard."""
    rows = rows_of("completed")
    at = place(rows, "release_ordered")
    rows[at] = replace(rows[at], epoch=6)
    assert "epoch" in rules(rebuilt(rows))


def test_an_agent_that_answers_in_an_epoch_not_in_force_is_found() -> None:
    """P6: what an agent has obeyed is the newest epoch that it has read."""
    rows = rows_of("completed")
    at = place(rows, "source_stopped")
    rows[at] = replace(rows[at], epoch=3)
    assert "epoch" in rules(rebuilt(rows))


def test_a_successor_with_a_higher_epoch_is_no_finding() -> None:
    """P6: another coordinator takes over in the middle."""
    rows = rows_of("completed")
    at = place(rows, "cutover_ordered")
    rows[at:] = [replace(row, epoch=9, by="coordinator/c2" if row.by == COORDINATOR else row.by) for row in rows[at:]]
    assert audit(rebuilt(rows)) == []


def test_an_event_id_that_is_used_twice_is_found() -> None:
    """P6: a blind repetition of an append shows."""
    rows = rows_of("completed")
    rows[5] = replace(rows[5], uuid="u3")
    assert rules(rebuilt(rows)) == {"uuid"}


def test_a_life_that_was_replaced_and_writes_again_is_found() -> None:
    """P6: two instances of one agent, or one that slept through its own replacement."""
    rows = rows_of("completed")
    mine = [at for at, row in enumerate(rows) if row.by == SOURCE]
    rows[mine[2]] = replace(rows[mine[2]], boot="second life")
    assert rules(rebuilt(rows)) == {"boot"}


def test_an_agent_that_was_restarted_once_is_no_finding() -> None:
    """P6: a new life goes on where the old one ended."""
    rows = [
        replace(row, boot="second life") if row.by == SOURCE and at > 10 else row
        for at, row in enumerate(rows_of("completed"))
    ]
    assert audit(rebuilt(rows)) == []


def test_an_outcome_that_answers_the_wrong_event_is_found() -> None:
    """P6: every outcome names the order that it answers."""
    rows = rows_of("completed")
    at = place(rows, "source_stopped")
    rows[at] = replace(rows[at], cause=rows[at].cause - 1)
    assert rules(rebuilt(rows)) == {"pairing"}


def test_an_outcome_nobody_asked_for_is_found() -> None:
    """P6: no effect without a durable event that asks for it."""
    rows = rows_of("completed")
    at = place(rows, "prepare_ordered")
    rows.insert(at + 1, Row(schema.StepFailed(step="x", reason="", retrying=True, attempt=1, advice=""), TARGET, 1))
    assert "pairing" in rules(rebuilt(rows))


# --- the promises --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("completed", "source_stopped"),
        ("completed", "target_claimed"),
        ("completed", "source_digested"),
        ("completed", "fill_finished"),
        ("completed", "verified"),
        ("completed", "release_ordered"),
        ("completed", "source_released"),
        ("completed", "sync_armed"),
        ("aborted", "abort_ordered"),
        ("aborted", "target_cleaned"),
        ("rolled back", "target_stopped"),
        ("rolled back", "carried_back"),
        ("rolled back", "source_restored"),
        ("finalised", "completed"),
    ],
)
def test_a_step_that_was_left_out_is_found(name: str, kind: str) -> None:
    """P6: what must come before an event is missed."""
    assert rules(rebuilt(without(rows_of(name), kind))) & {"order", "one runner", "rounds"}


def test_a_target_that_starts_before_the_source_has_stopped_is_found() -> None:
    """P19: the planted bug that matters most."""
    rows = rows_of("completed")
    stop, claim = place(rows, "source_stopped"), place(rows, "target_claimed")
    rows[stop], rows[claim] = rows[claim], rows[stop]
    assert "one runner" in rules(rebuilt(rows))


def test_a_source_that_runs_again_while_the_target_may_is_found() -> None:
    """P6: neither an abort after the claim nor silence gives the container back."""
    rows = rows_of("completed")
    at = place(rows, "target_started")
    rows[at + 1 :] = [Row(schema.SourceRestored(running=True), SOURCE, at + 1)]
    assert {"one runner", "order", "legality"} <= rules(rebuilt(rows))


def test_an_abort_after_the_claim_is_found() -> None:
    """P6: claim and abort contend for one number, so both cannot be there."""
    rows = rows_of("completed")
    at = place(rows, "target_claimed")
    rows[at + 1 :] = [Row(schema.AbortOrdered(reason="late"), COORDINATOR, at + 1)]
    assert {"order", "legality"} <= rules(rebuilt(rows))


def test_a_second_end_is_found() -> None:
    """P6: one end, besides what may follow a completed migration."""
    rows = rows_of("aborted")
    rows.append(Row(schema.Completed(), COORDINATOR, len(rows)))
    assert "terminal" in rules(rebuilt(rows))


def test_a_round_that_was_copied_without_being_armed_is_found() -> None:
    """P6: tracking precedes copying, round by round."""
    assert "rounds" in rules(rebuilt(changed(rows_of("completed"), "sync_finished", round=2)))


def test_a_cut_over_without_any_copy_is_found_unless_everything_counts_as_changed() -> None:
    rows = rows_of("cold")
    assert audit(rebuilt(rows)) == []
    assert "rounds" in rules(rebuilt(changed(rows, "cutover_ordered", untracked=False)))


@pytest.mark.parametrize(("kind", "field"), [("source_stopped", "dirty"), ("source_digested", "trees")])
def test_a_mount_that_was_forgotten_is_found(kind: str, field: str) -> None:
    """P6: the dirty sets and the comparison cover every mount."""
    assert "mounts" in rules(rebuilt(changed(rows_of("completed"), kind, **{field: ()})))


def test_a_comparison_that_covers_no_mount_is_found() -> None:
    """P6: `verified` names the digest of every mount."""
    assert "mounts" in rules(rebuilt(changed(rows_of("completed"), "verified", digests={})))


def test_a_copy_that_was_removed_against_the_request_is_found() -> None:
    """P6: the source's copy is kept unless the request says otherwise."""
    assert "source kept" in rules(rebuilt(changed(rows_of("completed"), "source_released", kept_as=None)))


def test_a_roll_back_to_a_copy_that_is_gone_is_found() -> None:
    """P6: without the source's copy there is nothing to go back to."""
    assert "source kept" in rules(rebuilt(changed(rows_of("rolled back"), "source_released", kept_as=None)))


def test_writes_that_were_given_up_without_a_person_are_found() -> None:
    """P6: only a person gives the target's writes up."""
    rows = changed(rows_of("rolled back"), "rollback_ordered", discard_target_writes=True, by_person=False)
    assert "writes" in rules(rebuilt(rows))


def test_writes_that_nobody_listed_are_found() -> None:
    """P6: a target that stops says what the container wrote there."""
    assert "writes" in rules(rebuilt(changed(rows_of("rolled back"), "target_stopped", trees=())))


def test_an_assertion_without_a_name_is_found() -> None:
    """P6: who vouches for a dead host is on record."""
    rows = changed(rows_of("rolled back without a target"), "target_asserted_off", who=" ")
    assert "writes" in rules(rebuilt(rows))


def test_an_order_during_a_pause_is_found() -> None:
    rows = without(rows_of("paused"), "resumed")
    assert "pause" in rules(rebuilt(rows))


def test_another_container_than_was_asked_for_is_found() -> None:
    """P6: a container that was made anew under the old name is not the one of the request."""
    assert "request" in rules(rebuilt(changed(rows_of("completed"), "source_prepared", container_id="e" * 64)))


# --- several migrations --------------------------------------------------------------------------


def test_an_event_id_that_two_migrations_share_is_found() -> None:
    """P6: event ids are unique everywhere."""
    one, two = played.completed().recording("web-1"), played.aborted().recording("web-2")
    assert {finding.rule for finding in audit_together([one, two], {})} == {"uuid"}


def test_two_migrations_of_one_container_at_a_time_are_found() -> None:
    """P6: one at a time."""
    recordings = []
    for number in (1, 2):
        rows = [replace(row, uuid=f"{number}-{at}") for at, row in enumerate(Player().run("sync_armed").rows)]
        recordings.append(recorded(chained(rows), f"web-{number}"))
    heads = {one.migration: decode_head(one.head or b"") for one in recordings}
    assert {finding.rule for finding in audit_together(recordings, heads)} == {"one migration a container"}
