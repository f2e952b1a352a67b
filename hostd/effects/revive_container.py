"""Rolling back: the container runs on the source again, as it was: name, restart policy, ports, networks."""

from __future__ import annotations

import shutil
from typing import ClassVar

from events.errors import PermanentError
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.carry_back import carry_stage
from hostd.effects.export_trees import withdraw
from hostd.effects.shared import require_shares
from hostd.rootfs import remove_empty_stages


class ReviveContainer(Effect):
    """Only after ``carried_back``, which cannot precede ``target_stopped`` or a person's word."""

    name: ClassVar[str] = "revive_container"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        engine = context.bench.engine
        withdraw(context)
        context.bench.guarded.pop(prepared.container_id, None)
        if engine.inspect(prepared.container_id) is None:
            raise PermanentError(
                f"the container {prepared.container_name!r} that was kept on {context.host} is gone; its data is "
                "here, so create it by hand"
            )
        require_shares(context)
        engine.rename(prepared.container_id, prepared.container_name)
        # The policy first: a Docker that restarts between the two would leave the container down, unnoticed (A8).
        engine.set_restart_policy(prepared.container_id, prepared.restart_policy, prepared.restart_max_retries)
        engine.start(prepared.container_id)
        for mount in prepared.mounts:
            stage = carry_stage(context, mount)
            if stage.exists():
                shutil.rmtree(stage)
            remove_empty_stages(stage)
        shutil.rmtree(context.directory, ignore_errors=True)
        return {"running": True}
