"""Describe the frozen source completely, contents' digests included, for the target to compare against."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from events.schema import TreeDigest
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.publish import mount_label
from hostd.effects.stop_container import how_it_ended
from hostd.engine import MissingError
from hostd.layer import carried
from hostd.manifest import walk, write_manifest
from hostd.priority import in_background


class DigestTrees(Effect):
    """Runs while the container already works on the target: nobody waits for it but the release."""

    name: ClassVar[str] = "digest_trees"

    def run(self, context: Context) -> Outcome:
        for key in [key for key in context.bench.trackers if key[0] == context.migration]:
            context.bench.trackers.pop(key).stop()
        context.bench.open_files.pop(context.migration, None)
        trees = []
        for mount in context.view.source_prepared.mounts:
            files = size = 0

            def counted(tree: Path) -> object:
                nonlocal files, size
                for entry in carried(mount, walk(tree, digest=True)):  # noqa: B023 (used up within this turn)
                    context.check_cancelled()
                    files += entry.kind == "f"
                    size += entry.size if entry.kind == "f" else 0
                    yield entry

            file = context.directory / f"digest-{mount_label(context, mount)}.manifest"
            reference = in_background(partial(write_manifest, file, counted(Path(mount.tree))))  # type: ignore[arg-type]
            trees.append(TreeDigest(destination=mount.destination, manifest=reference, files=files, size_bytes=size))
        return {"trees": tuple(trees), **self._ended(context)}

    def _ended(self, context: Context) -> dict[str, Any]:
        stopped = context.view.source_stopped
        if stopped is None or stopped.exit_code is not None:
            return {}
        with contextlib.suppress(MissingError):  # somebody has removed the source's container
            return how_it_ended(context.bench.engine.wait_exit(context.view.source_prepared.container_id, 1.0))
        return {}
