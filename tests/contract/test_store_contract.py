"""What every store promises about histories: appending, reading, listing. Runs on memory and on etcd."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from events.errors import ChainError, ConflictError, LostLeadershipError, SchemaError, StoreUnavailableError
from events.memory import Fault
from events.schema import Aborted, Event, PrepareOrdered, decode_event, decode_head, encode_head, head_after, next_event
from events.store import (
    FIRST_PAUSE_SECONDS,
    MAX_TRANSACTION_OPERATIONS,
    PAGE_KEYS,
    Compare,
    Delete,
    LeaderGuard,
    Outcome,
    Put,
    RightsChangedError,
    Store,
)
from tests.contract.conftest import Bench
from tests.support.records import STAMPER, append, failed, history, requested


def test_an_appended_event_is_read_back_as_it_was_written(bench: Bench) -> None:
    first = append(bench.store, "m1", None)
    second = append(bench.store, "m1", first)
    assert bench.another().read("m1") == [first, second]
    assert (first.seq, second.seq, second.prev) == (1, 2, first.digest)


def test_reading_starts_after_the_event_that_is_known(bench: Bench) -> None:
    events = history(bench.store, "m1", 4)
    assert bench.store.read("m1", 2) == events[2:]
    assert bench.store.read("m1", after=events[1]) == events[2:]
    assert bench.store.read("m1", 4) == []
    assert bench.store.read("m1", after=events[3]) == []


def test_a_migration_that_never_was_has_no_events_and_no_head(bench: Bench) -> None:
    assert bench.store.read("m1") == []
    assert bench.store.head("m1") is None


def test_event_head_and_pointers_appear_at_one_revision(bench: Bench) -> None:
    """E1: a transaction is one revision, and the next one is one more."""
    event = append(bench.store, "m1", None, notify=("alpha", "beta", "alpha"))
    kvs = [
        bench.store.get(key)
        for key in (
            bench.keys.event("m1", 1),
            bench.keys.head("m1"),
            bench.keys.inbox_pointer("alpha", "m1"),
            bench.keys.inbox_pointer("beta", "m1"),
        )
    ]
    assert len({kv.mod_revision for kv in kvs if kv is not None}) == 1
    assert None not in kvs
    head = bench.store.head("m1")
    assert head == head_after(None, event)
    before = bench.store.revision()
    append(bench.store, "m1", event, notify=("alpha",))
    assert bench.store.revision() == before + 1


def test_a_transaction_that_writes_a_key_twice_is_refused_as_a_whole(bench: Bench) -> None:
    """E2: so the event and the head have keys of their own."""
    key, other = bench.keys.request("one"), bench.keys.request("two")
    with pytest.raises(Exception, match=r"(?i)once|duplicate"):
        bench.store.transact((), (Put(other, b"1"), Put(key, b"1"), Put(key, b"2")))
    assert bench.store.get(key) is None
    assert bench.store.get(other) is None


def test_a_read_shows_what_another_process_has_just_appended_whatever_a_watch_has_told(bench: Bench) -> None:
    """E14, E20: a watch may lag, so it only wakes; what is decided upon is read, and a read is never stale."""
    with bench.store.follow(bench.keys.inbox("alpha")) as follower:
        assert follower.poll(10) is not None
        previous = None
        for seq in range(1, 21):
            previous = append(bench.another(), "m1", previous, notify=("alpha",))
            assert [event.seq for event in bench.store.read("m1")] == list(range(1, seq + 1))


def test_a_person_and_an_agent_contend_for_the_same_number_and_one_wins(bench: Bench) -> None:
    """E3: start and abort are the same event number, so there is no history that has both."""
    first = append(bench.store, "m1", None)
    outcomes: list[bool] = []

    def contend(store: Store) -> None:
        try:
            append(store, "m1", first)
            outcomes.append(True)
        except ConflictError:
            outcomes.append(False)

    threads = [threading.Thread(target=contend, args=(store,)) for store in (bench.store, bench.another())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == [False, True]
    assert [event.seq for event in bench.store.read("m1")] == [1, 2]


def test_the_second_of_two_appends_after_the_same_event_conflicts(bench: Bench) -> None:
    """B5: two coordinators, or a cloned agent: one wins, the other one is told."""
    first = append(bench.store, "m1", None)
    second = append(bench.store, "m1", first)
    with pytest.raises(ConflictError):
        append(bench.another(), "m1", first)
    with pytest.raises(ConflictError):
        append(bench.another(), "m1", None)
    assert bench.store.read("m1") == [first, second]


@pytest.mark.parametrize("fault", ["applied_lost", "not_applied", "applied_late"])
def test_a_lost_reply_still_leaves_exactly_one_event(bench: Bench, fault: Fault) -> None:
    """B4: the outcome is settled by reading the event back, never by appending blindly again."""
    first = append(bench.store, "m1", None)
    bench.fail_next(fault)
    second = append(bench.store, "m1", first)
    assert bench.store.read("m1") == [first, second]
    assert second.seq == 2


@pytest.mark.parametrize("fault", ["applied_lost", "not_applied", "applied_late"])
def test_several_lost_replies_in_a_row_still_leave_exactly_one_event(bench: Bench, fault: Fault) -> None:
    """B3: as during an election, when nothing is answered for a while."""
    bench.fail_next(fault, times=3)
    first = append(bench.store, "m1", None)
    assert bench.another().read("m1") == [first]


def test_when_no_answer_ever_comes_the_outcome_is_called_unknown(bench: Bench) -> None:
    """E4: the text must not claim that nothing was written."""
    bench.fail_next("not_applied", times=1000)
    with pytest.raises(StoreUnavailableError, match="is unknown"):
        append(bench.store, "m1", None, deadline_seconds=0.5)


def test_an_append_is_not_overtaken_for_ever_by_changes_of_rights(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B14: etcd refuses what a change of its roles came before; asked again soon, it is done within the time given."""
    refusals = iter([RightsChangedError("revision of auth store is old")] * 30)
    pauses: list[float] = []
    transact = bench.store._transact

    def refuse_first(compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        for refusal in refusals:
            raise refusal
        return transact(compares, operations)

    monkeypatch.setattr(bench.store, "_transact", refuse_first)
    monkeypatch.setattr(bench.store, "_pause", pauses.append)
    first = append(bench.store, "m1", None)
    assert bench.another().read("m1") == [first]
    assert pauses == [FIRST_PAUSE_SECONDS] * 30


def test_after_a_lost_request_somebody_elses_event_is_a_conflict(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: the read-back compares the event itself, not merely that one is there."""
    first = append(bench.store, "m1", None)
    rival = bench.another()
    won: list[Event] = []

    def let_the_rival_append(seconds: float) -> None:
        if not won:
            won.append(append(rival, "m1", first))

    bench.fail_next("not_applied")
    monkeypatch.setattr(bench.store, "_pause", let_the_rival_append)
    with pytest.raises(ConflictError):
        append(bench.store, "m1", first)
    assert bench.store.read("m1") == [first, *won]


def test_many_writers_on_one_history_leave_it_contiguous_and_complete(bench: Bench) -> None:
    """P6: every append that returned is in the history, once, and the numbers have no gap."""
    writers, each = 4, 6
    first = append(bench.store, "m1", None)
    appended: list[str] = []
    stores = [bench.another() for _ in range(writers)]

    def write(number: int) -> None:
        store = stores[number]
        for attempt in range(each):
            while True:
                newest = store.read("m1")[-1]
                try:
                    event = append(store, "m1", newest, failed(f"{number}/{attempt}"))
                except ConflictError:
                    continue
                appended.append(event.uuid)
                break

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    events = bench.store.read("m1")
    assert [event.seq for event in events] == list(range(1, writers * each + 2))
    assert sorted(event.uuid for event in events[1:]) == sorted(appended)
    assert events[0] == first


def test_an_append_under_somebody_elses_leadership_is_refused(bench: Bench) -> None:
    """E24: the guard is compared within the transaction."""
    bench.store.put(bench.keys.leader, b"me")
    mine = bench.store.get(bench.keys.leader)
    assert mine is not None
    guard = LeaderGuard(mine.key, mine.create_revision)
    first = append(bench.store, "m1", None, guard=guard)
    bench.store.delete(bench.keys.leader)
    with pytest.raises(LostLeadershipError):
        append(bench.store, "m1", first, guard=guard)
    bench.store.put(bench.keys.leader, b"somebody else")
    with pytest.raises(LostLeadershipError):
        append(bench.store, "m1", first, guard=guard)
    assert bench.store.read("m1") == [first]


def test_a_lost_reply_is_settled_even_when_leadership_went_meanwhile(bench: Bench) -> None:
    """B4: what was recorded under the guard is ours, whoever leads now."""
    bench.store.put(bench.keys.leader, b"me")
    mine = bench.store.get(bench.keys.leader)
    assert mine is not None
    bench.fail_next("applied_lost")
    event = append(bench.store, "m1", None, guard=LeaderGuard(mine.key, mine.create_revision))
    assert bench.store.read("m1") == [event]


def test_an_event_over_64_kib_is_refused_before_it_is_sent(bench: Bench) -> None:
    """B8: the limit is ours, far below etcd's."""
    before = bench.store.revision()
    with pytest.raises(SchemaError, match="limit"):
        append(bench.store, "m1", None, failed("x" * 70_000))
    assert bench.store.revision() == before


def test_a_transaction_may_have_128_operations_and_not_one_more(bench: Bench) -> None:
    """B8, E6: at the limit and one above."""
    puts = [Put(f"{bench.keys.placements}c{number}", b"") for number in range(MAX_TRANSACTION_OPERATIONS)]
    assert bench.store.transact((), puts).succeeded
    with pytest.raises(SchemaError, match="128"):
        bench.store.transact((), [*puts, Put(f"{bench.keys.placements}more", b"")])
    hosts = tuple(f"h{number}" for number in range(MAX_TRANSACTION_OPERATIONS - 2))
    first = append(bench.store, "m1", None, notify=hosts)
    with pytest.raises(SchemaError, match="128"):
        append(bench.store, "m1", first, notify=(*hosts, "one-more"))
    assert bench.store.read("m1") == [first]


def test_a_request_larger_than_etcd_takes_is_refused_before_it_is_sent(bench: Bench) -> None:
    """B8, E5: 1.5 MiB."""
    key = bench.keys.host("alpha")
    bench.store.put(key, b"x" * 1_499_000)
    with pytest.raises(SchemaError, match="limit"):
        bench.store.put(key, b"x" * 1_500_000)


def test_a_wiped_prefix_is_never_read_as_no_migration(bench: Bench) -> None:
    """B15: somebody deleted the keys by hand."""
    events = history(bench.store, "m1", 3)
    bench.store.delete_prefix(bench.keys.migrations)
    with pytest.raises(ChainError):
        append(bench.store, "m1", events[-1])
    with pytest.raises(ChainError):
        bench.store.read("m1", after=events[-1])
    with pytest.raises(ChainError):
        bench.store.read("m1", 3)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_history_with_a_missing_event_cannot_be_read(bench: Bench, missing: int) -> None:
    """B15: a gap at the start, in the middle or at the end."""
    history(bench.store, "m1", 3)
    bench.store.delete(bench.keys.event("m1", missing))
    with pytest.raises(ChainError):
        bench.store.read("m1")


def test_a_history_without_its_head_cannot_be_read_or_continued(bench: Bench) -> None:
    """B15: the head alone was deleted."""
    events = history(bench.store, "m1", 2)
    bench.store.delete(bench.keys.head("m1"))
    with pytest.raises(ChainError):
        bench.store.read("m1")
    with pytest.raises(ChainError):
        append(bench.store, "m1", events[-1])
    with pytest.raises(ConflictError):
        append(bench.store, "m1", None)


def test_an_edited_event_is_noticed_by_the_hash_chain(bench: Bench) -> None:
    """B15: somebody changed what an event says."""
    events = history(bench.store, "m1", 3)
    edited = events[1].raw.replace(b'"epoch":1', b'"epoch":2')
    bench.store.put(bench.keys.event("m1", 2), edited)
    decode_event(edited)
    with pytest.raises(ChainError):
        bench.store.read("m1")
    with pytest.raises(ChainError):
        bench.store.read("m1", after=events[1])


def test_a_history_that_lost_its_tail_and_head_is_noticed_by_who_knew_more(bench: Bench) -> None:
    """B13: an older state came back."""
    events = history(bench.store, "m1", 2)
    old_head = bench.store.get(bench.keys.head("m1"))
    assert old_head is not None
    third = append(bench.store, "m1", events[-1])
    bench.store.put(bench.keys.head("m1"), old_head.value)
    bench.store.delete(bench.keys.event("m1", 3))
    assert bench.store.read("m1") == events
    with pytest.raises(ChainError):
        append(bench.store, "m1", third)
    with pytest.raises(ChainError):
        bench.store.read("m1", after=third)


def test_an_unknown_event_type_is_refused_and_not_skipped(bench: Bench) -> None:
    """A17: a newer process wrote something that this one does not know."""
    first = append(bench.store, "m1", None)
    newer = next_event(first, PrepareOrdered(), cause=1, stamp=STAMPER.stamp(1)).raw
    bench.store.put(bench.keys.event("m1", 2), newer.replace(b"prepare_ordered", b"teleport_ordered"))
    with pytest.raises(SchemaError, match="teleport_ordered"):
        bench.store.read("m1")


def test_strange_keys_among_the_events_are_named(bench: Bench) -> None:
    """B15: a key that is no event must not pass for one, nor hide one."""
    history(bench.store, "m1", 2)
    bench.store.put(bench.keys.events("m1") + "7", b"{}")
    with pytest.raises(ChainError, match="no event"):
        bench.store.read("m1")


def test_a_history_longer_than_a_page_is_read_whole(bench: Bench) -> None:
    count = PAGE_KEYS + 20
    event = None
    operations: list[Put] = []
    head = None
    for _ in range(count):
        event = next_event(event, requested() if event is None else PrepareOrdered(), cause=0, stamp=STAMPER.stamp(1))
        head = head_after(head, event)
        operations.append(Put(bench.keys.event("m1", event.seq), event.raw))
    for start in range(0, count, 100):
        bench.store.transact((), operations[start : start + 100])
    assert event is not None
    assert head is not None
    bench.store.put(bench.keys.head("m1"), encode_head(head))
    assert [found.seq for found in bench.store.read("m1")] == list(range(1, count + 1))
    assert append(bench.store, "m1", event).seq == count + 1


def test_heads_lists_every_migration_and_names_the_broken_ones(bench: Bench) -> None:
    for number in range(12):
        history(bench.store, f"m{number}", 1 + number % 3)
    bench.store.put(bench.keys.head("unreadable"), b"\xff{")
    bench.store.put(bench.keys.event("headless", 1), b"{}")
    bench.store.put(bench.keys.migrations + "m3", b"a key with no slash")
    bench.store.put(bench.keys.migrations + "m3/zzz", b"after the head")
    bench.store.put(bench.keys.migrations + "m3-more/ev/000000000001", b"{}")
    bench.store.put(bench.keys.migrations + "bad id/\udcff\udc80", b"bytes that are no UTF-8")
    found = bench.store.heads()
    assert {name: head.seq for name, head in found.heads.items()} == {
        f"m{number}": 1 + number % 3 for number in range(12)
    }
    assert set(found.broken) == {
        "unreadable",
        "headless",
        "m3-more",
        bench.keys.migrations + "m3",
        bench.keys.migrations + "bad id/\udcff\udc80",
    }


def test_histories_are_what_reading_each_one_would_give(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("events.store.PAGE_KEYS", 7)
    for number in range(12):
        history(bench.store, f"m{number}", 1 + number % 3)
    bench.store.put(bench.keys.migrations + "m3/zzz", b"after the head")
    found, heads = bench.store.histories(), bench.store.heads()
    assert found.heads == heads.heads
    assert found.events == {migration: bench.store.read(migration) for migration in heads.heads}
    assert not found.broken


def test_histories_leave_out_the_events_of_what_has_ended(bench: Bench) -> None:
    event = append(bench.store, "ended", None)
    append(bench.store, "ended", event, Aborted())
    append(bench.store, "under-way", None)
    found = bench.store.histories()
    assert set(found.heads) == {"ended", "under-way"}
    assert set(found.events) == {"under-way"}


def test_histories_name_what_cannot_be_used_and_still_give_the_rest(bench: Bench) -> None:
    """B15: a history that was cut is an alarm, never an absence, and holds up nobody else."""
    history(bench.store, "whole", 3)
    history(bench.store, "cut", 3)
    bench.store.delete(bench.keys.event("cut", 3))
    bench.store.put(bench.keys.head("unreadable"), b"\xff{")
    bench.store.put(bench.keys.event("headless", 1), b"{}")
    bench.store.put(bench.keys.migrations + "m3", b"a key with no slash")
    bench.store.put(bench.keys.migrations + "bad id/\udcff\udc80", b"bytes that are no UTF-8")
    found = bench.store.histories()
    assert set(found.events) == {"whole"}
    assert set(found.heads) == {"whole", "cut"}
    assert set(found.broken) == set(bench.store.heads().broken) | {"cut"}


def test_no_migrations_means_no_heads(bench: Bench) -> None:
    bench.store.put(bench.keys.request("m1"), b"{}")
    found = bench.store.heads()
    assert (found.heads, found.broken) == ({}, {})


def test_a_compaction_loses_nothing_of_a_history(bench: Bench) -> None:
    """B6, E10: one key per event, so nothing is superseded."""
    events = history(bench.store, "m1", 5)
    bench.compact()
    assert bench.store.read("m1") == events
    assert append(bench.store, "m1", events[-1]).seq == 6


def test_conditions_on_absent_keys_compare_with_zero(bench: Bench) -> None:
    key = bench.keys.host("alpha")
    for what in ("version", "mod", "create"):
        outcome = bench.store.transact((Compare(key, what, 0),), ())
        assert outcome.succeeded
    bench.store.put(key, b"1")
    bench.store.put(key, b"2")
    stored = bench.store.get(key)
    assert stored is not None
    assert stored.mod_revision > stored.create_revision
    assert bench.store.transact((Compare(key, "version", 2),), ()).succeeded
    assert bench.store.transact((Compare(key, "mod", stored.mod_revision),), ()).succeeded
    assert bench.store.transact((Compare(key, "create", stored.create_revision),), ()).succeeded
    assert not bench.store.transact((Compare(key, "create", stored.mod_revision),), ()).succeeded


def test_the_head_follows_the_newest_event(bench: Bench) -> None:
    events = history(bench.store, "m1", 3)
    stored = bench.store.get(bench.keys.head("m1"))
    assert stored is not None
    head = decode_head(stored.value)
    assert (head.seq, head.uuid, head.digest, head.phase) == (
        3,
        events[-1].uuid,
        events[-1].digest,
        "prepare",
    )
    assert (head.container, head.source, head.target) == ("web", "alpha", "beta")
