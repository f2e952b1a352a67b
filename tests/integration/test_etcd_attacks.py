"""A stolen host credential against a real etcd with authentication on: one test an attack.

alpha's certificate and signing key are in the attacker's hands. alpha moves ``web-1`` to beta; ``web-2`` moves from beta to
gamma and is none of its business. All of it on the etcd that Debian 12 has; what that version does not ask a right for
is tested for what it can do to the fleet, and said in docs/security.md.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from coordinator.recording import ARCHIVABLE_PHASES
from events.errors import CargoError, PermanentError, StoreUnavailableError, UntrustedError
from events.etcd import EtcdAccess, EtcdStore
from events.etcd_users import EtcdUsers
from events.leases import Election
from events.permissions import base, under
from events.schema import Event, PrepareOrdered, Request, Requested, encode_head, head_after, next_event
from events.stamp import Stamper
from events.store import Compare, Put
from tests.support.histories import SAMPLES, prepared
from tests.support.secured_etcd import Credential, SecuredEtcd, secured_etcd

pytestmark = pytest.mark.etcd

REFUSED = "permission denied"


@dataclass
class Scene:
    etcd: SecuredEtcd
    alpha: Credential
    beta: Credential
    gamma: Credential

    def begin(self, migration: str, source: str, target: str) -> Event:
        """As the leading coordinator admits a request: rights first, then the events."""
        container = f"box-{migration}"
        self.etcd.access.grant(migration, container, source, target)
        request = Request(container=container, source=source, target=target)
        first = self.etcd.coordinator.append(migration, None, Requested(request=request, container_id="c" * 64))
        return self.etcd.coordinator.append(migration, first, PrepareOrdered())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with secured_etcd(tmp_path_factory.mktemp("attacks")) as etcd:
        made = Scene(etcd, etcd.join("alpha"), etcd.join("beta"), etcd.join("gamma"))
        made.begin("web-1", "alpha", "beta")  # so that alpha has a part in something
        made.begin("web-2", "beta", "gamma")
        yield made


def refused(attack: object, *arguments: object) -> None:
    """``attack`` is refused by etcd, for lack of a right and for nothing else."""
    with pytest.raises(StoreUnavailableError, match=REFUSED):
        attack(*arguments)  # type: ignore[operator]


def test_members_do_their_work_with_the_rights_they_have(scene: Scene) -> None:
    """P15: what is granted is enough: appending with a pointer to the peer, reading, watching, telling."""
    last = scene.begin("own-1", "alpha", "beta")
    store, keys = scene.alpha.store, scene.etcd.keys
    with store.follow((keys.inbox("alpha"), keys.failpoints("hostd/alpha"))) as follower:
        assert follower.poll(5) is not None
        mine = store.append(
            "own-1", last, prepared(), cause=2, stamp=Stamper("hostd/alpha").stamp(1), notify=("alpha", "beta")
        )
        seen = [follower.poll(5), follower.poll(5)]
        assert any(item is not None for item in seen)
    assert scene.beta.store.read("own-1")[-1] == mine
    assert store.revision() > 0
    lease = store.lease(10)
    store.put(keys.host("alpha"), b"{}", lease)
    store.put(keys.progress("own-1", "alpha"), b"{}", lease)
    store.put(keys.inventory_item("alpha", "web"), b"{}")
    assert len(store.range(keys.inventory("alpha"))) == 1
    store.put(keys.placement("box-own-1"), b"{}")
    assert store.delete(keys.inbox_pointer("alpha", "own-1"))
    lease.revoke()


def test_others_histories_cannot_be_read(scene: Scene) -> None:
    """P15: neither one event, nor a list of all migrations, nor a watch, nor others' hosts and requests."""
    store, keys = scene.alpha.store, scene.etcd.keys
    refused(store.read, "web-2")
    refused(store.get, keys.head("web-2"))
    refused(store.heads)
    refused(store.range, keys.root)
    refused(store.range, keys.requests)
    refused(store.range, keys.inventory("beta"))
    refused(store.range, keys.inbox("beta"))
    with store.follow(keys.migration("web-2")) as follower:
        assert follower.poll(1.0) is None
        assert REFUSED in follower.trouble
    with store.follow(keys.inbox("beta"), contents=False) as follower:
        assert follower.poll(5) is not None, "a place to begin at, without anything that is there"
        scene.etcd.coordinator.store.put(keys.inbox_pointer("beta", "web-2"), b"{}")
        assert follower.poll(1.0) is None
        assert REFUSED in follower.trouble


