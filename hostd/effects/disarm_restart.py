"""Set the source's restart policy to ``no``, so that nothing revives the container after the stop."""

from __future__ import annotations

from typing import Any, ClassVar

from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome, note_stop, stop_intended


class DisarmRestart(Effect):
    """Docker would start a container with another policy after a reboot or a restart of the daemon."""

    name: ClassVar[str] = "disarm_restart"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        inspected = context.bench.engine.inspect(prepared.container_id)
        if inspected is None:
            raise ContainerChangedError(f"the container {prepared.container_name!r} has been removed")
        if not stop_intended(context):
            _check_unchanged(prepared.container_name, inspected)
            note_stop(context)
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


def _check_unchanged(name: str, inspected: dict[str, Any]) -> None:
    """F4, F5: a person's hand, or the container's own end, comes first. What was merely restarted goes on."""
    called = str(inspected["Name"]).removeprefix("/")
    if called != name:
        raise ContainerChangedError(f"the container {name!r} was renamed to {called!r} during its migration")
    if not inspected["State"]["Running"]:
        raise ContainerChangedError(f"the container {name!r} has stopped by itself or by a person's hand")
    if inspected["State"]["Paused"]:
        raise ContainerChangedError(f"the container {name!r} was paused during its migration; unpause it first")
