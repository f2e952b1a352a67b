"""Signed events: who is believed, and that nobody else is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator import archive, mending
from coordinator.audit import audit
from coordinator.authorship import unproven
from events.connecting import exposure
from events.crypto import SigningAuthority
from events.errors import SchemaError, StoreUnavailableError, UntrustedError
from events.membership import Member, decode_member, encode_member
from events.schema import (
    SIGNED_VERSION,
    Event,
    PrepareOrdered,
    Request,
    Requested,
    decode_event,
    encode_head,
    head_after,
)
from events.settings import EtcdSettings, TrustSettings
from events.stamp import Stamper
from events.trust import Trust
from tests.support.histories import SAMPLES, prepared
from tests.support.secured import ALPHA, BETA, COORDINATOR, GAMMA, SecuredFleet


@pytest.fixture
def fleet(tmp_path: Path) -> SecuredFleet:
    return SecuredFleet(tmp_path)


def begun(fleet: SecuredFleet, migration: str = "web-1") -> Event:
    """A migration from alpha to beta whose source has been ordered to prepare."""
    first = fleet.append(migration, None, SAMPLES["requested"], COORDINATOR)
    return fleet.append(migration, first, PrepareOrdered(), COORDINATOR)


def overwrite(fleet: SecuredFleet, migration: str, raw: bytes) -> None:
    """Put ``raw`` in the place of the newest event, with a head that fits: what write access can do."""
    keys = fleet.store.keys
    event = decode_event(raw)
    head = fleet.store.head(migration)
    fleet.store.put(keys.event(migration, event.seq), raw)
    fleet.store.put(keys.head(migration), encode_head(head_after(head, event)))


def test_what_members_have_signed_is_read_by_every_member(fleet: SecuredFleet) -> None:
    """P6: every event names its author, and proves it."""
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    events = fleet.read("web-1")
    assert [event.by for event in events] == [COORDINATOR, COORDINATOR, ALPHA]
    assert all(event.raw.startswith(b"{") and event.signature for event in events)
    assert fleet.read("web-1", after=last) == [third]
    assert fleet.store.read("web-1") == events, "a fleet that is not secured reads the same history"


def test_an_unsigned_event_is_held_in_a_secured_fleet(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    fleet.append("web-1", last, prepared(), ALPHA, key_of="")
    with pytest.raises(UntrustedError, match=r"event 3 \(source_prepared\) is not signed"):
        fleet.read("web-1")


def test_an_event_signed_with_another_members_key_is_forged(fleet: SecuredFleet) -> None:
    """P15: the credential of beta does not make an event of alpha, nor an order."""
    last = begun(fleet)
    fleet.append("web-1", last, prepared(), ALPHA, key_of=BETA)
    with pytest.raises(UntrustedError, match="was not signed by hostd/alpha, who it says wrote it"):
        fleet.read("web-1")
    last = begun(fleet, "web-2")
    fleet.append("web-2", last, SAMPLES["abort_ordered"], COORDINATOR, key_of=ALPHA)
    with pytest.raises(UntrustedError, match="was not signed by coordinator/c1"):
        fleet.read("web-2")


@pytest.mark.parametrize(
    ("what", "by"),
    [("abort_ordered", ALPHA), ("source_prepared", BETA), ("source_prepared", GAMMA), ("target_claimed", COORDINATOR)],
)
def test_a_member_may_write_only_what_its_role_says(fleet: SecuredFleet, what: str, by: str) -> None:
    """P6: also where the machine that reads it would not look at the author."""
    last = begun(fleet)
    fleet.append("web-1", last, SAMPLES[what], by)
    with pytest.raises(UntrustedError, match=f"{what}.* may not be written by {by}"):
        fleet.read("web-1")
    with pytest.raises(UntrustedError, match="may not be written"):
        fleet.read("web-1", after=last)


def test_an_altered_event_is_held(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    overwrite(fleet, "web-1", third.raw.replace(b"10.0.0.1", b"10.0.0.9"))
    with pytest.raises(UntrustedError, match="forged or was altered"):
        fleet.read("web-1")


def test_a_history_cannot_be_told_as_another_migrations(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    keys = fleet.store.keys
    for item in fleet.store.range(keys.migration("web-1")):
        fleet.store.put(item.key.replace("web-1", "web-2"), item.value)
    assert fleet.store.read("web-2")[-1] == last, "nothing but the signature's context tells them apart"
    with pytest.raises(UntrustedError, match="forged or was altered"):
        fleet.read("web-2")


def test_a_stranger_is_no_author(fleet: SecuredFleet, tmp_path: Path) -> None:
    last = begun(fleet)
    fleet.append("web-1", last, prepared(), "hostd/mallory")
    with pytest.raises(UntrustedError, match="'hostd/mallory', who is no member of this fleet"):
        fleet.read("web-1")
    rogue = SigningAuthority.load_or_make(tmp_path / "rogue")
    mine = Member(name="hostd/mallory", user="x", signing_key=fleet.key("hostd/mallory").public)
    fleet.store.put(fleet.store.keys.member("hostd/mallory"), encode_member(mine, rogue))
    with pytest.raises(UntrustedError, match="is not signed by the fleet's authority"):
        fleet.read("web-1")


def test_a_members_record_is_of_that_name_only(fleet: SecuredFleet) -> None:
    raw = encode_member(fleet.records[ALPHA], fleet.authority)
    assert decode_member(raw, ALPHA, fleet.authority) == fleet.records[ALPHA]
    with pytest.raises(SchemaError, match="is one of 'hostd/alpha'"):
        decode_member(raw, BETA, fleet.authority)
    with pytest.raises(SchemaError, match="cannot be read"):
        decode_member(b"{}", ALPHA, fleet.authority)


def test_a_withdrawn_key_adds_nothing_but_what_others_built_on_stays(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    reader = fleet.trust()
    assert len(fleet.read("web-1", trust=reader)) == 3
    fleet.withdraw(ALPHA)
    with pytest.raises(UntrustedError, match="hostd/alpha, whose key was withdrawn, and no member has built on it"):
        fleet.read("web-1", trust=reader)
    fourth = fleet.append("web-1", third, SAMPLES["target_prepared"], BETA)
    assert len(fleet.read("web-1", trust=reader)) == 4
    fleet.append("web-1", fourth, SAMPLES["step_failed"], ALPHA)
    with pytest.raises(UntrustedError, match="key was withdrawn"):
        fleet.read("web-1", after=fourth, trust=reader)


def test_what_was_there_when_a_key_was_withdrawn_still_counts(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    fleet.withdraw(ALPHA, tails={"web-1": third.digest})
    assert len(fleet.read("web-1")) == 3
    fleet.append("web-1", third, SAMPLES["step_failed"], ALPHA)
    with pytest.raises(UntrustedError, match="event 4"):
        fleet.read("web-1")


def test_a_member_that_came_back_has_its_old_history_and_its_new_key(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    fleet.withdraw(ALPHA, tails={"web-1": third.digest})
    back = msgspec.structs.replace(fleet.records[ALPHA], signing_key=fleet.key(GAMMA).public)
    fleet.pin(back)
    fleet.append("web-1", third, SAMPLES["step_failed"], ALPHA, key_of=GAMMA)
    assert len(fleet.read("web-1")) == 4


@pytest.mark.parametrize("read_between", [False, True])
def test_the_first_words_of_a_member_that_came_back_are_no_forgery_to_who_knew_its_former_key(
    fleet: SecuredFleet, read_between: bool
) -> None:
    """B14: whoever has read the pins a moment before reads them again; otherwise they would hold the migration."""
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    reader = fleet.trust()
    assert len(fleet.read("web-1", trust=reader)) == 3
    fleet.withdraw(ALPHA, tails={"web-1": third.digest})
    if read_between:
        assert len(fleet.read("web-1", trust=reader)) == 3
    fleet.pin(msgspec.structs.replace(fleet.records[ALPHA], signing_key=fleet.key(GAMMA).public))
    fleet.clock -= 120  # all of it within a moment
    fleet.append("web-1", third, SAMPLES["step_failed"], ALPHA, key_of=GAMMA)
    assert len(fleet.read("web-1", trust=reader)) == 4
    loads = []
    trust = Trust(fleet.store.keys, lambda prefix: loads.append(prefix) or fleet.store.range(prefix), fleet.authority)
    fleet.append("web-1", fleet.read("web-1")[-1], SAMPLES["step_failed"], ALPHA, key_of=BETA)
    fleet.append("web-1", fleet.store.read("web-1")[-1], SAMPLES["step_failed"], ALPHA, key_of=BETA)
    with pytest.raises(UntrustedError, match="was not signed by hostd/alpha"):
        fleet.read("web-1", trust=trust)
    assert len(loads) == 2, "once for all that does not hold"


def test_what_nobody_would_believe_is_not_written(fleet: SecuredFleet) -> None:
    """An event that is not proven would stop its migration for good: without a key, with another, or as a stranger."""
    stamp = Stamper(COORDINATOR).stamp(1)
    for trust, words in ((fleet.trust(), "signing_key"), (fleet.trust(ALPHA), "is pinned with another key")):
        fleet.store.trust = trust
        with pytest.raises(StoreUnavailableError, match=words):
            fleet.store.append("web-1", None, SAMPLES["requested"], cause=0, stamp=stamp)
    fleet.withdraw(ALPHA)
    for name in (ALPHA, "hostd/mallory"):
        fleet.store.trust = fleet.trust(name)
        with pytest.raises(StoreUnavailableError, match="is no member of this fleet"):
            fleet.store.append("web-1", None, SAMPLES["requested"], cause=0, stamp=Stamper(name).stamp(1))
    fleet.store.trust = None
    assert fleet.store.head("web-1") is None


def test_a_version_and_a_signature_belong_together(fleet: SecuredFleet) -> None:
    event = begun(fleet)
    assert f'"v":{SIGNED_VERSION}'.encode() in event.raw
    for wrong in (
        event.raw.replace(b'"v":2', b'"v":1'),
        event.raw[:-1] + b" }",
        event.raw[: event.raw.index(b',"sig"')] + b"}",
        event.raw.replace(b'"v":2', b'"v":3'),
    ):
        with pytest.raises(SchemaError):
            decode_event(wrong)


def test_verify_names_every_event_that_is_not_proven(fleet: SecuredFleet) -> None:
    last = begun(fleet)
    fleet.append("web-1", last, prepared(), ALPHA, key_of=BETA)
    fleet.store.trust = fleet.trust()
    recorded = archive.recorded(fleet.store, "web-1")
    assert recorded is not None
    assert not [finding for finding in audit(recorded) if finding.rule == "author"]
    assert [(found.seq, found.rule) for found in unproven(fleet.store, recorded)] == [(3, "signature")]


def test_one_untrusted_history_does_not_hide_the_others(fleet: SecuredFleet) -> None:
    """B15: the coordinator reads all at once; the forged one is named, the others go on."""
    begun(fleet, "web-1")
    forged = begun(fleet, "web-2")
    fleet.append("web-2", forged, SAMPLES["abort_ordered"], COORDINATOR, key_of=ALPHA)
    fleet.store.trust = fleet.trust()
    found = fleet.store.histories()
    assert list(found.events) == ["web-1"]
    assert "was not signed by coordinator/c1" in found.broken["web-2"]


def test_a_name_that_is_used_again_is_another_migration(fleet: SecuredFleet) -> None:
    """After an archive: whose reports count follows from the history that there is, not from one that was."""
    last = begun(fleet)
    reader = fleet.trust()
    fleet.append("web-1", last, prepared(), ALPHA)
    assert len(fleet.read("web-1", trust=reader)) == 3
    fleet.store.delete_prefix(fleet.store.keys.migration("web-1"))
    request = Request(container="web", source="gamma", target="beta")
    first = fleet.append("web-1", None, Requested(request=request, container_id="c" * 64), COORDINATOR)
    last = fleet.append("web-1", first, PrepareOrdered(), COORDINATOR)
    fleet.append("web-1", last, prepared(), GAMMA)
    assert len(fleet.read("web-1", trust=reader)) == 3


def test_what_is_not_proven_is_cut_off_and_the_migration_goes_on(fleet: SecuredFleet, tmp_path: Path) -> None:
    """P15, B15: a stolen credential can stop a migration of its own; a person gets it going again, with evidence."""
    last = begun(fleet)
    third = fleet.append("web-1", last, prepared(), ALPHA)
    forged = fleet.append("web-1", third, SAMPLES["abort_ordered"], COORDINATOR, key_of=ALPHA)
    fleet.append("web-1", forged, SAMPLES["source_restored"], ALPHA)
    fleet.store.trust = fleet.trust()
    cut = mending.find(fleet.store, "web-1")
    assert cut.since == 4
    mending.cut_off(fleet.store, cut, tmp_path / "evidence")
    assert fleet.store.read("web-1")[-1] == third
    assert fleet.store.get(fleet.store.keys.inbox_pointer("beta", "web-1")) is not None, "both hosts look again"
    assert len(archive.read(tmp_path / "evidence")["web-1"].texts) == 5
    recorded = archive.recorded(fleet.store, "web-1")
    assert recorded is not None
    assert not [*audit(recorded), *unproven(fleet.store, recorded)]
    with pytest.raises(mending.NothingToCutError, match="every event of web-1 is proven"):
        mending.find(fleet.store, "web-1")
    fleet.append("web-1", third, SAMPLES["target_prepared"], BETA)
    assert len(fleet.read("web-1")) == 4


def test_nothing_is_cut_off_a_history_that_is_wrong_from_the_beginning(fleet: SecuredFleet) -> None:
    fleet.append("web-1", None, SAMPLES["requested"], COORDINATOR, key_of=ALPHA)
    fleet.store.trust = fleet.trust()
    with pytest.raises(mending.NothingToCutError, match="not even the first event"):
        mending.find(fleet.store, "web-1")
    with pytest.raises(mending.NothingToCutError, match="is missing"):
        mending.find(fleet.store, "web-9")


def test_a_bus_within_reach_of_others_without_tls_is_said_loudly() -> None:
    """E29: authentication is off unless somebody turns it on."""
    bare, trusting = EtcdSettings(endpoints=()), TrustSettings()
    assert exposure(["127.0.0.1:2379", "http://localhost:2379", "[::1]:2379"], bare, trusting) == ""
    said = exposure(["10.0.0.1:2379"], bare, trusting)
    assert "NOT SECURED" in said
    assert "TLS" in said
    assert "signed" in said
    tls = EtcdSettings(endpoints=(), ca=Path("/ca"), cert=Path("/c"), key=Path("/k"))
    assert "TLS" not in exposure(["https://10.0.0.1:2379"], tls, trusting)
    assert exposure(["https://10.0.0.1:2379"], tls, TrustSettings(ca=Path("/ca"))) == ""