def test_others_events_cannot_be_written_or_deleted(scene: Scene) -> None:
    """P15: an event appended to, changed in or cut from a migration of others."""
    store, keys = scene.alpha.store, scene.etcd.keys
    refused(store.put, keys.event("web-2", 3), b"{}")
    refused(store.put, keys.event("web-2", 1), b"{}")
    refused(store.put, keys.head("web-2"), b"{}")
    refused(store.delete, keys.event("web-2", 2))
    refused(lambda: store.transact((), (Put(keys.host("alpha"), b"{}"), Put(keys.event("web-2", 3), b"{}"))))
    refused(lambda: store.transact((Compare(keys.head("web-2"), "version", 0),), (Put(keys.host("alpha"), b""),)))
    newest = scene.beta.store.read("web-2")[-1]
    assert newest.seq == 2


def test_orders_for_its_own_migration_are_not_believed(scene: Scene) -> None:
    """P15: it may write there, but neither as the coordinator nor as the peer, and nobody acts on what it wrote."""
    last = scene.begin("own-2", "alpha", "beta")
    scene.alpha.append("own-2", last, SAMPLES["release_ordered"], by="coordinator/c1")
    for reader in (scene.beta.store, scene.etcd.coordinator.store):
        with pytest.raises(UntrustedError, match="was not signed by coordinator/c1"):
            reader.read("own-2")
    last = scene.begin("own-3", "alpha", "beta")
    scene.alpha.append("own-3", last, SAMPLES["target_prepared"], by="hostd/beta")
    with pytest.raises(UntrustedError, match="was not signed by hostd/beta"):
        scene.etcd.coordinator.store.read("own-3")
    last = scene.begin("own-4", "alpha", "beta")
    scene.alpha.append("own-4", last, SAMPLES["target_prepared"])
    with pytest.raises(UntrustedError, match="may not be written by hostd/alpha"):
        scene.etcd.coordinator.store.read("own-4")


def test_it_cannot_alter_what_has_happened(scene: Scene) -> None:
    """P15, B15: its own event of a moment ago told anew, with a head that fits; whoever knew the old one holds."""
    last = scene.begin("own-5", "alpha", "beta")
    store, keys = scene.alpha.store, scene.etcd.keys
    told = scene.alpha.append("own-5", last, prepared())
    assert scene.beta.store.read("own-5")[-1] == told
    trust = store.trust
    assert trust is not None

    def sign(text: bytes) -> str:
        return trust.sign("own-5", "hostd/alpha", text)

    again = next_event(last, prepared(address="10.9.9.9"), cause=2, stamp=Stamper("hostd/alpha").stamp(1), sign=sign)
    head = store.head("own-5")
    store.put(keys.event("own-5", 3), again.raw)
    store.put(keys.head("own-5"), encode_head(head_after(head, again)))
    with pytest.raises(CargoError, match="not what it was: the history was changed"):
        scene.beta.store.read("own-5", after=told)
    order = scene.begin("own-6", "alpha", "beta")
    store.put(keys.event("own-6", 2), order.raw.replace(b'"epoch":1', b'"epoch":9'))
    with pytest.raises(CargoError, match=r"forged or was altered|head says|changed"):
        scene.beta.store.read("own-6")
    cut = scene.begin("own-7", "alpha", "beta")
    store.delete(keys.event("own-7", 2))
    with pytest.raises(CargoError, match="event 2, which was there, is missing"):
        scene.beta.store.read("own-7", after=cut)


def test_the_coordinators_keys_are_out_of_reach(scene: Scene) -> None:
    """P15: requests, controls, failpoints, other hosts' records, pins, and what others wait for."""
    store, keys = scene.alpha.store, scene.etcd.keys
    for key in (
        keys.request("mine"),
        keys.control("web-2"),
        keys.leader,
        keys.host("beta"),
        keys.inventory_item("beta", "web"),
        keys.inbox_pointer("beta", "web-2"),
        keys.placement("box-web-2"),
        keys.progress("web-2", "beta"),
        keys.member("hostd/alpha"),
        keys.member("hostd/mallory"),
        keys.failpoints("hostd/alpha"),
        keys.join_answer("alpha"),
        keys.join_request("mallory"),
        "/elsewhere",
    ):
        refused(store.put, key, b"{}")
        refused(store.delete, key)


