"""Begin the connection to the source while it prepares: a key exchange takes as long as its preparing."""

from __future__ import annotations

import threading
from typing import ClassVar

from events.errors import PermanentError
from hostd.effects.arrival import peer_at
from hostd.effects.base import Context, Effect, Outcome
from hostd.opening import Opening
from hostd.peer import Peer


class ConnectSource(Effect):
    """Does not wait, and never fails: whoever needs the connection waits for it, and says what is wrong with it."""

    name: ClassVar[str] = "connect_source"

    def run(self, context: Context) -> Outcome:
        peer = _registered(context)
        if peer is not None:
            transport = context.bench.transport

            def connect(called_off: threading.Event) -> None:
                transport.check(peer, cancelled=called_off)

            connections = context.bench.connections
            for ended in [migration for migration, opening in connections.items() if opening.ended]:
                del connections[ended]
            connections[context.migration] = Opening(context.migration, connect)
        return None

    def undo(self, context: Context) -> Outcome:
        """The last of what is undone: nothing of this migration refers to the source any more."""
        opening = context.bench.connections.pop(context.migration, None)
        if opening is not None:
            opening.call_off()
        peer = _registered(context)
        if peer is not None:
            context.bench.transport.let_go(peer)
        return None


def _registered(context: Context) -> Peer | None:
    """The source as it was registered; None if the history does not say, as those of earlier coordinators, or says nonsense."""
    address = context.view.requested.source_address
    try:
        return peer_at(context, address) if address else None
    except PermanentError as error:
        context.log.warning("the source's address cannot be used", reason=str(error))
        return None
