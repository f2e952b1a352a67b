"""Keeps the coordinator's failpoints as ``failpoints/coordinator`` says, from a thread of its own.

The coordinator's one working thread may be waiting at a ``pause``; it could never read that the pause was taken away.
What a tester puts there is in force before the coordinator leads for the first time, unless the store does not answer.
"""

from __future__ import annotations

import threading

import structlog

from events.errors import CargoError
from events.failpoint_names import COORDINATOR
from events.failpoints import Failpoints
from events.store import Changes, Snapshot, Store

FIRST_LOOK_SECONDS = 2.0
"""How long the coordinator waits for the first look before it campaigns: a store that is up answers in milliseconds."""
JOIN_SECONDS = 5.0


class FaultWatch:
    """Runs from ``start`` to ``close``."""

    def __init__(self, store: Store, failpoints: Failpoints, log: structlog.stdlib.BoundLogger) -> None:
        self._store = store
        self._key = store.keys.failpoints(COORDINATOR)
        self._failpoints = failpoints
        self._log = log
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="failpoints", daemon=True)

    def start(self) -> None:
        """Begin, and wait a moment for the first look."""
        self._thread.start()
        self._looked.wait(FIRST_LOOK_SECONDS)

    def close(self) -> None:
        """End. Harmless when it has not started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            with self._store.follow(self._key, stop=self._stop) as follower:
                for item in follower:
                    if isinstance(item, Snapshot):
                        found = [pair.value for pair in item.items if pair.key == self._key]
                        if found or item.resync:  # nothing there at the start leaves what the environment asked for
                            self._set(found[0] if found else b"")
                        self._looked.set()
                    elif isinstance(item, Changes):
                        for change in item.changes:
                            if change.key == self._key:
                                self._set(change.value or b"")
        except CargoError as error:
            self._log.warning("failpoints are not followed any more", reason=str(error))
            self._looked.set()

    def _set(self, value: bytes) -> None:
        try:
            self._failpoints.set(value.decode("utf-8", "replace"))
        except CargoError as error:
            self._log.warning("failpoints not changed", reason=str(error))
            return
        if value:
            self._log.warning("failpoints in force", failpoints=value.decode("utf-8", "replace"))
