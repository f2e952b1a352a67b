"""Identity, time and authorship for events: the one place that reads a clock or draws an id for them.

A process makes one ``Stamper`` when it starts and stamps whatever its core decided to append. The cores
themselves never see a clock; what they know of time came in as a field of an event.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from events.schema import Stamp


def utc_now_text() -> str:
    """The present, RFC 3339, UTC, milliseconds: ``2031-05-04T12:00:00.123Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Stamper:
    """Stamps for one life of one process.

    ``by`` is ``coordinator/<name>`` or ``hostd/<host>``. ``boot`` names this life; a new one is drawn unless
    it is given, so that claims from before a restart can be told apart.
    """

    def __init__(self, by: str, boot: str | None = None) -> None:
        self.by = by
        self.boot = boot if boot is not None else str(uuid.uuid4())

    def stamp(self, epoch: int) -> Stamp:
        """A new stamp. ``epoch`` is the coordinator's leadership revision in force."""
        return Stamp(uuid=str(uuid.uuid4()), at=utc_now_text(), by=self.by, boot=self.boot, epoch=epoch)
