"""Histories out of the store: into files, and off the store once the file is proven to hold them.

``archive`` never removes what it has not read back from the disk and audited, and never a history that an agent may still
need (``ARCHIVABLE_PHASES``). Removing begins with one transaction that takes the request, the control, the inbox
pointers and the head, guarded by the head's revision: from there on nobody can append, and the request cannot be taken
for a new one. A removal that was cut off leaves events without a head, byte for byte in the file; the next
``archive`` into the same directory recognises and finishes it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from coordinator.audit import audit, request_of
from coordinator.authorship import unproven
from coordinator.recording import ARCHIVABLE_PHASES, MAX_LINE_BYTES, FileFormatError, Recording, lines, parse, recording
from events.errors import CargoError
from events.keyspace import safe_id_for, valid_migration_id
from events.schema import Head, decode_head
from events.stamp import utc_now_text
from events.store import DELETE_BATCH, Compare, Delete, Store

SUFFIX = ".jsonl"


class Result(NamedTuple):
    """What became of one migration; ``problem`` is empty when it is archived."""

    migration: str
    file: Path | None
    problem: str = ""
    needed: bool = False
    """It stays because a host still needs it, which is no failure."""


class _NeededError(CargoError):
    """The history is still somebody's instruction."""


# --- reading -------------------------------------------------------------------------------------


def recorded(store: Store, migration: str) -> Recording | None:
    """The history of ``migration`` as it is stored, broken or not; None when there is no key of it."""
    items = store.range(store.keys.migration(migration))
    if not items:
        return None
    stored = store.get(store.keys.request(migration))
    return recording(store.keys, migration, items, None if stored is None else stored.value)


def names(store: Store) -> tuple[list[str], dict[str, Head], dict[str, str]]:
    """Every migration there is, the heads that can be read, and keys that belong to no migration."""
    result = store.heads()
    broken = {name: why for name, why in result.broken.items() if not valid_migration_id(name)}
    return sorted(set(result.heads) | (set(result.broken) - set(broken))), result.heads, broken


def read(file: Path) -> dict[str, Recording]:
    """The histories in an exported file. Raises OSError, FileFormatError."""
    with file.open("rb") as stream:
        raw: list[bytes] = []
        while line := stream.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise FileFormatError(f"{file}: line {len(raw) + 1} is longer than any line of an export")
            raw.append(line.rstrip(b"\n"))
    if not raw:
        raise FileFormatError(f"{file} is empty")
    try:
        return parse(raw)
    except FileFormatError as error:
        raise FileFormatError(f"{file}: {error}") from error


# --- writing -------------------------------------------------------------------------------------


def write(file: Path, recordings: Iterable[Recording]) -> None:
    """Write an export: private, and after a crash either whole or absent. Raises CargoError."""
    at = utc_now_text()
    partial: str | None = None
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            for one in recordings:
                stream.writelines(lines(one, at))
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).replace(file)
        partial = None
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise CargoError(f"{file} could not be written: {error.strerror}; nothing was removed") from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


# --- archiving -----------------------------------------------------------------------------------


def due(heads: dict[str, Head], older_than_days: float, now: datetime) -> tuple[list[str], list[str]]:
    """Ended histories that nobody needs and that are old enough; and completed ones, which are still in use."""
    ready, in_use = [], []
    limit = now - timedelta(days=older_than_days)
    for migration, head in sorted(heads.items()):
        try:
            old = datetime.fromisoformat(head.at) <= limit
        except (ValueError, TypeError):
            continue  # a head without a readable time has no age
        if old and head.phase in ARCHIVABLE_PHASES:
            ready.append(migration)
        elif old and head.phase == "completed":
            in_use.append(migration)
    return ready, in_use


