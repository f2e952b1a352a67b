"""Which events of a recorded history are not proven to be by whom they say, in a secured fleet.

The counterpart of ``coordinator/audit.py`` for what a text alone cannot show: it needs the pins, which come from the bus.
In a fleet that is not secured, nothing is found here.
"""

from __future__ import annotations

from coordinator.findings import Finding
from coordinator.recording import Recording
from events.errors import ChainError, SchemaError
from events.schema import Event, decode_event
from events.store import Store

RULE = "signature"


def unproven(store: Store, recorded: Recording) -> list[Finding]:
    """One Finding for each event whose author is not proven. Raises StoreUnavailableError without the pins."""
    if store.trust is None:
        return []
    events: list[Event] = []
    for _, text in recorded.texts:
        try:
            events.append(decode_event(text))
        except SchemaError:
            continue  # the audit says so

    def first() -> Event:
        if not events or events[0].seq != 1:
            raise ChainError("its first event is missing")
        return events[0]

    try:
        return [Finding(seq, RULE, text) for seq, text in store.trust.troubles(recorded.migration, events, first)]
    except ChainError as error:
        return [Finding(0, RULE, f"who may write in it cannot be known: {error}")]
