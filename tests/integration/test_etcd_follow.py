"""Following a real etcd through crashes, freezes, elections, cuts and compactions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from events.errors import WrongClusterError
from events.etcd import EtcdStore, _Connections, _EtcdWatchSession, _WatchConnection
from events.store import Put, Tick
from tests.support.etcd import EtcdCluster, etcd_cluster
from tests.support.proxy import Proxy
from tests.support.records import Mirror, append, failed, wait_until

pytestmark = pytest.mark.etcd


@pytest.fixture
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
def store(etcd: EtcdCluster) -> Iterator[EtcdStore]:
    made = EtcdStore(etcd.endpoints)
    yield made
    made.close()


def put_by_another_process(etcd: EtcdCluster, key: str, value: str) -> None:
    done = etcd.etcdctl("put", key, value)
    assert done.returncode == 0, done.stderr


def test_nothing_is_lost_or_repeated_when_etcd_is_killed_and_started_again(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B1, E16: another process appends before the follower is back."""
    with store.follow(store.keys.requests) as follower:
        mirror = Mirror(follower)
        mirror.take_one()
        for life in range(3):
            put_by_another_process(etcd, store.keys.request(f"before-{life}"), "1")
            etcd.members[0].kill()
            etcd.members[0].start()
            etcd.wait_until_healthy()
            for number in range(5):
                put_by_another_process(etcd, store.keys.request(f"after-{life}-{number}"), "1")
        mirror.take_until(lambda: len(mirror.seen) == 3 * 6)
        assert mirror.resyncs == 0
    assert set(mirror.values) == {kv.key for kv in store.range(store.keys.requests)}


