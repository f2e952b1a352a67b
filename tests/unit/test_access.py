"""Who may touch a migration's keys, and until when."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from coordinator.access import Access
from events.keyspace import Keyspace
from events.membership import Member
from events.permissions import Permission, base, part, under
from events.schema import Head

KEYS = Keyspace()
HEAD = Head(seq=3, uuid="u", digest="d", phase="prepare", container="web", source="alpha", target="beta")


class Roles:
    """Roles in memory, which counts what it is asked."""

    def __init__(self) -> None:
        self.granted: dict[str, set[Permission]] = {name: set(base(KEYS, name)) for name in ("alpha", "beta", "gamma")}
        self.calls = 0

    def permissions(self, role: str) -> frozenset[Permission]:
        return frozenset(self.granted[role])

    def grant(self, role: str, permission: Permission) -> None:
        self.calls += 1
        self.granted[role].add(permission)

    def revoke(self, role: str, permission: Permission) -> None:
        self.calls += 1
        self.granted[role].remove(permission)

    def beyond(self, host: str) -> set[str]:
        return {one.key for one in self.granted[host] - base(KEYS, host)}


class Members:
    def __init__(self) -> None:
        self.all = {
            f"hostd/{host}": Member(name=f"hostd/{host}", user=host, signing_key="k")
            for host in ["alpha", "beta", "gamma"]
        }

    def members(self) -> Mapping[str, Member]:
        return self.all

    def member(self, name: str) -> Member | None:
        return self.all.get(name)


@pytest.fixture
def roles() -> Roles:
    return Roles()


@pytest.fixture
def access(roles: Roles) -> Access:
    return Access(KEYS, roles, Members())


def test_both_hosts_get_their_part_once_and_nobody_else_gets_any(access: Access, roles: Roles) -> None:
    """P15."""
    access.grant("web-1", "web", "alpha", "beta")
    calls = roles.calls
    access.grant("web-1", "web", "alpha", "beta")
    assert roles.calls == calls, "what is granted costs nothing"
    assert roles.beyond("alpha") == {
        "/cargo/migrations/web-1/",
        "/cargo/progress/web-1/alpha",
        "/cargo/inbox/beta/web-1",
        "/cargo/placements/web",
    }
    assert "/cargo/inbox/alpha/web-1" in roles.beyond("beta")
    assert roles.beyond("gamma") == set()


def test_the_range_of_a_migration_is_not_that_of_one_with_a_longer_name() -> None:
    """P15: web-1 is not web-10."""
    ranges = part(KEYS, "web-1", "web", "alpha", "beta")
    for one in ranges:
        inside = one.key <= KEYS.event("web-10", 1) < one.end if one.end else one.key == KEYS.event("web-10", 1)
        assert not inside
    own = under(KEYS.migration("web-1"), "readwrite")
    assert own.key <= KEYS.event("web-1", 1) < KEYS.head("web-1") < own.end


def test_a_part_is_taken_back_after_the_end_once_the_pointer_is_gone(access: Access, roles: Roles) -> None:
    access.grant("web-1", "web", "alpha", "beta")
    pointers = {KEYS.inbox_pointer("beta", "web-1")}
    heads = {"web-1": HEAD}
    assert access.sweep(heads, (), lambda: pointers) == []
    for phase in ("completed", "finalise"):
        heads["web-1"] = Head(seq=9, uuid="u", digest="d", phase=phase, container="web", source="alpha", target="beta")
        assert access.sweep(heads, (), set) == [], "it may still be rolled back"
    heads["web-1"] = Head(
        seq=9, uuid="u", digest="d", phase="finalised", container="web", source="alpha", target="beta"
    )
    access.sweep(heads, (), lambda: pointers)
    assert (roles.beyond("alpha"), len(roles.beyond("beta"))) == (set(), 4)
    access.sweep(heads, (), set)
    assert roles.beyond("beta") == set()


def test_what_two_migrations_need_stays_until_both_have_ended(access: Access, roles: Roles) -> None:
    access.grant("web-1", "web", "alpha", "beta")
    access.grant("web-2", "web", "beta", "alpha")
    ended = Head(seq=9, uuid="u", digest="d", phase="aborted", container="web", source="alpha", target="beta")
    access.sweep({"web-1": ended, "web-2": HEAD}, (), set)
    assert "/cargo/placements/web" in roles.beyond("alpha")
    assert "/cargo/migrations/web-1/" not in roles.beyond("alpha")


def test_a_successor_mends_what_a_dead_coordinator_left(roles: Roles) -> None:
    """A1: granted for a request that was never admitted."""
    Access(KEYS, roles, Members()).grant("web-1", "web", "alpha", "beta")
    successor = Access(KEYS, roles, Members())
    assert successor.sweep({}, (), set)
    assert roles.beyond("alpha") == roles.beyond("beta") == set()


def test_a_host_that_was_approved_anew_has_its_part_again(access: Access, roles: Roles) -> None:
    """Another certificate is another role; what is under way must not wait for the next event to be let in."""
    access.sweep({"web-1": HEAD}, (), set)
    assert "/cargo/migrations/web-1/" in roles.beyond("alpha") & roles.beyond("beta")


def test_of_a_migration_that_cannot_be_understood_everything_stays(access: Access, roles: Roles) -> None:
    """B15: who needs what of it is not known."""
    access.grant("web-1", "web", "alpha", "beta")
    before = roles.beyond("alpha")
    assert access.sweep({}, ("web-1", "/cargo/migrations/odd key"), set) == []
    assert roles.beyond("alpha") == before


def test_a_host_that_was_removed_gets_nothing(roles: Roles) -> None:
    members = Members()
    members.all["hostd/alpha"] = Member(name="hostd/alpha")
    access = Access(KEYS, roles, members)
    access.grant("web-1", "web", "alpha", "beta")
    assert roles.beyond("alpha") == set()
    assert roles.beyond("beta")
