"""Is every event by whom it says? Asked by the store before anybody folds what it has read.

In a secured fleet each event is signed by its author (``events/schema.py`` says over what; here the migration's name is
added, so that a history cannot be told as another migration's). Readers know the authors' keys from ``members/``, which
the fleet's authority has signed (``events/membership.py``). The rules:

1. The signature is valid under the pinned key of the member that ``by`` names.
2. That member may write this type in this migration: an order a coordinator, a report the host in that role.
3. What a former key has signed counts if an event of a member follows it, who has verified it when building on it, or
   if it was there when the key was withdrawn. So a removed host's history stays readable, and it cannot add to it.

Anything else raises UntrustedError: everybody holds that migration, and only that. The chain is checked by
``events/history.py`` before. Pins are read again when they are older than PINS_SECONDS, and whenever an author is not
among them or a signature is not by the key that they name; they are never assumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from events.crypto import Authority, SigningKey, signature_holds
from events.errors import SchemaError, StoreUnavailableError, UntrustedError
from events.following import KeyValue
from events.keyspace import Keyspace
from events.membership import Member, decode_member
from events.schema import EVENT_TYPES, Event, Request, Requested, signed_text

PINS_SECONDS = 5.0
"""So long a withdrawn key may still be believed; its owner can no longer write by then (``cargoctl fleet remove``)."""
MAX_REMEMBERED = 4096
_CONTEXT = b"cargo event 1\0"


class Trust:
    """The fleet's members as this process knows them, and its own key, if it writes events."""

    def __init__(
        self,
        keys: Keyspace,
        load: Callable[[str], Iterable[KeyValue]],
        authority: Authority,
        own: SigningKey | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``load`` reads all keys under a prefix."""
        self._keys = keys
        self._load = load
        self._authority = authority
        self._own = own
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._refused: dict[str, str] = {}
        self._read_at: float | None = None
        self._requests: dict[str, Request] = {}
        self._lock = threading.Lock()

    # --- writing -------------------------------------------------------------------------------

    def sign(self, migration: str, by: str, text: bytes) -> str:
        """The signature of this process over an event of ``migration``.

        Raises StoreUnavailableError when nobody would believe it: an event that is not proven stops its migration for
        good, so it must not be written.
        """
        if self._own is None:
            raise StoreUnavailableError(
                f"{by} cannot write events in a secured fleet: its configuration names no [trust] signing_key. Nothing "
                "was written, migrations wait"
            )
        member = self.member(by)
        if member is None or member.signing_key != self._own.public:
            known = (
                "is no member of this fleet" if member is None or not member.active else "is pinned with another key"
            )
            raise StoreUnavailableError(
                f"{by} {known}, so nobody would believe what it writes. Nothing was written, migrations wait. A host "
                "joins with `cargo-hostd join`, a coordinator's key is pinned by `cargoctl fleet init`"
            )
        return self._own.sign(about(migration) + text)

    # --- reading -------------------------------------------------------------------------------

    def check(self, migration: str, events: list[Event], first: Callable[[], Event]) -> None:
        """Raise UntrustedError unless every one of ``events``, in order, is by whom it says and may be.

        Raises StoreUnavailableError when the pins cannot be read. The events follow what was checked before; ``first`` reads the migration's first event, if it is needed.
        """
        for trouble in self.troubles(migration, events, first):
            raise UntrustedError(trouble[1])

    def troubles(self, migration: str, events: list[Event], first: Callable[[], Event]) -> Iterable[tuple[int, str]]:
        """Event number and words for everything that ``check`` would refuse."""
        found: list[tuple[int, str]] = []
        uncovered: list[Event] = []
        tails = self._tails(migration)
        newest_pins = False
        for event in events:
            if event.seq == 1:  # an archived migration's name may be used again
                self._requests.pop(migration, None)
            member = self.member(event.by)
            why = self._forged(migration, event, member)
            if why and not newest_pins:  # its author may have come back with another key since they were read
                self._refresh(0.0)
                newest_pins, tails = True, self._tails(migration)
                member = self.member(event.by)
                why = self._forged(migration, event, member)
            if why:
                found.append((event.seq, f"migration {migration}: event {event.seq} ({event.type}) {why}"))
                continue
            role = self._out_of_role(migration, event, first)
            if role:
                found.append((event.seq, f"migration {migration}: event {event.seq} ({event.type}) {role}"))
            assert member is not None
            if event.digest in tails or self._holds(migration, event, member.signing_key):
                uncovered = []
                continue
            uncovered.append(event)
        if uncovered:
            event = uncovered[0]
            found.append(
                (
                    event.seq,
                    f"migration {migration}: event {event.seq} ({event.type}) is by {event.by}, whose key was withdrawn, "
                    "and no member has built on it. Nobody acts on this migration; a person has to say what is true",
                )
            )
        return sorted(found)

    def _tails(self, migration: str) -> set[str | None]:
        """What was the last event when a key was withdrawn, as digests."""
        return {former.tails.get(migration) for member in self.members().values() for former in member.former}

    def _forged(self, migration: str, event: Event, member: Member | None) -> str:
        if not event.signature:
            return f"is not signed, which {event.by[:80]!r} would have done in this fleet: it is not acted upon"
        if member is None:
            why = self._refused.get(event.by, "")
            return f"is by {event.by[:80]!r}, who is no member of this fleet{f' ({why})' if why else ''}"
        if not self._holds(migration, event, member.signing_key) and not any(
            self._holds(migration, event, former.signing_key) for former in member.former
        ):
            return f"was not signed by {event.by}, who it says wrote it: it is forged or was altered"
        return ""

    def _holds(self, migration: str, event: Event, public: str) -> bool:
        return bool(public) and signature_holds(public, about(migration) + signed_text(event), event.signature)

    def _out_of_role(self, migration: str, event: Event, first: Callable[[], Event]) -> str:
        authors = EVENT_TYPES[event.type].authors
        if event.by.startswith("coordinator/"):
            return "" if "coordinator" in authors else f"may not be written by {event.by}"
        request = self._request(migration, event, first)
        hosts = {"source": request.source, "target": request.target} if request is not None else {}
        if any(event.by == f"hostd/{hosts[role]}" for role in authors if role in hosts):
            return ""
        return f"may not be written by {event.by}"

    def _request(self, migration: str, event: Event, first: Callable[[], Event]) -> Request | None:
        known = self._requests.get(migration)
        if known is None:
            began = event if event.seq == 1 else first()
            # It was signed by a coordinator, or whoever read it first would not have gone on.
            if not isinstance(began.data, Requested):
                return None
            member = self.member(began.by)
            if not began.by.startswith("coordinator/") or self._forged(migration, began, member):
                return None
            known = began.data.request
            if len(self._requests) >= MAX_REMEMBERED:
                self._requests.clear()
            self._requests[migration] = known
        return known

    # --- members -------------------------------------------------------------------------------

    def members(self, oldest_seconds: float = PINS_SECONDS) -> dict[str, Member]:
        """All members, also former ones, by name, as they were at most so long ago. Raises StoreUnavailableError."""
        self._refresh(oldest_seconds)
        return dict(self._members)

    def refused(self) -> dict[str, str]:
        """Why a record under ``members/`` is none, by name."""
        return dict(self._refused)

    def member(self, name: str) -> Member | None:
        """The member ``name``, also a former one. One that is not known, or was removed, is looked for anew."""
        self._refresh(PINS_SECONDS)
        known = self._members.get(name)
        if known is None or not known.active:
            self._refresh(0.0 if known is None else 1.0)
        return self._members.get(name)

    def _refresh(self, oldest_seconds: float) -> None:
        with self._lock:
            now = self._clock()
            if self._read_at is not None and oldest_seconds and now - self._read_at < oldest_seconds:
                return
            members: dict[str, Member] = {}
            refused: dict[str, str] = {}
            for item in self._load(self._keys.members):
                name = item.key[len(self._keys.members) :]
                try:
                    members[name] = decode_member(item.value, name, self._authority)
                except SchemaError as error:
                    refused[name] = str(error)
            self._members, self._refused, self._read_at = members, refused, now


def about(migration: str) -> bytes:
    """What a signature over an event of ``migration`` begins with."""
    return _CONTEXT + migration.encode() + b"\0"
