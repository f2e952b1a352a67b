"""What every store promises about plain keys, leases, registrations and elections."""

from __future__ import annotations

import threading
import time

import pytest

from events.errors import ConflictError
from events.memory import Fault, MemoryStore
from events.store import PAGE_KEYS, Election, Lease, LeaseGoneError, Put, Registration
from tests.contract.conftest import Bench
from tests.support.records import append, wait_until


def test_a_key_is_read_as_it_was_put(bench: Bench) -> None:
    key = bench.keys.request("web-7")
    revision = bench.store.put(key, b'{"container":"web"}')
    stored = bench.another().get(key)
    assert stored is not None
    assert (stored.key, stored.value, stored.mod_revision) == (key, b'{"container":"web"}', revision)
    assert bench.store.get(bench.keys.request("web-8")) is None


def test_keys_and_values_may_hold_any_bytes(bench: Bench) -> None:
    """F2: people put garbage."""
    key = bench.keys.requests + "\udcff\udc00/\n\x00 ü".replace("\udc00", "\udc80")
    bench.store.put(key, bytes(range(256)))
    (found,) = bench.store.range(bench.keys.requests)
    assert (found.key, found.value) == (key, bytes(range(256)))
    assert bench.store.delete(found.key)
    assert bench.store.range(bench.keys.requests) == []


def test_a_range_over_several_pages_is_whole_and_sorted(bench: Bench) -> None:
    names = [f"{number:05d}" for number in range(PAGE_KEYS * 2 + 3)]
    for start in range(0, len(names), 100):
        puts = [Put(bench.keys.requests + name, name.encode()) for name in names[start : start + 100]]
        bench.store.transact((), puts)
    bench.store.put(bench.keys.control("neighbour"), b"")
    found = bench.store.range(bench.keys.requests)
    assert [kv.value.decode() for kv in found] == names


def test_pages_of_large_values_are_read_whole(bench: Bench) -> None:
    """A burst of large garbage must not make a range unreadable."""
    for number in range(50):
        bench.store.put(f"{bench.keys.requests}{number:03d}", b"x" * 1_450_000)
    found = bench.store.range(bench.keys.requests)
    assert sum(len(kv.value) for kv in found) == 50 * 1_450_000
    assert bench.store.delete_prefix(bench.keys.requests) == 50


def test_put_if_absent_writes_once(bench: Bench) -> None:
    key = bench.keys.placement("web")
    assert bench.store.put_if_absent(key, b"1")
    assert not bench.another().put_if_absent(key, b"2")
    stored = bench.store.get(key)
    assert stored is not None
    assert stored.value == b"1"


@pytest.mark.parametrize("fault", ["applied_lost", "not_applied", "applied_late"])
def test_compare_and_put_is_settled_after_a_lost_reply(bench: Bench, fault: Fault) -> None:
    """E4: our own write is recognised and not taken for a rival's."""
    key = bench.keys.placement("web")
    revision = bench.store.put(key, b"1")
    bench.fail_next(fault)
    assert bench.store.compare_and_put(key, b"2", revision) > revision
    with pytest.raises(ConflictError):
        bench.store.compare_and_put(key, b"3", revision)


def test_a_look_tells_place_by_place_what_is_there(bench: Bench) -> None:
    """B9: a slash at the end asks for what lies below; without it a key is asked for, and not its longer neighbours."""
    keys = bench.keys
    for host in ("alpha", "alpha2"):
        bench.store.put(keys.host(host), host.encode())
    newest = [bench.store.put(keys.inbox_pointer("alpha", name), name.encode()) for name in ("m1", "m2")]
    host, missing, inbox = bench.store.look(keys.host("alpha"), keys.host("gamma"), keys.inbox("alpha"))
    assert [(kv.key, kv.value) for kv in host] == [(keys.host("alpha"), b"alpha")]
    assert missing == []
    assert [kv.value for kv in inbox] == [b"m1", b"m2"]
    assert [kv.mod_revision for kv in inbox] == newest