def test_an_outage_costs_almost_no_cpu_and_is_named(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B1: waiting for etcd must not take the machine from the containers."""
    stop = threading.Event()
    with store.follow(store.keys.requests, stop=stop) as follower:
        follower.poll(10)
        etcd.members[0].kill()
        wait_until(lambda: follower.trouble != "", "the outage is noticed")
        used = time.process_time()
        assert follower.poll(3.0) is None
        assert time.process_time() - used < 0.3
        (tick,) = [next(iter(follower))]
        assert isinstance(tick, Tick)
        assert "did not answer" in tick.trouble
        etcd.members[0].start()
        etcd.wait_until_healthy()
        wait_until(lambda: follower.trouble == "", "the end of the outage is noticed")


def test_a_frozen_member_is_noticed_and_left() -> None:
    """B9: a watch on a member that answers nothing, though its connection stays open."""
    with etcd_cluster(3) as etcd:
        writer = EtcdStore(etcd.endpoints[::-1], call_timeout_seconds=1.0)
        store = EtcdStore(etcd.endpoints, call_timeout_seconds=1.0)
        with store.follow(store.keys.requests) as follower:
            mirror = Mirror(follower)
            mirror.take_one()
            writer.put(store.keys.request("before"), b"1")
            mirror.take_until(lambda: len(mirror.seen) == 1)
            watched = follower._watching._connections.address  # type: ignore[attr-defined]
            (frozen,) = [member for member in etcd.members if member.endpoint == watched]
            frozen.freeze()
            writer.put(store.keys.request("meanwhile"), b"1")
            mirror.take_until(lambda: len(mirror.seen) == 2, 40)
            frozen.thaw()
            writer.put(store.keys.request("after"), b"1")
            mirror.take_until(lambda: len(mirror.seen) == 3)
        store.close()
        writer.close()


def test_killing_the_leader_loses_no_event_and_breaks_no_history() -> None:
    """B3: appends and a follower go on through an election."""
    with etcd_cluster(3) as etcd:
        stores = [EtcdStore(etcd.endpoints[turn:] + etcd.endpoints[:turn]) for turn in range(3)]
        failures: list[BaseException] = []

        def write(number: int) -> None:
            try:
                event = append(stores[number], f"m{number}", None)
                for count in range(40):
                    event = append(stores[number], f"m{number}", event, failed(str(count)))
            except BaseException as error:
                failures.append(error)
                raise

        with stores[2].follow(stores[2].keys.migrations) as follower:
            mirror = Mirror(follower)
            mirror.take_one()
            threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            mirror.take_until(lambda: len(mirror.seen) >= 20)
            etcd.leader().kill()
            for thread in threads:
                thread.join(60)
            assert failures == []
            mirror.take_until(lambda: len(mirror.seen) == 2 * 2 * 41)
        for number in range(2):
            events = stores[2].read(f"m{number}")
            assert [event.seq for event in events] == list(range(1, 42))
        for store in stores:
            store.close()


def test_a_compaction_during_a_cut_leads_to_a_fresh_state(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B6: the revisions in between are gone, so the follower reads the prefix anew and says so."""
    proxy = Proxy(etcd.endpoints[0])
    behind = EtcdStore([proxy.endpoint])
    with behind.follow(store.keys.requests) as follower:
        mirror = Mirror(follower)
        store.put(store.keys.request("goes"), b"1")
        store.put(store.keys.request("stays"), b"1")
        mirror.take_until(lambda: len(mirror.values) == 2)
        proxy.mode = "cut"
        wait_until(lambda: follower.trouble != "", "the cut is noticed")
        store.delete(store.keys.request("goes"))
        store.put(store.keys.request("stays"), b"2")
        revision = store.put(store.keys.request("comes"), b"1")
        assert etcd.etcdctl("compact", str(revision)).returncode == 0
        proxy.mode = "open"
        mirror.take_until(lambda: mirror.resyncs == 1)
        store.put(store.keys.request("later"), b"1")
        mirror.take_until(lambda: store.keys.request("later") in mirror.values)
    assert mirror.values == {kv.key: kv.value for kv in store.range(store.keys.requests)}
    behind.close()
    proxy.close()


def test_changes_made_during_a_cut_are_told_once_it_ends(etcd: EtcdCluster, store: EtcdStore) -> None:
    """C5: a link that comes and goes; no resync is needed while nothing was compacted."""
    proxy = Proxy(etcd.endpoints[0])
    behind = EtcdStore([proxy.endpoint])
    with behind.follow(store.keys.requests) as follower:
        mirror = Mirror(follower)
        mirror.take_one()
        for number in range(4):
            proxy.mode = "cut"
            store.transact((), [Put(store.keys.request(f"{number}-{part}"), b"") for part in range(10)])
            proxy.mode = "open"
            store.put(store.keys.request(f"{number}-more"), b"")
        mirror.take_until(lambda: len(mirror.seen) == 44)
    assert mirror.resyncs == 0
    behind.close()
    proxy.close()


def test_a_revision_that_comes_in_fragments_is_told_whole(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B11, E15: catching up on large revisions makes etcd split them over several messages."""
    start = store.put(store.keys.control("start"), b"")
    for _ in range(6):
        store.transact((), [Put(store.keys.request(f"{part:03d}"), b"x" * 14_000) for part in range(100)])
    fragments = 0

    class Counting(_EtcdWatchSession):
        def _batch(self, response):  # type: ignore[no-untyped-def]
            nonlocal fragments
            batch = super()._batch(response)
            fragments += batch is None
            return batch

    connections = _Connections(etcd.endpoints, store._access)
    session = Counting(store, connections, {store.keys.requests: start})
    told = 0
    for batch in session:
        revisions = {change.mod_revision for change in batch.changes}
        assert len(batch.changes) == 100 * len(revisions)
        told += len(batch.changes)
        if told == 600:
            break
    session.close()
    connections.close()
    assert fragments > 0


def test_a_watch_from_a_compacted_revision_says_so(etcd: EtcdCluster, store: EtcdStore) -> None:
    """E12: which is how a follower learns that it must read anew."""
    for number in range(5):
        store.put(store.keys.request("one"), str(number).encode())
    assert etcd.etcdctl("compact", str(store.revision())).returncode == 0
    watching = _WatchConnection(store, _Connections(etcd.endpoints, store._access))
    session = watching.open_watches({store.keys.requests: 1})
    assert any(batch.compacted for batch in session)
    session.close()
    watching.close()


def test_a_follower_stops_at_another_cluster(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B17: the endpoint now belongs to somebody else; its emptiness means nothing."""
    with store.follow(store.keys.requests) as follower:
        follower.poll(10)
        replace_by_an_empty_cluster(etcd)
        deadline = time.monotonic() + 15
        with pytest.raises(WrongClusterError):
            while time.monotonic() < deadline:
                assert follower.poll(0.5) is None


def replace_by_an_empty_cluster(etcd: EtcdCluster) -> None:
    """Another cluster at the same endpoint: nothing in it, another id."""
    member = etcd.members[0]
    member.kill()
    member.data_directory = member.data_directory.with_suffix(".other")
    member.arguments = [
        argument for argument in member.arguments if not argument.startswith(("--data-dir", "--initial-cluster-token"))
    ]
    member.arguments += [f"--data-dir={member.data_directory}", "--initial-cluster-token=another"]
    member.start()
    etcd.wait_until_healthy()
