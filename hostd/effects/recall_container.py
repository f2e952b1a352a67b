"""Rolling back: the container must not run on the target any more, whatever happens."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.shared import flush_shared


class RecallContainer(Effect):
    """Disarms, then stops. Everything is fetched before, so that the source may be changed afterwards."""

    name: ClassVar[str] = "recall_container"

    def run(self, context: Context) -> Outcome:
        exit_code = _stop(context)
        flush_shared(context)
        return {"exit_code": exit_code, "address": context.bench.settings.address}

    def undo(self, context: Context) -> Outcome:
        """The source runs again: make sure once more that nothing runs here."""
        _stop(context)
        return None


def _stop(context: Context) -> int:
    container_id = our_container(context)
    if container_id is None:
        return 0
    engine = context.bench.engine
    engine.set_restart_policy(container_id, "no")
    return engine.stop(container_id, context.view.requested.request.stop_timeout_seconds).exit_code
