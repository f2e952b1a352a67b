"""What etcd lets a host touch: its own keys always, a migration's keys while it takes part in it. Pure.

One role a member. The base is granted when a host is approved (``cargoctl fleet approve``); a migration's part by the
leading coordinator before it writes the first event, and taken back when the host has nothing more to do for it
(``coordinator/access.py``). A range is half-open, as etcd has it; an empty ``end`` means one key.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from events.keyspace import Keyspace, key_bytes, key_text, prefix_end

Mode = Literal["read", "write", "readwrite"]


class Permission(NamedTuple):
    """``key`` up to, and without, ``end``."""

    key: str
    end: str
    mode: Mode


def under(prefix: str, mode: Mode) -> Permission:
    """Every key that begins with ``prefix``."""
    return Permission(prefix, key_text(prefix_end(key_bytes(prefix))), mode)


def only(key: str, mode: Mode) -> Permission:
    """One key."""
    return Permission(key, "", mode)


def base(keys: Keyspace, host: str) -> frozenset[Permission]:
    """What an agent needs although nothing moves."""
    return frozenset(
        {
            only(keys.root, "read"),  # no key: where the store asks for the newest revision
            under(keys.members, "read"),
            only(keys.host(host), "readwrite"),
            under(keys.inventory(host), "readwrite"),
            under(keys.inbox(host), "readwrite"),
            under(keys.failpoints(f"hostd/{host}"), "read"),
            only(keys.renewal(host), "readwrite"),
            only(keys.renewed(host), "read"),
        }
    )


def part(keys: Keyspace, migration: str, container: str, host: str, peer: str) -> frozenset[Permission]:
    """What ``host`` needs for its part in a migration of ``container`` with ``peer``."""
    return frozenset(
        {
            under(keys.migration(migration), "readwrite"),
            only(keys.progress(migration, host), "readwrite"),
            only(keys.inbox_pointer(peer, migration), "write"),  # an event and the pointer to it are one transaction
            only(keys.placement(container), "readwrite"),
        }
    )


def joining(keys: Keyspace, host: str) -> frozenset[Permission]:
    """What the bearer of a token needs."""
    return frozenset({only(keys.join_request(host), "readwrite"), only(keys.join_answer(host), "read")})
