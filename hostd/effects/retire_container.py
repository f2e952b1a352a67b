"""Let the source go: keep the stopped container under a marked name, or remove it with its volumes."""

from __future__ import annotations

import shutil
from typing import ClassVar

from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.export_trees import withdraw

KEPT_SUFFIX = ".cargo-"


class RetireContainer(Effect):
    """Keeping is the default: disarmed, renamed, so that it neither starts nor stands in anyone's way."""

    name: ClassVar[str] = "retire_container"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        withdraw(context)
        engine = context.bench.engine
        context.bench.guarded.pop(prepared.container_id, None)
        inspected = engine.inspect(prepared.container_id)
        if context.view.requested.request.on_release == "remove":
            if inspected is not None:
                engine.remove(prepared.container_id)
            for mount in prepared.mounts:
                if mount.kind == "volume":
                    engine.volume_remove(mount.name)
            self._forget(context)
            return {"kept_as": None}
        if inspected is None:
            return {"kept_as": None}
        kept = f"{prepared.container_name}{KEPT_SUFFIX}{context.migration}"
        engine.set_restart_policy(prepared.container_id, "no")
        engine.rename(prepared.container_id, kept)
        self._forget(context)
        return {"kept_as": kept}

    @staticmethod
    def _forget(context: Context) -> None:
        shutil.rmtree(context.directory, ignore_errors=True)
