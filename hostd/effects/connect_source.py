"""Begin the connection to the source while it prepares: a key exchange takes as long as its preparing."""

from __future__ import annotations

from typing import ClassVar

from events.errors import PermanentError
from hostd.effects.arrival import peer_at
from hostd.effects.base import Context, Effect, Outcome


class ConnectSource(Effect):
    """Does not wait, and never fails: whoever needs the connection waits for it, and says what is wrong with it."""

    name: ClassVar[str] = "connect_source"

    def run(self, context: Context) -> Outcome:
        address = context.view.requested.source_address
        if address:
            try:
                peer = peer_at(context, address)
            except PermanentError as error:
                context.log.warning("the source's address cannot be used", reason=str(error))
            else:
                context.bench.transport.connect_ahead(peer)
        return None
