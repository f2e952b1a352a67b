"""How far this host has seen each history, kept on its own disk: evidence against a bus that went back in time.

An etcd that was restored from an older snapshot has lost the tail of a history, and may be given another one.
Acting on it could start a container twice. So the newest event that this host has seen is noted, and a history
that no longer holds it is not acted upon: a person has to say what is true.

It is evidence, never the record: losing the file costs the check, nothing else.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from events.errors import ChainError
from events.schema import Event


class Seen(msgspec.Struct, frozen=True):
    """The newest event of one history that this host has seen."""

    seq: int
    digest: str


class Journal:
    """One small file for each migration, below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, migration: str, events: list[Event]) -> None:
        """Raise ChainError unless ``events``, a whole history, holds what was seen of it before."""
        seen = self._read(migration)
        if seen is None:
            return
        found = events[seen.seq - 1].digest if 1 <= seen.seq <= len(events) else ""
        if found != seen.digest:
            raise ChainError(
                f"migration {migration}: this host has seen event {seen.seq} of another history than the one that is "
                "stored now; etcd was restored from an older state or changed by hand. Nothing is started, stopped or "
                "removed here for it; the container stays as it is. Before anything else find out which host runs the "
                "container, and do there what the operator's guide says of a history that has lost its end. The evidence "
                f"is {self._file(migration)}: without it this host would act on the history as it is stored now"
            )

    def note(self, migration: str, event: Event) -> None:
        """Remember ``event`` as the newest seen."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._file(migration).with_suffix(".new")
        new.write_bytes(msgspec.json.encode(Seen(event.seq, event.digest)))
        os.replace(new, self._file(migration))

    def forget(self, migration: str) -> None:
        """The migration has ended here."""
        self._file(migration).unlink(missing_ok=True)

    def _file(self, migration: str) -> Path:
        return self._directory / f"{migration}.json"

    def _read(self, migration: str) -> Seen | None:
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return msgspec.json.decode(self._file(migration).read_bytes(), type=Seen)
        return None
