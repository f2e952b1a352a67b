"""Count the bytes and files of every data mount, so that the target can check its space."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from hostd.effects.base import Context, Effect, Outcome
from hostd.manifest import usage
from hostd.spec import data_mounts


class MeasureMounts(Effect):
    """Returns ``mounts`` with sizes. Reads directories only, never contents."""

    name: ClassVar[str] = "measure_mounts"

    def run(self, context: Context) -> Outcome:
        inspected = context.bench.engine.inspect(context.view.requested.container_id) or {}
        measured = []
        for mount in data_mounts(inspected):
            tree = Path(mount.tree)
            size_bytes, files, _inodes = usage(tree)
            measured.append(
                msgspec.structs.replace(mount, size_bytes=size_bytes, files=files, single_file=not tree.is_dir())
            )
            context.check_cancelled()
        return {"mounts": tuple(measured)}