def test_it_cannot_give_itself_rights(scene: Scene) -> None:
    """P15: users, roles, permissions, and turning authentication off."""
    users, role = EtcdUsers(scene.alpha.store), scene.alpha.member.user
    refused(users.grant, role, under("/cargo/", "readwrite"))
    refused(users.make_user, "mallory", "root")
    refused(users.drop_user, scene.beta.member.user)
    refused(users.names)
    for words in (
        ("auth", "disable"),
        ("user", "grant-role", role, "root"),
        ("role", "get", scene.beta.member.user),
        ("user", "get", scene.beta.member.user),
    ):
        done = scene.etcd.etcdctl(scene.alpha.access, *words)
        assert done.returncode != 0, words
        assert REFUSED in done.stderr, done.stderr


def test_the_leaders_key_cannot_be_taken_or_held(scene: Scene) -> None:
    """P15, E24: not put, not deleted, not put under an own lease, and the leader's lease is not to be ended by others."""
    leader = Election(scene.etcd.coordinator.store, scene.etcd.keys.leader, "c1", 5, background=False)
    guard = leader.attempt()
    assert guard is not None
    thief = Election(scene.alpha.store, scene.etcd.keys.leader, "thief", 60, background=False)
    refused(thief.attempt)
    refused(scene.alpha.store.delete, scene.etcd.keys.leader)
    stored = scene.etcd.coordinator.store.get(scene.etcd.keys.leader)
    assert stored is not None
    refused(scene.alpha.store.revoke, stored.lease)
    leader.turn()
    assert leader.guard == guard
    leader.resign()


def test_compaction_by_a_thief_costs_nobody_a_history(scene: Scene) -> None:
    """E12: this etcd lets every user compact (newer ones do not); readers and watches begin anew and go on."""
    last = scene.begin("own-8", "alpha", "beta")
    with scene.beta.store.follow(scene.etcd.keys.inbox("beta")) as follower:
        assert follower.poll(5) is not None
        scene.etcd.etcdctl(scene.alpha.access, "compact", str(scene.alpha.store.revision()))
        mine = scene.alpha.append("own-8", last, prepared())
        assert scene.beta.store.read("own-8")[-1] == mine
        scene.etcd.coordinator.store.put(scene.etcd.keys.inbox_pointer("beta", "own-8"), b"{}")
        assert follower.poll(5) is not None
    assert scene.etcd.coordinator.store.read("web-2")[-1].seq == 2


def test_defragmentation_snapshots_and_membership_are_refused(scene: Scene) -> None:
    """P15, E25: a snapshot would be everybody's data, a defragmentation stops etcd for its time."""
    for words in (
        ("defrag",),
        ("snapshot", "save", str(scene.etcd.directory / "stolen")),
        ("member", "add", "mallory", "--peer-urls=http://127.0.0.1:1"),
        ("move-leader", "1"),
    ):
        done = scene.etcd.etcdctl(scene.alpha.access, *words)
        assert done.returncode != 0, (words, done.stdout)
    assert not (scene.etcd.directory / "stolen").exists()


def test_without_a_certificate_or_with_another_authoritys_nobody_comes_in(scene: Scene, tmp_path: Path) -> None:
    """E29, E30."""
    rogue = SecuredEtcd(tmp_path)
    rogue.make_files()
    stranger = scene.etcd.store("operator", directory=rogue.directory)
    with pytest.raises(StoreUnavailableError):
        stranger._get_once("x")
    bare = EtcdStore(
        [scene.etcd.endpoint], access=EtcdAccess(ca=scene.etcd.directory / "ca.crt"), call_timeout_seconds=3
    )
    with pytest.raises(StoreUnavailableError):
        bare._get_once("x")
    bare.close()


def test_a_members_certificate_is_none_of_an_etcd_member(scene: Scene) -> None:
    """P15: whoever may speak as a member of etcd owns it. Host and etcd have certificates of the same authority."""
    host, _, port = scene.etcd.peer.partition(":")

    def members(access: EtcdAccess) -> bytes:
        context = ssl.create_default_context(cafile=str(access.ca))
        context.load_cert_chain(str(access.cert), str(access.key))
        connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
        try:
            connection.request("GET", "/members")
            return connection.getresponse().read()
        finally:
            connection.close()

    assert b"peerURLs" in members(scene.etcd.files("etcd")), "this is how a member asks"
    for thief in (scene.alpha.access, scene.etcd.files("coordinator-c1"), scene.etcd.files("operator")):
        with pytest.raises((OSError, http.client.HTTPException)):
            members(thief)


