"""What all commands of ``cargoctl`` share: exit codes, how things are shown, and where a history comes from.

A history comes from the bus, or with ``--file`` from what ``cargoctl export`` wrote; the commands do not see the difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from coordinator import archive
from coordinator.authorship import unproven
from coordinator.recording import Recording
from coordinator.timeline import line_of
from events.errors import CargoError, SchemaError, UntrustedError
from events.keyspace import valid_migration_id
from events.schema import Event, plain
from events.store import Store

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

Command = Callable[[Store, argparse.Namespace], int]


class UsageError(CargoError):
    """What was asked for cannot be asked for."""


def console(options: argparse.Namespace) -> Console:
    """Where text for people goes: without colours or wrapping when that is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200, no_color=options.no_color)


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2, sort_keys=True))


def show(event: Event, first: Event, options: argparse.Namespace) -> None:
    """One event: a line for people, or one JSON object a line."""
    if options.json:
        print(json.dumps(plain_event(event)), flush=True)
        return
    console(options).print(line_of(event, first), soft_wrap=True)


def plain_event(event: Event) -> dict[str, Any]:
    """An event for programs."""
    return {
        "seq": event.seq,
        "type": event.type,
        "at": event.at,
        "by": event.by,
        "cause": event.cause,
        "epoch": event.epoch,
        "data": plain(event.data),
    }


# --- where a history comes from ------------------------------------------------------------------


def checked_id(migration: str) -> str:
    """``migration``, if it can be one's id. Raises UsageError."""
    if not valid_migration_id(migration):
        raise UsageError(f"{migration!r} is not the id of a migration")
    return migration


def from_file(file: Path) -> dict[str, Recording]:
    """What ``cargoctl export`` wrote. Raises UsageError when there is no such file, FileFormatError."""
    try:
        return archive.read(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error


def recording_of(store: Store, options: argparse.Namespace) -> Recording:
    """The history that the command line names, broken or not. Raises UsageError when there is none."""
    if options.file is not None:
        found = from_file(options.file)
        if options.id is None and len(found) == 1:
            return next(iter(found.values()))
        one = found.get(options.id) if options.id else None
        if one is None:
            raise UsageError(f"name one of the migrations that {options.file} holds: {', '.join(sorted(found))}")
        return one
    if options.id is None:
        raise UsageError("name a migration; `cargoctl status` lists them all")
    stored = archive.recorded(store, checked_id(options.id))
    if stored is None:
        raise UsageError(f"there is no migration {options.id}; `cargoctl status` lists them all")
    return stored


def events_of(store: Store, options: argparse.Namespace) -> list[Event]:
    """The whole events of that history. Raises UsageError, SchemaError when it is broken."""
    recorded = recording_of(store, options)
    try:
        events = recorded.events()
        require_proven(store, recorded, options)
    except SchemaError as error:
        raise SchemaError(f"{error} (`cargoctl verify {recorded.migration}` says all that is wrong)") from error
    return events


def require_proven(store: Store, recorded: Recording, options: argparse.Namespace) -> None:
    """Raise UntrustedError for a history on the bus whose authors are not proven. A file may be read anywhere."""
    found = unproven(store, recorded) if options.file is None else []
    if found:
        raise UntrustedError(found[0].text)
