"""From the stop to the release: whatever starts the source's container again, it is stopped again.

A14, A15: a Compose project, a watchdog or a person may do that behind our back. The one-runner promise comes
first; that the data may have changed meanwhile is said, and the comparison at the end will show it.
"""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.stop_container import is_being_stopped, ran_again
from hostd.turn import StartedAgainError


class GuardSource(Effect):
    """Looks at once whenever Docker tells of a start; a container that stays down costs nothing."""

    name: ClassVar[str] = "guard_source"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        engine = context.bench.engine
        context.bench.guarded[prepared.container_id] = context.migration
        inspected = engine.inspect(prepared.container_id)
        if inspected is None:
            return None
        engine.set_restart_policy(prepared.container_id, "no")  # a question, unless somebody has set another since
        if not inspected["State"]["Running"]:
            # After the claim the comparison with the target tells; before it there is nothing to compare with.
            if context.view.state == "frozen" and ran_again(context, inspected):
                raise _started_again(context, "it has ended by now")
            return None
        engine.stop(prepared.container_id, 0)
        new_life = context.view.boots.get("source_stopped") != context.bench.boot
        if new_life and is_being_stopped(context, inspected):
            return None  # its processes had ended, and Docker had not taken note yet when the agent was started anew
        raise _started_again(context, "it was stopped again")

    def undo(self, context: Context) -> Outcome:
        """The source may run its container again."""
        for container_id, migration in list(context.bench.guarded.items()):
            if migration == context.migration:
                del context.bench.guarded[container_id]
        return None


def _started_again(context: Context, now: str) -> StartedAgainError:
    return StartedAgainError(
        f"the container {context.view.source_prepared.container_name!r} was started on {context.host} by something else "
        f"after it had been stopped for its move; {now}. Its data there may have changed since: find out what started it "
        "(Compose, a watchdog, a person) and keep it from doing so",
        context.host,
        context.view.request.target,
    )