def test_rights_end_with_the_migration_once_the_host_has_read_its_end(scene: Scene) -> None:
    """P15: what it could touch while it took part, it cannot any more."""
    last = scene.begin("own-9", "gamma", "beta")
    keys, access = scene.etcd.keys, scene.etcd.access
    scene.etcd.coordinator.store.put(keys.inbox_pointer("gamma", "own-9"), b"{}")

    def sweep(phase: str) -> list[str]:
        heads = scene.etcd.coordinator.store.heads().heads
        heads = {
            name: msgspec.structs.replace(head, phase=phase) if name == "own-9" else head
            for name, head in heads.items()
        }
        store = scene.etcd.coordinator.store
        return access.sweep(heads, (), lambda: {item.key for item in store.range(keys.inboxes)})

    assert sweep("prepare") == []
    assert "aborted" in ARCHIVABLE_PHASES
    taken = sweep("aborted")
    assert [words for words in taken if words.startswith("beta")]
    refused(scene.beta.store.read, "own-9")
    assert scene.gamma.store.read("own-9")[-1] == last, "gamma has its pointer still: it has not read the end"
    assert scene.gamma.store.delete(keys.inbox_pointer("gamma", "own-9"))
    assert sweep("aborted")
    refused(scene.gamma.store.read, "own-9")
    users = EtcdUsers(scene.etcd.coordinator.store)
    access.forget()
    assert sweep("aborted") == [], "nothing is left over"
    granted = users.permissions(scene.gamma.member.user) - base(keys, "gamma")
    assert all("web-2" in one.key or "own-" in one.key for one in granted)
    assert not [one for one in granted if "own-9" in one.key]


def test_a_removed_host_is_out_at_once_and_its_old_certificate_stays_out(scene: Scene) -> None:
    """B14: everything is withdrawn together; a host of the same name that joins later has nothing of the old one."""
    delta = scene.etcd.join("delta")
    delta.store.put(scene.etcd.keys.host("delta"), b"{}")
    last = scene.begin("own-10", "delta", "beta")
    mine = delta.append("own-10", last, prepared())
    scene.etcd.fleet.remove("delta")
    for attack in (
        lambda: delta.store.get(scene.etcd.keys.host("delta")),
        lambda: delta.store.read("own-10"),
        lambda: delta.store.put(scene.etcd.keys.host("delta"), b"{}"),
    ):
        with pytest.raises(StoreUnavailableError):
            attack()
    assert scene.etcd.fleet._store.get(scene.etcd.keys.host("delta")) is None
    fresh = scene.etcd.store("coordinator-c1")
    assert fresh.read("own-10")[-1] == mine, "what it said while it was a member still counts"
    with pytest.raises(PermanentError, match="the signing key that was withdrawn"):
        scene.etcd.join("delta")
    (scene.etcd.directory.parent / "delta/signing.key").unlink()
    again = scene.etcd.join("delta")
    assert again.member.user != delta.member.user
    again.store.put(scene.etcd.keys.host("delta"), b"{}")
    with pytest.raises(StoreUnavailableError):
        delta.store.get(scene.etcd.keys.host("delta"))


def test_appends_while_roles_change_are_recorded_once_each(scene: Scene) -> None:
    """B4, B14: ErrAuthOldRevision means not applied; nothing is lost or doubled, whoever else is granted meanwhile."""
    last = scene.begin("own-11", "alpha", "beta")
    users = EtcdUsers(scene.etcd.store("operator"))
    turns = threading.Semaphore(0)

    def churn() -> None:
        users.make_user("churn", "churn")
        for number in range(60):
            turns.acquire()
            users.grant("churn", under(f"/churn/{number % 3}/", "read"))
            users.revoke("churn", under(f"/churn/{number % 3}/", "read"))

    thread = threading.Thread(target=churn, daemon=True)
    thread.start()
    try:
        for _ in range(60):
            turns.release()  # no append is without changes beside it, and none is overtaken by them for ever
            last = scene.alpha.append("own-11", last, SAMPLES["step_failed"])
    finally:
        turns.release(60)
        thread.join(60)
    events = scene.beta.store.read("own-11")
    assert [event.seq for event in events] == list(range(1, 63))
    assert len({event.uuid for event in events}) == 62