def test_a_look_leaves_nothing_out_however_much_there_is(bench: Bench) -> None:
    keys = bench.keys
    number = PAGE_KEYS + 10
    for start in range(0, number, 85):
        names = range(start, min(start + 85, number))
        bench.store.transact((), [Put(keys.inbox_pointer("alpha", f"m{name:04d}"), b"") for name in names])
    bench.store.put(keys.host("alpha"), b"here")
    inbox, host = bench.store.look(keys.inbox("alpha"), keys.host("alpha"))
    assert len(inbox) == number
    assert [kv.value for kv in host] == [b"here"]


def test_a_key_can_be_deleted_only_as_of_a_revision(bench: Bench) -> None:
    key = bench.keys.control("web-7")
    old = bench.store.put(key, b"pause")
    new = bench.store.put(key, b"resume")
    assert not bench.store.delete(key, old)
    assert bench.store.delete(key, new)
    assert not bench.store.delete(key)


def test_delete_prefix_removes_everything_below_and_nothing_beside(bench: Bench) -> None:
    """E6: in batches that etcd accepts."""
    for start in range(0, 240, 80):
        puts = [Put(f"{bench.keys.progress_of('m1')}{number}", b"") for number in range(start, start + 80)]
        bench.store.transact((), puts)
    bench.store.put(bench.keys.progress("m2", "alpha"), b"")
    assert bench.store.delete_prefix(bench.keys.progress_of("m1")) == 240
    assert len(bench.store.range(bench.keys.progresses)) == 1


@pytest.mark.parametrize("prefix", ["", "/", "/contractual"])
def test_delete_prefix_refuses_to_leave_the_keyspace(bench: Bench, prefix: str) -> None:
    with pytest.raises(ValueError, match="nothing was removed"):
        bench.store.delete_prefix(prefix)


def test_keys_go_when_their_lease_runs_out(bench: Bench) -> None:
    """B12: only keys put under the lease go."""
    lease = bench.store.lease(1)
    bench.store.put(bench.keys.host("alpha"), b"here", lease)
    bench.store.put(bench.keys.host("beta"), b"stays")
    wait_until(lambda: bench.store.get(bench.keys.host("alpha")) is None, "the lease runs out")
    assert not lease.refresh()
    assert not lease.alive
    assert [kv.value for kv in bench.store.range(bench.keys.hosts)] == [b"stays"]


def test_a_refreshed_lease_outlives_its_ttl(bench: Bench) -> None:
    """E21: which is the server's, whatever was asked for."""
    lease = bench.store.lease(4)
    bench.store.put(bench.keys.host("alpha"), b"here", lease)
    pause = threading.Event()
    for _ in range(lease.ttl_seconds * 4):  # a busy machine may take its time between two of them
        assert lease.refresh()
        pause.wait(0.3)
    assert bench.store.get(bench.keys.host("alpha")) is not None
    lease.revoke()
    assert bench.store.get(bench.keys.host("alpha")) is None
    lease.revoke()


def test_a_key_cannot_be_put_under_a_dead_lease(bench: Bench) -> None:
    lease = bench.store.lease(5)
    lease.revoke()
    with pytest.raises(LeaseGoneError):
        bench.store.put(bench.keys.host("alpha"), b"here", lease)
    with pytest.raises(LeaseGoneError):
        bench.store.put_if_absent(bench.keys.host("alpha"), b"here", lease)
    assert bench.store.get(bench.keys.host("alpha")) is None


def test_a_registration_stays_when_its_lease_or_key_is_lost(bench: Bench) -> None:
    """B12, E23: the host comes back by itself: it reads its key instead of believing that its lease lives."""
    key = bench.keys.host("alpha")
    registration = Registration(bench.store, key, 1, b"one")
    try:
        wait_until(lambda: bench.store.get(key) is not None, "the first registration")
        first = registration.lease
        assert first is not None
        bench.another().revoke(first.id)
        wait_until(lambda: bench.store.get(key) is not None, "a new lease")
        bench.another().delete(key)
        wait_until(lambda: bench.store.get(key) is not None, "the key again")
        registration.update(b"two")
        wait_until(lambda: getattr(bench.store.get(key), "value", b"") == b"two", "the new value")
    finally:
        registration.close()
    assert bench.store.get(key) is None