def archive(store: Store, migrations: Sequence[str], directory: Path) -> list[Result]:
    """Move ``migrations`` into ``directory``, one file each. One that cannot be moved stays where it is."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CargoError(f"{directory} cannot be used: {error.strerror}; nothing was removed") from error
    results = finish_interrupted(store, directory)
    done = {result.migration for result in results}
    for migration in migrations:
        if migration in done:
            continue
        file = directory / f"{migration}{SUFFIX}"
        try:
            _archive_one(store, migration, file)
        except CargoError as error:
            results.append(Result(migration, None, str(error), needed=isinstance(error, _NeededError)))
        else:
            results.append(Result(migration, file))
    return results


def _archive_one(store: Store, migration: str, file: Path) -> None:
    head_key = store.keys.head(migration)
    stored_head = store.get(head_key)
    one = recorded(store, migration)
    if one is None or stored_head is None or one.head != stored_head.value:
        raise CargoError(f"the history of {migration} is being changed, or is broken; it stays")
    found = [*audit(one), *unproven(store, one)]
    if found:
        raise CargoError(f"the history of {migration} is not sound ({found[0].text}); it stays, as evidence")
    _require_unneeded(one)
    if file.exists():
        _require_same(_only(file, migration), one, file)
    else:
        write(file, [one])
    kept = _only(file, migration)
    _require_same(kept, one, file)
    if audit(kept):
        raise CargoError(f"{file} does not hold a sound history; nothing was removed")
    _remove(store, kept, stored_head.mod_revision)


def _require_unneeded(one: Recording) -> None:
    events = one.events()
    if decode_head(one.head or b"").phase not in ARCHIVABLE_PHASES:
        raise _NeededError(f"{one.migration} has not come to an end that nobody needs any more")
    types = {event.type for event in events}
    request = request_of(events)
    if "rolled_back" in types and "target_cleaned" not in types and request is not None:
        raise _NeededError(f"{request.target} was off, and will clean up by this history when it is back")


def _only(file: Path, migration: str) -> Recording:
    try:
        found = read(file)
    except OSError as error:
        raise CargoError(f"{file} cannot be read back: {error.strerror}; nothing was removed") from error
    if set(found) != {migration}:
        raise CargoError(f"{file} exists already and holds something else; nothing was removed")
    return found[migration]


def _require_same(kept: Recording, stored: Recording, file: Path) -> None:
    if (kept.texts, kept.head) != (stored.texts, stored.head):
        raise CargoError(f"{file} exists already and holds another history; nothing was removed")


def _remove(store: Store, kept: Recording, head_revision: int) -> None:
    """Take ``kept`` off the store. The first transaction is the point of no return."""
    keys, migration = store.keys, kept.migration
    head_key = keys.head(migration)
    doomed = [head_key, keys.control(migration), *_request_keys(store, migration), *_pointers(store, kept)]
    doomed += [keys.event(migration, number) for number, _ in kept.texts]  # as many as fit: usually all
    outcome = store.transact(
        (Compare(head_key, "mod", head_revision),), [Delete(key) for key in dict.fromkeys(doomed[:DELETE_BATCH])]
    )
    if not outcome.succeeded and store.get(head_key) is not None:
        raise CargoError(f"{migration} has gone on meanwhile; it stays")
    _remove_events(store, kept)


def _remove_events(store: Store, kept: Recording) -> None:
    store.delete_prefix(store.keys.events(kept.migration))
    store.delete_prefix(store.keys.progress_of(kept.migration))


def _request_keys(store: Store, migration: str) -> list[str]:
    """The request, also one whose id was illegal and was answered under a name made from it."""
    if not migration.startswith("invalid-"):
        return [store.keys.request(migration)]
    prefix = store.keys.requests
    found = [item.key for item in store.range(prefix) if safe_id_for(item.key[len(prefix) :]) == migration]
    return [store.keys.request(migration), *found]


def _pointers(store: Store, kept: Recording) -> list[str]:
    request = request_of(kept.events())
    hosts = {request.source, request.target} if request is not None else set()
    return [store.keys.inbox_pointer(host, kept.migration) for host in sorted(hosts)]


def finish_interrupted(store: Store, directory: Path) -> list[Result]:
    """Finish removals that an earlier ``archive`` into ``directory`` could not finish."""
    results = []
    for file in sorted(directory.glob(f"*{SUFFIX}")):
        migration = file.name.removesuffix(SUFFIX)
        if not valid_migration_id(migration):
            continue
        items = store.range(store.keys.migration(migration))
        if not items or any(item.key == store.keys.head(migration) for item in items):
            continue
        try:
            _finish_one(store, file, recording(store.keys, migration, items))
        except CargoError as error:
            results.append(Result(migration, None, str(error)))
        else:
            results.append(Result(migration, file))
    return results


def _finish_one(store: Store, file: Path, left: Recording) -> None:
    kept = _only(file, left.migration)
    if left.strange or not set(left.texts) <= set(kept.texts) or audit(kept):
        raise CargoError(f"what is left of {left.migration} in the store is not what {file} holds; it stays")
    _remove_events(store, kept)


def utc_now() -> datetime:
    """The present, for ``due``."""
    return datetime.now(UTC)
