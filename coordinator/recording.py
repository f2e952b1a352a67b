"""One migration's history as the store or a file holds it: exact texts, not yet judged.

Everything that looks at histories (``history``, ``replay``, ``verify``, ``export``) starts from a Recording, wherever it
came from. It may be broken in any way; ``events`` is strict and raises, ``coordinator/audit.py`` looks at the texts
themselves and says what is wrong.

The lines of an exported history, which ``lines`` writes and ``parse`` reads:

    {"cargo_history":1,"migration":"web-7","events":17,…}     what follows belongs to this migration
    {"at":…,"seq":1,…}                                        each event's text exactly as it was stored
    {"at":…,"seq":17,…,"phase":"completed"}                   the head, likewise

A text that is no single line of UTF-8, which only a broken history has, makes ``encoding`` say ``base64``.

Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from events import history
from events.errors import CargoError, ChainError
from events.following import KeyValue
from events.keyspace import Keyspace, valid_migration_id
from events.schema import MAX_EVENT_BYTES, Event, decode_event, decode_head

FORMAT = 1
ARCHIVABLE_PHASES = frozenset({"rejected", "aborted", "rolled_back", "finalised"})
"""Ends after which no agent needs the history any more. ``completed`` is not among them: the target's agent still
supervises the container by it, and finalises by it."""
MAX_LINE_BYTES = 2 * MAX_EVENT_BYTES
"""The longest line that a file may have: an event's text as base64."""


class FileFormatError(CargoError):
    """A file is not one that ``cargoctl export`` wrote."""


@dataclass(frozen=True)
class Recording:
    """What is stored of one migration."""

    migration: str
    texts: tuple[tuple[int, bytes], ...]
    """The number in each event's key, and the exact text, ascending."""
    head: bytes | None
    strange: tuple[str, ...] = ()
    """Keys among them that belong there under no rule."""
    request: bytes | None = None
    """What a person had put, kept in exports."""

    def events(self) -> list[Event]:
        """The history, if it is whole. Raises SchemaError or ChainError."""
        if self.strange:
            raise ChainError(f"migration {self.migration}: the key {self.strange[0]!r} belongs to no history")
        events = []
        for number, text in self.texts:
            event = decode_event(text)
            if event.seq != number:
                raise ChainError(f"migration {self.migration}: the key of event {number} holds event {event.seq}")
            events.append(event)
        head = None if self.head is None else decode_head(self.head)
        return history.continued(self.migration, events, head, 0, None)


def recording(keys: Keyspace, migration: str, items: Iterable[KeyValue], request: bytes | None = None) -> Recording:
    """The recording in ``items``, all keys under ``keys.migration(migration)``."""
    texts: list[tuple[int, bytes]] = []
    strange: list[str] = []
    head: bytes | None = None
    for item in items:
        place = keys.parse(item.key)
        if place is not None and place.kind == "event":
            texts.append((int(place.parts[1]), item.value))
        elif place is not None and place.kind == "head":
            head = item.value
        else:
            strange.append(item.key)
    return Recording(migration, tuple(sorted(texts)), head, tuple(strange), request)


# --- files ---------------------------------------------------------------------------------------


def lines(recorded: Recording, exported_at: str) -> Iterator[bytes]:
    """The lines of an export, each with its line feed."""
    bodies = [text for _, text in recorded.texts] + ([] if recorded.head is None else [recorded.head])
    clean = all(_clean(body) for body in bodies)
    meta: dict[str, Any] = {
        "cargo_history": FORMAT,
        "migration": recorded.migration,
        "events": len(recorded.texts),
        "head": recorded.head is not None,
        "encoding": "text" if clean else "base64",
        "exported_at": exported_at,
    }
    numbers = [number for number, _ in recorded.texts]
    if numbers != list(range(1, len(numbers) + 1)):
        meta["numbers"] = numbers
    if recorded.strange:
        meta["strange"] = [key.encode("utf-8", "surrogateescape").decode("latin-1") for key in recorded.strange]
    if recorded.request is not None:
        meta["request"] = (
            recorded.request.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
        )
    yield json.dumps(meta, separators=(",", ":")).encode() + b"\n"
    for body in bodies:
        yield (body if clean else base64.b64encode(body)) + b"\n"


def _clean(body: bytes) -> bool:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return body.strip() == body and body.startswith(b"{") and b"\n" not in body


def parse(raw_lines: Sequence[bytes]) -> dict[str, Recording]:
    """The recordings in the lines of a file, by migration. Raises FileFormatError with the number of the line."""
    found: dict[str, Recording] = {}
    at = 0
    while at < len(raw_lines):
        meta = _meta(raw_lines[at], at + 1)
        count = meta["events"] + bool(meta["head"])
        bodies = list(raw_lines[at + 1 : at + 1 + count])
        if len(bodies) < count:
            raise FileFormatError(
                f"line {at + 1} announces {count} lines, but only {len(bodies)} follow: the file was cut"
            )
        if meta["encoding"] == "base64":
            bodies = [_decoded(body, at + 2 + offset) for offset, body in enumerate(bodies)]
        one = _recording_of(meta, bodies, at + 1)
        if one.migration in found:
            raise FileFormatError(f"line {at + 1}: the file holds {one.migration} twice")
        found[one.migration] = one
        at += 1 + count
    return found


def _recording_of(meta: dict[str, Any], bodies: list[bytes], line: int) -> Recording:
    numbers = meta.get("numbers", list(range(1, meta["events"] + 1)))
    if len(numbers) != meta["events"] or sorted(set(numbers)) != numbers:
        raise FileFormatError(f"line {line}: the numbers of its events are not ascending ones, one for each event")
    request = meta.get("request")
    return Recording(
        meta["migration"],
        tuple(zip(numbers, bodies[: meta["events"]], strict=True)),
        bodies[-1] if meta["head"] else None,
        tuple(meta.get("strange", ())),
        None if request is None else request.encode(),
    )


_META: dict[str, tuple[type, bool]] = {
    "cargo_history": (int, True),
    "migration": (str, True),
    "events": (int, True),
    "head": (bool, True),
    "encoding": (str, True),
    "exported_at": (str, True),
    "numbers": (list, False),
    "strange": (list, False),
    "request": (str, False),
}


def _meta(raw: bytes, line: int) -> dict[str, Any]:
    try:
        meta = json.loads(raw)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or "cargo_history" not in meta:
        raise FileFormatError(f"line {line} should begin a history, as `cargoctl export` writes it, and does not")
    if meta["cargo_history"] != FORMAT:
        raise FileFormatError(
            f"line {line}: format {str(meta['cargo_history'])[:20]} is not known here; upgrade cargoctl"
        )
    for name, (kind, required) in _META.items():
        value = meta.get(name)
        if (value is None and required) or (value is not None and type(value) is not kind):
            raise FileFormatError(f"line {line}: {name!r} is missing or of a wrong type")
    try:
        json.dumps(meta, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FileFormatError(f"line {line} holds text that is not Unicode") from error
    lists = (*((number, int) for number in meta.get("numbers", ())), *((key, str) for key in meta.get("strange", ())))
    if any(type(value) is not kind for value, kind in lists):
        raise FileFormatError(f"line {line}: one of its lists holds something of a wrong type")
    if not valid_migration_id(meta["migration"]) or meta["events"] < 0 or meta["encoding"] not in ("text", "base64"):
        raise FileFormatError(f"line {line}: this is not how `cargoctl export` begins a history")
    return meta


def _decoded(body: bytes, line: int) -> bytes:
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileFormatError(f"line {line} is no base64: {error}") from error
