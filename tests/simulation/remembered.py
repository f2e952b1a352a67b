"""What is computed from the same input again and again in a simulation, computed once.

A run of one seed reads each event some twelve times and builds and takes apart the same few keys thousands of times. All of
it is pure, so the answer may be kept; nothing is kept that depends on what happens, and what is kept is bounded.
"""

from __future__ import annotations

from functools import lru_cache

from events import schema, store
from events.keyspace import Keyspace, Place

MAX_KEPT = 2000
"""More than the keys, and the events, of the longest seed."""


class RememberedKeys(Keyspace):
    """A keyspace that knows what it said before."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, Place | None] = {}
        self._events: dict[tuple[str, int], str] = {}
        self._heads: dict[str, str] = {}
        self._event_prefixes: dict[str, str] = {}
        self._pointers: dict[tuple[str, str], str] = {}

    def parse(self, key: str) -> Place | None:
        try:
            return self._places[key]
        except KeyError:
            place = self._places[key] = super().parse(key)
            return place

    def event(self, migration: str, seq: int) -> str:
        try:
            return self._events[migration, seq]
        except KeyError:
            key = self._events[migration, seq] = super().event(migration, seq)
            return key

    def head(self, migration: str) -> str:
        try:
            return self._heads[migration]
        except KeyError:
            key = self._heads[migration] = super().head(migration)
            return key

    def events(self, migration: str) -> str:
        try:
            return self._event_prefixes[migration]
        except KeyError:
            key = self._event_prefixes[migration] = super().events(migration)
            return key

    def inbox_pointer(self, host: str, migration: str) -> str:
        try:
            return self._pointers[host, migration]
        except KeyError:
            key = self._pointers[host, migration] = super().inbox_pointer(host, migration)
            return key


decode_event = lru_cache(MAX_KEPT)(schema.decode_event)
decode_head = lru_cache(MAX_KEPT)(schema.decode_head)


def remember_events() -> None:
    """The same bytes are decoded only once from now on, in this process."""
    schema.__dict__["decode_event"] = store.__dict__["decode_event"] = decode_event
    store.__dict__["decode_head"] = decode_head
