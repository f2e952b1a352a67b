"""Set the source's restart policy to ``no``, so that nothing revives the container after the stop."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome, stop_intended


class DisarmRestart(Effect):
    """Docker would start a container with another policy after a reboot or a restart of the daemon."""

    name: ClassVar[str] = "disarm_restart"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        inspected = context.bench.engine.inspect(prepared.container_id)
        if inspected is None:
            raise ContainerChangedError(f"the container {prepared.container_name!r} has been removed")
        if not inspected["State"]["Running"] and not stop_intended(context):
            raise ContainerChangedError(
                f"the container {prepared.container_name!r} has stopped by itself or by a person's hand"
            )
        context.bench.engine.set_restart_policy(prepared.container_id, "no")
        return None

    def undo(self, context: Context) -> Outcome:
        """Give the container its own policy back."""
        if "cutover_ordered" not in context.view.facts:
            return None  # never disarmed, and a person may have changed it since
        prepared = context.view.source_prepared
        if context.bench.engine.inspect(prepared.container_id) is None:
            return None
        context.bench.engine.set_restart_policy(
            prepared.container_id, prepared.restart_policy, prepared.restart_max_retries
        )
        return None
