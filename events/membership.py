"""Who belongs to a secured fleet, and what is pinned of them: the values of ``members/<name>``.

A record is signed by the fleet's authority, whose key the operator keeps. So whoever can write to the bus can take a
member away, which makes everybody hold, but cannot make one, nor change a key. ``members/`` is readable by all members.

Keys of a member that left, or got new ones, stay in its record as *former* keys, because its old events stay in
histories that others still need. What a former key has signed counts only if a member built on it, or if it was there
when the key was withdrawn (``events/trust.py``).
"""

from __future__ import annotations

import msgspec

from events.crypto import Authority, SigningAuthority
from events.errors import SchemaError

RECORD_VERSION = 1
MAX_RECORD_BYTES = 60 * 1024
_CONTEXT = b"cargo member 1\0"
"""What is signed begins with this, so that no signature of the authority can be taken for another kind."""


class FormerKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signing key that was withdrawn."""

    signing_key: str
    withdrawn_at: str
    tails: dict[str, str] = {}
    """By migration that had not ended: the digest of its newest event when the key was withdrawn."""


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One member. Without ``signing_key`` it is one that was removed."""

    v: int = RECORD_VERSION
    name: str
    """``hostd/<host>`` or ``coordinator/<name>``: the author of its events."""
    user: str = ""
    """Its user and role in etcd. Another one after each approval, so that an old certificate stays worthless."""
    signing_key: str = ""
    ssh_host_key: str = ""
    """``ssh-ed25519 AAAA…``: what its sshd must show."""
    ssh_client_key: str = ""
    """With which its agent comes to other hosts."""
    address: str = ""
    since: str = ""
    former: tuple[FormerKey, ...] = ()

    @property
    def active(self) -> bool:
        return bool(self.signing_key)


class _Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    record: str
    """JSON, as it was signed."""
    sig: str


def encode_member(member: Member, authority: SigningAuthority) -> bytes:
    """The stored value. Raises SchemaError when it is too large."""
    text = msgspec.json.encode(member).decode()
    raw = msgspec.json.encode(_Signed(record=text, sig=authority.sign(_CONTEXT + text.encode())))
    if len(raw) > MAX_RECORD_BYTES:
        raise SchemaError(f"the record of {member.name} would have {len(raw)} bytes, over {MAX_RECORD_BYTES}")
    return raw


def decode_member(raw: bytes, name: str, authority: Authority) -> Member:
    """The record in a stored value. Raises SchemaError unless the authority signed it, for that name."""
    try:
        if len(raw) > MAX_RECORD_BYTES:
            raise SchemaError(f"the record of member {name} has {len(raw)} bytes")
        signed = msgspec.json.decode(raw, type=_Signed)
        if not authority.has_signed(_CONTEXT + signed.record.encode(), signed.sig):
            raise SchemaError(f"the record of member {name} is not signed by the fleet's authority: it was changed")
        member = msgspec.json.decode(signed.record, type=Member)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SchemaError(f"the record of member {name} cannot be read: {error}") from error
    if member.v != RECORD_VERSION or member.name != name:
        raise SchemaError(f"the record of member {name} is one of {member.name[:80]!r}, version {member.v}")
    return member
