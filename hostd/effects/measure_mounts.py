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
from hostd.entry import BLOCK_BYTES, LAYER_MARKS, plain
from hostd.file_flags import Uncarried
from hostd.layer import ROOTFS, is_whiteout, layer_entry, layer_obstacle
from hostd.manifest import Entry, escape, unsupported, walk
from hostd.placement import obstacles
from hostd.rootfs import UnknownStoreError, upper_directory
from hostd.tracker import Tracker

MAX_REASONS = 20
"""Of a tree: a person mends the cause, not each of a million files."""


class MeasureMounts(Effect):
    """P14: what cannot be carried is refused by name before anything stops. Reads metadata, never contents."""

    name: ClassVar[str] = "measure_mounts"

    def run(self, context: Context) -> Outcome:
        measured = []
        reasons: list[str] = []
        warnings: list[str] = []
        for mount in trees_of(context):
            with Uncarried(mount.tree) as uncarried:
                found, problems, all_plain = _survey(context, mount, uncarried)
                warnings += uncarried.warnings(mount.destination)
            tracker = context.bench.trackers.get((context.migration, mount.destination))
            if isinstance(tracker, Tracker):
                tracker.plain = all_plain
            measured.append(found)
            reasons += problems
        if reasons:
            raise RefusedError(reasons)
        return {"mounts": tuple(measured), "warnings": tuple(warnings)}


def trees_of(context: Context) -> list[Mount]:
    """Every tree that travels: the data mounts, and the writable layer unless the request leaves it. Sizes are 0.

    Raises RefusedError when it is not known where the layer lies.
    """
    engine = context.bench.engine
    inspected = engine.inspect(context.view.requested.container_id) or {}
    found = moving_mounts(context, inspected)
    if not context.view.request.rootfs or not inspected:
        return found
    host_config = inspected.get("HostConfig") or {}
    if host_config.get("StorageOpt"):
        raise RefusedError(
            [
                "the container's writable layer has a size limit (--storage-opt), and could not be replaced by another tree; leave it behind with rootfs: false"
            ]
        )
    try:
        upper = upper_directory(inspected, engine.info())
    except UnknownStoreError as error:
        raise RefusedError(
            [f"{error}; what the container wrote outside of its mounts can be left behind with rootfs: false"]
        ) from error
    return [*found, Mount(kind=ROOTFS, name="", destination="/", tree=str(upper))]


def _survey(context: Context, mount: Mount, uncarried: Uncarried) -> tuple[Mount, list[str], bool]:
    """The mount with its sizes, what cannot be carried of it, and whether all of it is ``plain``."""
    tree = Path(mount.tree)
    problems = [
        f"{mount.destination}: {escape(below.point)} is a mount of its own inside of the data, which would not travel"
        for below in mounts.mounts_below(tree)
    ]
    size_bytes = files = blocks = entries = 0
    linked: set[int] = set()
    all_plain = True
    for entry in walk(tree):
        context.check_cancelled()
        uncarried.look(entry.path)
        if entry.link_group not in linked:  # several names of one file take its space once
            files += entry.kind == "f"
            size_bytes += entry.size
            blocks += entry.blocks
        entries += 1
        all_plain = all_plain and plain(entry)
        if entry.link_group:
            linked.add(entry.link_group)
        if len(problems) < MAX_REASONS:
            found = _layer_problems(entry) if mount.kind == ROOTFS else _problems(entry)
            # What is deep below one long path is the same sentence again and again.
            problems += [line for why in found if (line := f"{mount.destination}: {why}") not in problems]
    measured = msgspec.structs.replace(
        mount,
        size_bytes=size_bytes,
        files=files,
        allocated_bytes=blocks * BLOCK_BYTES,
        entries=entries,
        single_file=mount.kind != ROOTFS and not os.path.isdir(tree),
    )
    return measured, problems[:MAX_REASONS], all_plain


def _problems(entry: Entry) -> list[str]:
    return [*unsupported([entry]), *obstacles([entry])]


def _layer_problems(entry: Entry) -> list[str]:
    obstacle = layer_obstacle(entry)
    plain = layer_entry(entry)
    known = msgspec.structs.replace(plain, xattrs=tuple(pair for pair in plain.xattrs if pair[0] not in LAYER_MARKS))
    return [*([obstacle] if obstacle else []), *(() if is_whiteout(entry) else unsupported([known]))]
