"""A secured fleet in small: an authority, members with keys, and stores that sign and prove, over any kind of store."""

from __future__ import annotations

from pathlib import Path

import msgspec

from events.crypto import SigningAuthority, SigningKey
from events.membership import FormerKey, Member, encode_member
from events.memory import MemoryStore
from events.schema import Data, Event
from events.stamp import Stamper
from events.store import Store
from events.trust import Trust, about

COORDINATOR, ALPHA, BETA, GAMMA = "coordinator/c1", "hostd/alpha", "hostd/beta", "hostd/gamma"


class SecuredFleet:
    """Keys in ``directory``; ``pinned`` says which members there are. ``store`` has their records."""

    def __init__(self, directory: Path, store: Store | None = None) -> None:
        self.directory = directory
        self.store = store if store is not None else MemoryStore()
        self.authority = SigningAuthority.load_or_make(directory / "ca")
        self.records: dict[str, Member] = {}
        self.clock = 0.0
        for name in (COORDINATOR, ALPHA, BETA, GAMMA):
            self.pin(Member(name=name, user=name, signing_key=self.key(name).public))

    def key(self, name: str) -> SigningKey:
        """The member's own."""
        return SigningKey.load_or_make(self.directory / f"{name.replace('/', '-')}.key")

    def pin(self, member: Member) -> None:
        """Write a record, as the operator would."""
        self.records[member.name] = member
        self.store.put(self.store.keys.member(member.name), encode_member(member, self.authority))
        self.clock += 60

    def withdraw(self, name: str, tails: dict[str, str] | None = None) -> None:
        """Remove a member, as `cargoctl fleet remove` does."""
        member = self.records[name]
        old = FormerKey(signing_key=member.signing_key, withdrawn_at="t", tails=tails or {})
        self.pin(msgspec.structs.replace(member, signing_key="", former=(*member.former, old)))

    def trust(self, name: str = "") -> Trust:
        """As a process of ``name`` has it; without, of one that only reads."""
        own = self.key(name) if name else None
        return Trust(self.store.keys, self.store.range, self.authority, own, clock=lambda: self.clock)

    def append(self, migration: str, previous: Event | None, data: Data, by: str, key_of: str | None = None) -> Event:
        """Append as ``by``, with the key of ``key_of`` (default: its own; ``""``: unsigned)."""
        signer = by if key_of is None else key_of
        self.store.trust = Careless(self, signer) if signer else None
        try:
            cause = 0 if previous is None else previous.seq
            return self.store.append(migration, previous, data, cause=cause, stamp=Stamper(by).stamp(1))
        finally:
            self.store.trust = None

    def read(self, migration: str, after: Event | None = None, trust: Trust | None = None) -> list[Event]:
        """As any member reads. Raises UntrustedError."""
        self.store.trust = trust or self.trust()
        try:
            return self.store.read(migration, after=after)
        finally:
            self.store.trust = None


class Careless(Trust):
    """Signs whatever it is given, as a thief would."""

    def __init__(self, fleet: SecuredFleet, name: str) -> None:
        super().__init__(fleet.store.keys, fleet.store.range, fleet.authority)
        self._key = fleet.key(name)

    def sign(self, migration: str, by: str, text: bytes) -> str:
        return self._key.sign(about(migration) + text)