def test_a_registration_that_is_kept_along_with_a_look_needs_no_turns_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B12: the look has read the key; what is wrong with it is mended all the same."""
    key = bench.keys.host("alpha")
    refreshed: list[str] = []
    refresh = Lease.refresh

    def noted(lease: Lease) -> bool:
        refreshed.append(threading.current_thread().name)
        return refresh(lease)

    monkeypatch.setattr(Lease, "refresh", noted)
    registration = Registration(bench.store, key, 6, b"one")
    try:
        wait_until(lambda: bench.store.get(key) is not None, "the first registration")
        began = time.monotonic()
        while time.monotonic() - began < 3.0:  # longer than the two seconds between two turns of its own
            registration.turn_along(bench.store.look(key)[0][0])
            threading.Event().wait(0.2)
        assert set(refreshed) == {threading.current_thread().name}
        registration.update(b"two", soon=False)
        for spoil in (lambda _: None, lambda _: bench.another().delete(key), bench.another().revoke):
            assert registration.lease is not None
            spoil(registration.lease.id)
            registration.turn_along(bench.store.get(key))
            wait_until(lambda: getattr(bench.store.get(key), "value", b"") == b"two", "what is to be shown")
    finally:
        registration.close()


def test_a_registration_that_nobody_keeps_along_keeps_itself(bench: Bench) -> None:
    """B12: a consumer that is busy looks around rarely."""
    key = bench.keys.host("alpha")
    registration = Registration(bench.store, key, 1, b"one")
    try:
        wait_until(lambda: bench.store.get(key) is not None, "the first registration")
        registration.turn_along(bench.store.get(key))
        bench.another().delete(key)
        wait_until(lambda: bench.store.get(key) is not None, "the key again")
    finally:
        registration.close()


def test_two_candidates_lead_one_after_the_other(bench: Bench) -> None:
    first = Election(bench.store, bench.keys.leader, "one", 5)
    second = Election(bench.another(), bench.keys.leader, "two", 5)
    try:
        guard = first.attempt()
        assert guard is not None
        assert second.attempt() is None
        assert first.attempt() == guard
        first.resign()
        follower_guard = second.attempt()
        assert follower_guard is not None
        assert follower_guard.create_revision > guard.create_revision
    finally:
        first.resign()
        second.resign()
    assert bench.store.get(bench.keys.leader) is None


def test_a_candidate_takes_over_when_the_leaders_lease_runs_out(bench: Bench) -> None:
    """A1, E22: the leader is gone without a word, or believes in a lease that has run out; what it appends is refused."""
    gone = Election(bench.store, bench.keys.leader, "gone", 1, background=False)
    guard = gone.attempt()
    assert guard is not None
    append(bench.store, "m1", None, guard=guard)
    heir = Election(bench.another(), bench.keys.leader, "heir", 5)
    try:
        assert heir.campaign(threading.Event()) is not None
        (event,) = bench.store.read("m1")
        with pytest.raises(ConflictError):
            append(bench.store, "m1", event, guard=guard)
        gone.turn()
        assert gone.guard is None
    finally:
        heir.resign()


def test_a_leader_keeps_its_key_beyond_the_ttl_and_notices_when_it_is_taken_away(bench: Bench) -> None:
    election = Election(bench.store, bench.keys.leader, "one", 1)
    try:
        guard = election.attempt()
        threading.Event().wait(2.5)
        assert election.guard == guard
        bench.another().delete(bench.keys.leader)
        wait_until(lambda: election.guard is None, "the loss is noticed")
        assert election.attempt() is not None
    finally:
        election.resign()


def test_a_campaign_ends_when_it_is_told_to(bench: Bench) -> None:
    bench.store.put(bench.keys.leader, b"somebody")
    stop = threading.Event()
    waiting = Election(bench.store, bench.keys.leader, "two", 5)
    threading.Timer(0.2, stop.set).start()
    assert waiting.campaign(stop) is None
    waiting.resign()


def test_in_memory_leases_run_by_the_given_clock() -> None:
    """P18: nothing in the simulator depends on real time."""
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])
    lease = store.lease(10)
    store.put(store.keys.host("alpha"), b"", lease)
    now[0] = 9.9
    assert store.get(store.keys.host("alpha")) is not None
    assert lease.refresh()
    now[0] = 19.8
    assert lease.refresh()
    now[0] = 29.8
    assert store.get(store.keys.host("alpha")) is None
    assert not lease.refresh()
