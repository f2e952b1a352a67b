"""Appending to a real etcd that loses replies, freezes, refuses, runs full or is not the one it was."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from events.errors import ChainError, StoreUnavailableError, WrongClusterError
from events.etcd import EtcdAccess, EtcdStore
from events.schema import Event
from tests.integration.test_etcd_follow import replace_by_an_empty_cluster
from tests.support.etcd import EtcdCluster, etcd_cluster, free_port
from tests.support.proxy import Proxy
from tests.support.records import append, failed, history

pytestmark = pytest.mark.etcd


@pytest.fixture
def etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture
def store(etcd: EtcdCluster) -> Iterator[EtcdStore]:
    made = EtcdStore(etcd.endpoints, call_timeout_seconds=1.0)
    yield made
    made.close()


class Appending(threading.Thread):
    """Appends in the background."""

    def __init__(self, store: EtcdStore, previous: Event) -> None:
        super().__init__()
        self._store, self._previous = store, previous
        self.result: Event | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = append(self._store, "m1", self._previous)
        except BaseException as error:
            self.result = error


def test_an_append_whose_replies_are_swallowed_is_recorded_once(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B4: applied, but the reply never arrives; when the link is back the event is found to be ours."""
    proxy = Proxy(etcd.endpoints[0])
    behind = EtcdStore([proxy.endpoint], call_timeout_seconds=1.0)
    first = append(behind, "m1", None)
    original = behind._transact

    def transact_into_silence(*arguments):  # type: ignore[no-untyped-def]
        if not proxy.swallowed.is_set():
            proxy.mode = "swallow_replies"
        return original(*arguments)

    behind._transact = transact_into_silence  # type: ignore[method-assign]
    appending = Appending(behind, first)
    assert proxy.swallowed.wait(10)
    proxy.mode = "open"
    appending.join(30)
    assert store.read("m1") == [first, appending.result]
    behind.close()
    proxy.close()


