"""What every store promises to those who follow a prefix: all of it, once, in order."""

from __future__ import annotations

import threading

from events.store import Changes, Item, Put, Snapshot, Tick
from tests.contract.conftest import Bench
from tests.support.records import Mirror, append, history


def test_a_follower_begins_with_what_is_there_and_goes_on_with_what_changes(bench: Bench) -> None:
    """E33: a watch begins right after a revision that was read, never further ahead."""
    key = bench.keys.request("one")
    bench.store.put(key, b"1")
    bench.store.put(bench.keys.control("one"), b"not followed")
    with bench.store.follow(bench.keys.requests) as follower:
        first = follower.poll(10)
        assert isinstance(first, Snapshot)
        assert [(kv.key, kv.value) for kv in first.items] == [(key, b"1")]
        assert not first.resync
        bench.another().put(key, b"2")
        bench.another().put(bench.keys.control("one"), b"still not followed")
        bench.another().delete(key)
        told = [follower.poll(10), follower.poll(10)]
    assert [change.value for item in told if isinstance(item, Changes) for change in item.changes] == [
        b"2",
        None,
    ]


def test_all_changes_of_one_revision_come_together(bench: Bench) -> None:
    """B11, E16: a transaction is never told in halves, so the next revision is where one goes on."""
    with bench.store.follow(bench.keys.migrations) as follower:
        follower.poll(10)
        append(bench.store, "m1", None)
        item = follower.poll(10)
    assert isinstance(item, Changes)
    assert {change.key for change in item.changes} == {bench.keys.event("m1", 1), bench.keys.head("m1")}


def test_a_large_transaction_is_told_whole(bench: Bench) -> None:
    """E15: more than fits one message of a watch."""
    with bench.store.follow(bench.keys.requests) as follower:
        mirror = Mirror(follower)
        mirror.take_one()
        puts = [Put(f"{bench.keys.requests}{number}", b"x" * 14_000) for number in range(100)]
        for _ in range(4):
            bench.store.transact((), puts)
        item = mirror.take_one()
        assert isinstance(item, Changes)
        assert len(item.changes) == 100
        mirror.take_until(lambda: len(mirror.seen) == 400)


def test_several_prefixes_are_followed_at_once(bench: Bench) -> None:
    bench.store.put(bench.keys.request("one"), b"1")
    with bench.store.follow([bench.keys.requests, bench.keys.inbox("alpha")]) as follower:
        snapshots = [follower.poll(10), follower.poll(10)]
        assert {item.prefix for item in snapshots if item is not None} == {
            bench.keys.requests,
            bench.keys.inbox("alpha"),
        }
        append(bench.store, "m1", None, notify=("alpha", "beta"))
        item = follower.poll(10)
        assert isinstance(item, Changes)
        assert item.prefix == bench.keys.inbox("alpha")
        assert [change.key for change in item.changes] == [bench.keys.inbox_pointer("alpha", "m1")]


def test_a_follower_can_do_without_the_contents_at_the_start(bench: Bench) -> None:
    history(bench.store, "m1", 3)
    with bench.store.follow(bench.keys.migrations, contents=False) as follower:
        first = follower.poll(10)
        assert isinstance(first, Snapshot)
        assert (first.items, first.revision) == ([], bench.store.revision())
        append(bench.store, "m2", None)
        assert isinstance(follower.poll(10), Changes)


def test_nothing_is_lost_while_changes_arrive_from_many_writers(bench: Bench) -> None:
    """E13: ordered, unique, complete."""
    with bench.store.follow(bench.keys.requests) as follower:
        mirror = Mirror(follower)
        mirror.take_one()
        stores = [bench.another() for _ in range(3)]

        def write(number: int) -> None:
            for count in range(50):
                stores[number].put(bench.keys.request(f"{number}-{count % 7}"), str(count).encode())

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        mirror.take_until(lambda: len(mirror.seen) == 150)
        for thread in threads:
            thread.join()
        assert mirror.follower.poll(0.1) is None
    assert mirror.values == {kv.key: kv.value for kv in bench.store.range(bench.keys.requests)}


def test_changes_that_a_follower_has_not_taken_yet_survive_a_compaction(bench: Bench) -> None:
    """B6: either it still gets them, or it is told to take the state anew; the result is the same."""
    with bench.store.follow(bench.keys.requests) as follower:
        mirror = Mirror(follower)
        mirror.take_one()
        for number in range(20):
            bench.store.put(bench.keys.request(f"r{number % 3}"), str(number).encode())
        bench.store.delete(bench.keys.request("r0"))
        bench.compact()
        bench.store.put(bench.keys.request("last"), b"1")
        mirror.take_until(lambda: bench.keys.request("last") in mirror.values)
    assert mirror.values == {kv.key: kv.value for kv in bench.store.range(bench.keys.requests)}


def test_the_end_of_a_lease_is_told(bench: Bench) -> None:
    with bench.store.follow(bench.keys.hosts) as follower:
        mirror = Mirror(follower)
        bench.store.put(bench.keys.host("alpha"), b"", bench.store.lease(1))
        mirror.take_until(lambda: mirror.values != {})
        mirror.take_until(lambda: mirror.values == {})


def test_iterating_ticks_in_silence_and_ends_when_told(bench: Bench) -> None:
    """B9: a consumer gets to look for itself although nothing comes."""
    stop = threading.Event()
    taken: list[Item] = []
    for item in bench.store.follow(bench.keys.requests, stop=stop, tick_seconds=0.1):
        taken.append(item)
        if len(taken) == 3:
            stop.set()
    assert isinstance(taken[0], Snapshot)
    assert taken[1:] == [Tick(), Tick()]


def test_closing_a_follower_wakes_its_consumer(bench: Bench) -> None:
    follower = bench.store.follow(bench.keys.requests)
    follower.poll(10)
    ended = threading.Event()

    def consume() -> None:
        for _ in follower:
            pass
        ended.set()

    thread = threading.Thread(target=consume)
    thread.start()
    follower.close()
    assert ended.wait(5)
    thread.join()
    follower.close()
