"""The way out for a migration that is held because of an event that is not proven: cut it off, and what follows it.

A stolen credential can write into a migration that its host takes part in, and nobody then acts on it. What is proven up
to that event is true; a person who has looked where the container runs cuts the rest off, keeps it as evidence, and the
migration goes on from there. Coordinators must be restarted afterwards: they remember that keys were deleted, as they should.

It must never cut off an event that is proven, nor anything of a history that is wrong in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator import archive
from coordinator.audit import audit, request_of
from coordinator.authorship import unproven
from coordinator.recording import Recording
from events.errors import CargoError, ConflictError
from events.schema import Event, Head, decode_event, encode_head, head_after
from events.store import DELETE_BATCH, Compare, Delete, Put, Store


class NothingToCutError(CargoError):
    """The history has no unproven end, or none that may be cut off."""


@dataclass(frozen=True)
class Cut:
    """What would go: every event from ``since`` on."""

    recorded: Recording
    head_revision: int
    kept: tuple[Event, ...]
    since: int
    why: str

    @property
    def head(self) -> Head:
        """The head that belongs to what is kept."""
        head: Head | None = None
        for event in self.kept:
            head = head_after(head, event)
        assert head is not None
        return head


def find(store: Store, migration: str) -> Cut:
    """What may be cut off of ``migration``. Raises NothingToCutError in words."""
    stored = store.get(store.keys.head(migration))
    recorded = archive.recorded(store, migration)
    if stored is None or recorded is None or recorded.head != stored.value:
        raise NothingToCutError(f"the history of {migration} is missing, or is being changed")
    found = unproven(store, recorded)
    if not found:
        raise NothingToCutError(
            f"every event of {migration} is proven; `cargoctl verify {migration}` says what else is wrong"
        )
    since = found[0].seq
    if since <= 1:
        raise NothingToCutError(f"not even the first event of {migration} is proven: nothing of it can be kept")
    kept = tuple(decode_event(text) for number, text in recorded.texts if number < since)
    cut = Cut(recorded, stored.mod_revision, kept, since, found[0].text)
    rest = Recording(migration, recorded.texts[: since - 1], encode_head(cut.head))
    wrong = [*audit(rest), *unproven(store, rest)]
    if wrong:
        raise NothingToCutError(f"what comes before event {since} of {migration} is not sound either: {wrong[0].text}")
    return cut


def cut_off(store: Store, cut: Cut, evidence: Path, say: Callable[[str], None] = lambda _words: None) -> None:
    """Do it: the whole history into ``evidence``, then the events off the bus and the head back, at once."""
    if evidence.exists():
        raise CargoError(f"{evidence} exists already; nothing was changed")
    archive.write(evidence, [cut.recorded])
    say(f"{evidence} holds the history as it was")
    keys, migration = store.keys, cut.recorded.migration
    doomed = [keys.event(migration, number) for number, _ in cut.recorded.texts if number >= cut.since]
    if len(doomed) > DELETE_BATCH:
        raise CargoError(f"{len(doomed)} events are more than one transaction takes; nothing was changed on the bus")
    request = request_of(cut.kept)
    hosts = sorted({request.source, request.target}) if request is not None else []
    pointer = b'{"seq":%d}' % (cut.since - 1)
    outcome = store.transact(
        (Compare(keys.head(migration), "mod", cut.head_revision),),
        [
            Put(keys.head(migration), encode_head(cut.head)),
            *(Put(keys.inbox_pointer(host, migration), pointer) for host in hosts),
            *(Delete(key) for key in doomed),
        ],
    )
    stored = store.get(keys.head(migration))
    if not outcome.succeeded and (stored is None or stored.value != encode_head(cut.head)):
        raise ConflictError(f"the history of {migration} was changed meanwhile; nothing was cut off")