def test_an_append_to_a_frozen_etcd_is_recorded_once_when_it_thaws(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B16: the request lies in a queue while it is repeated; both are answered, one is recorded."""
    first = append(store, "m1", None)
    etcd.members[0].freeze()
    appending = Appending(store, first)
    threading.Event().wait(2.5)
    etcd.members[0].thaw()
    appending.join(30)
    assert store.read("m1") == [first, appending.result]


def test_an_unreachable_etcd_is_unavailable_and_not_empty(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B1: nothing that reads may answer 'nothing is there'."""
    events = history(store, "m1", 2)
    etcd.members[0].kill()
    with pytest.raises(StoreUnavailableError):
        append(store, "m1", events[-1], deadline_seconds=0.5)
    store._now = lambda: float("inf")  # type: ignore[method-assign]  # no patience, for the test's sake
    reads: list[Callable[[], object]] = [
        partial(store.read, "m1"),
        partial(store.head, "m1"),
        store.heads,
        partial(store.range, store.keys.requests),
        partial(store.get, store.keys.leader),
    ]
    for read in reads:
        with pytest.raises(StoreUnavailableError):
            read()


def test_an_endpoint_that_is_down_is_passed_over(etcd: EtcdCluster) -> None:
    """B3: with several endpoints one dead member is no outage."""
    store = EtcdStore([f"127.0.0.1:{free_port()}", *etcd.endpoints])
    assert append(store, "m1", None).seq == 1
    with store.follow(store.keys.requests) as follower:
        assert follower.poll(10) is not None
        store.put(store.keys.request("one"), b"")
        assert follower.poll(10) is not None
    store.close()


def test_another_cluster_at_the_same_endpoint_is_refused(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B17: cluster_id is pinned by the first answer."""
    events = history(store, "m1", 2)
    replace_by_an_empty_cluster(etcd)
    with pytest.raises(WrongClusterError):
        store.read("m1")
    with pytest.raises(WrongClusterError):
        append(store, "m1", events[-1])
    with pytest.raises(WrongClusterError):
        store.put(store.keys.request("one"), b"")


def test_a_configured_cluster_id_is_insisted_on(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B17: known from the configuration, before the first answer."""
    store.revision()
    assert store.cluster_id is not None
    right = EtcdStore(etcd.endpoints, expected_cluster_id=store.cluster_id)
    wrong = EtcdStore(etcd.endpoints, expected_cluster_id=store.cluster_id + 1)
    assert right.heads().heads == {}
    with pytest.raises(WrongClusterError):
        wrong.heads()
    right.close()
    wrong.close()


def test_an_older_state_of_the_same_cluster_is_refused(etcd: EtcdCluster, store: EtcdStore) -> None:
    """B13, E26: the revision went backwards, so the history lost its tail."""
    member = etcd.members[0]
    events = history(store, "m1", 2)
    member.stop()
    copy = member.data_directory.with_suffix(".copy")
    shutil.copytree(member.data_directory, copy)
    member.start()
    etcd.wait_until_healthy()
    events.append(append(store, "m1", events[-1]))
    member.stop()
    shutil.rmtree(member.data_directory)
    copy.rename(member.data_directory)
    member.start()
    etcd.wait_until_healthy()
    with pytest.raises(WrongClusterError, match="revision"):
        store.read("m1")
    restarted = EtcdStore(etcd.endpoints)
    with pytest.raises(ChainError):
        append(restarted, "m1", events[-1])
    restarted.close()


def test_a_full_etcd_is_unavailable_and_can_still_be_read() -> None:
    """B7: NOSPACE; the outcome of an append may be ambiguous (E8)."""
    with etcd_cluster(arguments=["--quota-backend-bytes=1000000"]) as etcd:
        store = EtcdStore(etcd.endpoints)
        event = append(store, "m1", None)
        while etcd.etcdctl("put", store.keys.request("big"), "x" * 100_000).returncode == 0:
            pass
        with pytest.raises(StoreUnavailableError, match="out of space"):
            append(store, "m1", event, failed("x" * 60_000), deadline_seconds=1.0)
        assert store.read("m1") == [event]
        assert store.delete(store.keys.request("big"))
        store.close()


@pytest.fixture
def guarded(etcd: EtcdCluster) -> EtcdCluster:
    """etcd with users: root, and alpha who may only touch its inbox."""
    for command in (
        ["user", "add", "root:rootpw"],
        ["role", "add", "root"],
        ["user", "grant-role", "root", "root"],
        ["user", "add", "alpha:alphapw"],
        ["role", "add", "alpha"],
        ["role", "grant-permission", "--prefix=true", "alpha", "readwrite", "/cargo/inbox/alpha/"],
        ["user", "grant-role", "alpha", "alpha"],
        ["put", "/cargo/requests/web-7", "{}"],
        ["auth", "enable"],
    ):
        done = etcd.etcdctl(*command)
        assert done.returncode == 0, (command, done.stderr)
    return etcd


def access(user: str, password: str) -> EtcdAccess:
    return EtcdAccess(user=user, password=password)


def test_a_refused_permission_is_an_error_and_not_an_empty_range(guarded: EtcdCluster) -> None:
    """B14: absence and refusal are different things."""
    alpha = EtcdStore(guarded.endpoints, access=access("alpha", "alphapw"))
    assert alpha.range(alpha.keys.inbox("alpha")) == []
    with pytest.raises(StoreUnavailableError, match="refuses"):
        alpha.range(alpha.keys.requests)
    with pytest.raises(StoreUnavailableError, match="refuses"):
        alpha.put(alpha.keys.request("web-8"), b"{}")
    alpha.close()


@pytest.mark.parametrize("who", [access("alpha", "wrong"), EtcdAccess()])
def test_a_wrong_password_or_none_is_an_error_in_words(guarded: EtcdCluster, who: EtcdAccess) -> None:
    """B14: and it comes at once, not after the patience for outages."""
    stranger = EtcdStore(guarded.endpoints, access=who)
    with pytest.raises(StoreUnavailableError, match="refuses"):
        stranger.range(stranger.keys.requests)
    stranger.close()


def test_a_login_that_etcd_forgot_is_renewed(guarded: EtcdCluster) -> None:
    """B14, E32: tokens do not survive a restart of etcd; reads, writes and watches go on by themselves."""
    root = EtcdStore(guarded.endpoints, access=access("root", "rootpw"))
    with root.follow(root.keys.requests) as follower:
        assert follower.poll(10) is not None
        guarded.members[0].kill()
        guarded.members[0].start()
        root.put(root.keys.request("web-8"), b"{}")
        assert follower.poll(15) is not None
        assert len(root.range(root.keys.requests)) == 2
    root.close()


@pytest.mark.parametrize(
    "endpoint", ["", "ftp://x:1", "http://", "https://127.0.0.1:2379", "http://h:1/path", "h:notaport"]
)
def test_an_endpoint_that_cannot_work_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        EtcdStore([endpoint])
