"""Stop the container on the source."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from events.errors import PermanentError
from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome, stop_intended
from hostd.effects.shared import flush_shared, require_shares
from hostd.engine import StopResult
from hostd.openfiles import writable_files
from hostd.spec import DEFAULT_STOP_TIMEOUT_SECONDS

BOOKKEEPING_SECONDS = 5.0
"""What Docker may need after a container's end until it says so."""


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
        inspected = engine.inspect(prepared.container_id)
        if inspected is None:
            raise ContainerChangedError(f"the container {prepared.container_name!r} has been removed")
        if context.migration not in context.bench.open_files:
            pid = engine.pid(prepared.container_id)
            context.bench.open_files[context.migration] = writable_files(pid) if pid else {}
        _check_disarmed(context)
        grace = context.view.requested.request.stop_timeout_seconds
        _asked(context).write_text(_run_of(inspected), encoding="utf-8")
        if not prepared.shared:
            return how_it_ended(engine.stop_early(prepared.container_id, grace))
        # The kernel brings what was written to a share there while Docker unmounts it, and that is part of the stop.
        result = engine.stop(prepared.container_id, grace)
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
        if inspected["State"]["Running"] and not _stops_yet(context, inspected):
            return {"running": True, "note": "never stopped" if not stop_intended(context) else ""}
        if not stop_intended(context):
            return {"running": False, "note": "left stopped: not this migration had stopped it"}
        require_shares(context)
        engine.start(prepared.container_id)
        return {"running": True}


def is_being_stopped(context: Context, inspected: Mapping[str, Any]) -> bool:
    """Whether the run of the container that Docker shows is the one that this migration has asked it to stop.

    Docker goes on with a stop when the agent dies, and needs a moment after the end until it takes note of it.
    """
    return bool(run := _run_of(inspected)) and _asked_run(context) == run


def ran_again(context: Context, inspected: Mapping[str, Any]) -> bool:
    """Whether the container was started since this migration asked for its stop, although it may have ended by now."""
    return bool(asked := _asked_run(context)) and asked != _run_of(inspected)


def _asked(context: Context) -> Path:
    """A file that says which run of the container Docker was asked to stop, and, by its time, when."""
    return context.directory / "stop-asked"


def _asked_run(context: Context) -> str:
    """What it says; empty when it is not there, or a crash has left nothing of it."""
    try:
        return _asked(context).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _run_of(inspected: Mapping[str, Any]) -> str:
    return str((inspected.get("State") or {}).get("StartedAt") or "")


def _stops_yet(context: Context, inspected: Mapping[str, Any]) -> bool:
    """Wait for the end of a stop that is under way. Returns whether the container has stopped.

    Else it would end after it was said to run on.
    """
    if not is_being_stopped(context, inspected):
        return False
    grace = context.view.requested.request.stop_timeout_seconds
    if grace is None:
        grace = (inspected.get("Config") or {}).get("StopTimeout")
    longest = (DEFAULT_STOP_TIMEOUT_SECONDS if grace is None or grace < 0 else grace) + BOOKKEEPING_SECONDS
    left = min(_asked(context).stat().st_mtime + longest - time.time(), longest)
    return left > 0 and context.bench.engine.wait_exit(context.view.source_prepared.container_id, left) is not None


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
