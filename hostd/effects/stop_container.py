"""Stop the container on the source."""

from __future__ import annotations

from typing import Any, ClassVar

from events.errors import PermanentError
from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome, stop_intended
from hostd.effects.shared import flush_shared, require_shares
from hostd.engine import StopResult
from hostd.openfiles import writable_files


class StopContainer(Effect):
    """Done when the container's processes are gone: Docker takes note of that while the changes are already listed.

    Looks first at what the container holds open. That it is us, ``disarm_restart`` has noted.

    The open files are kept beside the trackers, because after the stop nobody can ask the processes any
    more which files they had mapped.
    """

    name: ClassVar[str] = "stop_container"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        engine = context.bench.engine
        if engine.inspect(prepared.container_id) is None:
            raise ContainerChangedError(f"the container {prepared.container_name!r} has been removed")
        if context.migration not in context.bench.open_files:
            pid = engine.pid(prepared.container_id)
            context.bench.open_files[context.migration] = writable_files(pid) if pid else {}
        _check_disarmed(context)
        result = engine.stop_early(prepared.container_id, context.view.requested.request.stop_timeout_seconds)
        flush_shared(context)
        return how_it_ended(result)

    def undo(self, context: Context) -> Outcome:
        """Start the container again, if it was stopped for this migration."""
        context.bench.open_files.pop(context.migration, None)
        if "source_prepared" not in context.view.facts:
            return {"running": True, "note": "never touched"}
        prepared = context.view.source_prepared
        engine = context.bench.engine
        inspected = engine.inspect(prepared.container_id)
        if inspected is None:
            return {"running": False, "note": "the container was removed by somebody else meanwhile"}
        if inspected["State"]["Running"]:
            return {"running": True, "note": "never stopped" if not stop_intended(context) else ""}
        if not stop_intended(context):
            return {"running": False, "note": "left stopped: not this migration had stopped it"}
        require_shares(context)
        engine.start(prepared.container_id)
        return {"running": True}


def how_it_ended(result: StopResult | None) -> dict[str, Any]:
    """The fields of an event that tell of the stop; none while Docker does not know."""
    if result is None:
        return {}
    return {"exit_code": result.exit_code, "unclean": result.unclean, "stopped_at": result.finished_at}


def _check_disarmed(context: Context) -> None:
    prepared = context.view.source_prepared
    inspected = context.bench.engine.inspect(prepared.container_id)
    policy = ((inspected or {}).get("HostConfig") or {}).get("RestartPolicy") or {}
    if policy.get("Name") not in ("no", ""):
        raise PermanentError(
            f"the container {prepared.container_name!r} has the restart policy {policy.get('Name')!r} again, "
            "although it was set to 'no': something else manages it"
        )
