"""Look at every data mount as a whole: its size, and whether there is anything in it that cannot be carried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import msgspec

from events.errors import RefusedError
from events.schema import Mount
from hostd import mounts
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.shared import moving_mounts
from hostd.inventory import TreeSize, measure_tree
from hostd.manifest import escape, unsupported, walk
from hostd.placement import obstacles

MAX_REASONS = 20
"""Of a tree: a person mends the cause, not each of a million files."""


class MeasureMounts(Effect):
    """P14: what cannot be carried is refused by name before anything stops. Reads metadata, never contents."""

    name: ClassVar[str] = "measure_mounts"

    def run(self, context: Context) -> Outcome:
        inspected = context.bench.engine.inspect(context.view.requested.container_id) or {}
        measured = []
        reasons: list[str] = []
        for mount in moving_mounts(context, inspected):
            found, problems = _survey(context, mount)
            measured.append(found)
            reasons += problems
        if reasons:
            raise RefusedError(reasons)
        return {"mounts": tuple(measured)}


def _survey(context: Context, mount: Mount) -> tuple[Mount, list[str]]:
    tree = Path(mount.tree)
    problems = [
        f"{mount.destination}: {escape(below.point)} is a mount of its own inside of the data, which would not travel"
        for below in mounts.mounts_below(tree)
    ]
    size_bytes = files = 0
    linked: set[int] = set()
    for entry in walk(tree):
        context.check_cancelled()
        if entry.link_group not in linked:  # several names of one file take its space once
            files += entry.kind == "f"
            size_bytes += entry.size
        if entry.link_group:
            linked.add(entry.link_group)
        if len(problems) < MAX_REASONS:
            found = dict.fromkeys((*unsupported([entry]), *obstacles([entry])))
            problems += [f"{mount.destination}: {why}" for why in found]
    on_disk = measure_tree(mount.tree, context.cancelled.is_set) or TreeSize(0, 0)
    measured = msgspec.structs.replace(
        mount,
        size_bytes=size_bytes,
        files=files,
        allocated_bytes=on_disk.size_bytes,
        entries=on_disk.files,
        single_file=not os.path.isdir(tree),
    )
    return measured, problems[:MAX_REASONS]
