"""Rolling back: bring what the container changed on the target into the source's trees.

Contents are pulled aside first; only when everything is here, and durable, the trees are changed, by
renames. So a target that dies in the middle of the transfer leaves the source as it was at the cut-over.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

from events.errors import PermanentError
from events.schema import DirtyManifest, Mount, RollbackOrdered, TargetStopped
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.manifests import fetched_from
from hostd.federation import fold_placeholders
from hostd.layer import ROOTFS
from hostd.manifest import Entry, read_manifest
from hostd.peer import Peer
from hostd.placement import apply
from hostd.rootfs import layer_stage, require_unused

CARRY_STAGE = ".cargo-carry"


class CarryBack(Effect):
    """Moves about as many bytes as the container wrote on the target, whatever the size of the data."""

    name: ClassVar[str] = "carry_back"

    def run(self, context: Context) -> Outcome:
        order = context.view.facts["rollback_ordered"]
        stopped = context.view.facts.get("target_stopped")
        assert isinstance(order, RollbackOrdered)
        if order.discard_target_writes or not isinstance(stopped, TargetStopped):
            return {"bytes_moved": 0, "files": 0}
        if "target_asserted_off" in context.view.facts and not _all_pulled(context):
            # Nothing of it was applied yet, so the source still is what it was at the cut-over.
            return {"bytes_moved": 0, "files": 0}
        started = time.monotonic()
        peer = _peer_of_target(context, stopped)
        trees = {tree.destination: tree for tree in stopped.trees}
        moved = files = 0
        here = [mount for mount in context.view.source_prepared.mounts if _listed(mount, trees)]
        for mount in here:
            if mount.destination not in trees or mount.destination not in stopped.places:
                raise PermanentError(f"the target listed no changes of {mount.destination}")
            received, count = _pull(context, peer, mount, trees[mount.destination], stopped.places[mount.destination])
            moved += received
            files += count
        for mount in here:
            _apply(context, peer, mount, trees[mount.destination])
        return {"bytes_moved": moved, "files": files, "duration_seconds": round(time.monotonic() - started, 3)}


def _peer_of_target(context: Context, stopped: TargetStopped) -> Peer:
    settings = context.bench.settings
    return Peer(
        host=context.view.requested.request.target,
        address=stopped.address,
        port=settings.ssh_port,
        user=settings.ssh_user,
        identity=settings.ssh_identity,
        known_hosts=settings.ssh_known_hosts,
    )


def _listed(mount: Mount, trees: dict[str, DirtyManifest]) -> bool:
    """A writable layer that is not listed went with the container that somebody removed on the target."""
    return mount.kind != ROOTFS or mount.destination in trees


def carry_stage(context: Context, mount: Mount) -> Path:
    """Where what the target changed is put together: on the file system of the mount's tree."""
    if mount.kind == ROOTFS:
        return layer_stage(Path(mount.tree), f"{context.migration}-back")
    return Path(mount.tree).parent / f"{CARRY_STAGE}-{context.migration}"


def _entries(context: Context, peer: Peer, tree: DirtyManifest) -> list[Entry]:
    return list(read_manifest(fetched_from(context, peer, tree.manifest)))


def _all_pulled(context: Context) -> bool:
    stopped = context.view.facts["target_stopped"]
    assert isinstance(stopped, TargetStopped)
    trees = {tree.destination: tree for tree in stopped.trees}
    mounts = [mount for mount in context.view.source_prepared.mounts if _listed(mount, trees)]
    return all((carry_stage(context, mount) / "pulled").exists() for mount in mounts)


def _pull(context: Context, peer: Peer, mount: Mount, tree: DirtyManifest, place: str) -> tuple[int, int]:
    """Bring the changed contents aside. Returns bytes and files that crossed the link."""
    stage = carry_stage(context, mount)
    if (stage / "pulled").exists():
        return 0, 0
    for name in ("contents", "incoming", "partial"):
        (stage / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = [entry.path for entry in _entries(context, peer, tree) if entry.stale]
    moved = files = 0
    if mount.single_file and paths:
        result = context.bench.transport.rsync_pull(
            peer, place, stage / "contents" / "file", temp_dir=stage / "incoming", single_file=True, reread=True
        )
        moved, files = result.bytes_received, result.files
    elif paths:
        result = context.bench.transport.rsync_pull(
            peer,
            place,
            stage / "contents",
            temp_dir=stage / "incoming",
            partial_dir=stage / "partial",
            files_from=paths,
            reread=True,
            basis=Path(mount.tree),
            bwlimit_kib=context.view.requested.request.bwlimit_kib,
            cancelled=context.cancelled,
        )
        moved, files = result.bytes_received, result.files
    (stage / "pulled").touch()
    return moved, files


def _apply(context: Context, peer: Peer, mount: Mount, tree: DirtyManifest) -> None:
    stage = carry_stage(context, mount)
    if not stage.exists():
        return
    place = Path(mount.tree)
    entries = _entries(context, peer, tree)
    if mount.single_file:
        file = stage / "contents" / "file"
        if file.exists():
            file.replace(place)
    layer = mount.kind == ROOTFS
    if layer:
        require_unused(place)
    apply(place, stage / "basis", entries, everything=not mount.single_file, spare=stage / "spare", layer=layer)
    if not mount.single_file:
        fold_placeholders(place, stage / "contents", stage, layer=layer)
