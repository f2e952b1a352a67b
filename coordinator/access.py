"""Which hosts may touch a migration's keys in etcd: granted before its first event, taken back after its last.

In a secured fleet an agent's user may write nothing of a migration in which its host takes no part. The leading
coordinator keeps it so: ``grant`` before every append, which costs nothing when it is granted already, and ``sweep``
now and then, which takes away what no migration calls for any more. Both compare what is with what should be, so a
coordinator that died in between leaves nothing that its successor does not mend.

A host keeps its part until it has put its own inbox pointer away, which is how it says that it has read the end.
Without it, an agent that was slow or off would never learn how its migration ended.

It must never decide who is a member, nor grant anything but ``events/permissions.py`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from coordinator.recording import ARCHIVABLE_PHASES
from events.keyspace import Keyspace, valid_container_name, valid_host_name
from events.membership import Member
from events.permissions import Permission, base, part
from events.schema import Head


class Users(Protocol):
    """What is needed of ``events.etcd_users.EtcdUsers``."""

    def permissions(self, role: str) -> frozenset[Permission]: ...

    def grant(self, role: str, permission: Permission) -> None: ...

    def revoke(self, role: str, permission: Permission) -> None: ...


class Members(Protocol):
    """What is needed of ``events.trust.Trust``."""

    def members(self) -> Mapping[str, Member]: ...

    def member(self, name: str) -> Member | None: ...


class Access:
    """The permissions of all hosts, as this leader has seen or set them."""

    def __init__(self, keys: Keyspace, users: Users, members: Members) -> None:
        self._keys = keys
        self._users = users
        self._members = members
        self._granted: dict[str, frozenset[Permission]] = {}
        """By role."""

    def forget(self) -> None:
        """A leadership begins: others may have granted and revoked."""
        self._granted.clear()

    def grant(self, migration: str, container: str, source: str, target: str) -> None:
        """Let both hosts take their parts. Raises StoreUnavailableError."""
        for host, peer in ((source, target), (target, source)):
            role = self._role(host)
            if not role:
                continue  # it was removed from the fleet; the history goes on without it
            have = self._of(role)
            for permission in sorted(part(self._keys, migration, container, host, peer) - have):
                self._users.grant(role, permission)
                have = self._granted[role] = have | {permission}

    def sweep(self, heads: Mapping[str, Head], halted: Iterable[str], pointers: Callable[[], set[str]]) -> list[str]:
        """Take back what no migration calls for, and says so in words; grant what is missing.

        Raises StoreUnavailableError. ``pointers`` reads the keys of all inbox pointers; it is only asked when there is something to take back. Of
        ``halted`` migrations everything stays as it is.
        """
        excess: dict[str, frozenset[Permission]] = {}
        for name, member in self._members.members().items():
            kind, _, host = name.partition("/")
            if kind != "hostd" or not member.active:
                continue
            wanted = base(self._keys, host)
            for migration, head in heads.items():
                if head.phase not in ARCHIVABLE_PHASES:
                    wanted |= self._part(migration, head, host)
            for permission in sorted(wanted - self._of(member.user)):  # it was approved anew, under another role
                self._users.grant(member.user, permission)
                self._granted[member.user] |= {permission}
            excess[host] = self._of(member.user) - wanted
        stuck = set(halted)
        if stuck:  # who needs what of them cannot be known
            held = tuple(self._keys.migration(one) for one in stuck if _known(self._keys, one))
            excess = {
                host: frozenset(p for p in found if not self._may_be_of(p, held)) for host, found in excess.items()
            }
        if not any(excess.values()):
            return []
        return self._take_back(excess, heads, pointers())

    def _take_back(
        self, excess: Mapping[str, frozenset[Permission]], heads: Mapping[str, Head], pointers: set[str]
    ) -> list[str]:
        said = []
        for host, found in excess.items():
            for migration, head in heads.items():
                if head.phase in ARCHIVABLE_PHASES and self._keys.inbox_pointer(host, migration) in pointers:
                    found = found - self._part(migration, head, host)  # noqa: PLW2901 - it has not read the end yet
            role = self._role(host)
            for permission in sorted(found):
                self._users.revoke(role, permission)
                self._granted[role] -= {permission}
                said.append(f"{host} may not touch {permission.key} any more")
        return said

    def _may_be_of(self, permission: Permission, held: tuple[str, ...]) -> bool:
        if permission.key.startswith((self._keys.placements, self._keys.progresses, self._keys.inboxes)):
            return True
        return permission.key.startswith(held)

    def _part(self, migration: str, head: Head, host: str) -> frozenset[Permission]:
        if host not in (head.source, head.target) or not valid_container_name(head.container):
            return frozenset()
        peer = head.target if host == head.source else head.source
        return part(self._keys, migration, head.container, host, peer) if valid_host_name(peer) else frozenset()

    def _role(self, host: str) -> str:
        member = self._members.member(f"hostd/{host}")
        return member.user if member is not None and member.active else ""

    def _of(self, role: str) -> frozenset[Permission]:
        if role not in self._granted:
            self._granted[role] = self._users.permissions(role)
        return self._granted[role]


def _known(keys: Keyspace, migration: str) -> bool:
    try:
        keys.migration(migration)
    except ValueError:
        return False
    return True
