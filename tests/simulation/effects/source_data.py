"""The data on the source: watched, shown to the target, listed, digested, and taken back in a roll-back."""

from __future__ import annotations

from events.errors import PermanentError, RefusedError
from events.schema import CutoverOrdered, Mount, RollbackOrdered, SyncOrdered, TargetStopped, TreeDigest
from tests.simulation.effects.base import DESTINATION, MIB, ROOT, Ctx, Performance, TrackingLostError
from tests.simulation.effects.lists import fetched, publish, publish_both, reference, source_layer
from tests.simulation.world import VOLUME, Remote, Tracker, Tree, Volume


def ensure_tracker(ctx: Ctx) -> tuple[Tracker, bool]:
    tracker = ctx.host.trackers.get(ctx.migration)
    if tracker is not None:
        return tracker, False
    tracker = ctx.host.trackers[ctx.migration] = Tracker()
    return tracker, True


def track_changes(ctx: Ctx) -> Performance:
    ctx.docker()
    ensure_tracker(ctx)
    yield
    return None


def track_changes_undo(ctx: Ctx) -> Performance:
    ctx.host.trackers.pop(ctx.migration, None)
    yield
    return None


def measure_mounts(ctx: Ctx) -> Performance:
    ctx.docker()
    files = len(ctx.volume().files)
    mount = Mount(
        kind="volume", name=VOLUME, destination=DESTINATION, tree="/v/data", size_bytes=files * MIB, files=files
    )
    layer = Mount(kind="rootfs", name="", destination=ROOT, tree="/layer", files=len(source_layer(ctx)))
    yield
    return {"mounts": (mount, layer)}


def export_trees(ctx: Ctx) -> Performance:
    prepared = "source_prepared" in ctx.view.facts
    yield
    if (ctx.view.source_prepared.remote if prepared else ctx.view.request.remote) != "nfs":
        return None
    if not ctx.view.requested.target_address:
        raise RefusedError(["the target's address is not in the history"])
    ctx.files["nfs"] = True
    yield
    ctx.host.exports.add(ctx.migration)
    yield
    return {"remote": "nfs", "remote_port": 20490}


def withdraw(ctx: Ctx) -> None:
    ctx.host.exports.discard(ctx.migration)
    ctx.host.files.get(ctx.migration, {}).pop("nfs", None)


def export_trees_undo(ctx: Ctx) -> Performance:
    withdraw(ctx)
    yield
    return None


def pack_image(ctx: Ctx) -> Performance:
    yield
    ctx.check_cancelled()
    ctx.files["image.tar"] = "image"
    return {"archive": reference("image.tar", "image"), "layers": 1}


def tracker_arm(tracker: Tracker, generation: int) -> tuple[set[str], bool]:
    """What the generation before saw, and whether that can be trusted."""
    if tracker.before is not None and tracker.generation == generation:
        return tracker.before, tracker.before_trusted
    tracker.before, tracker.before_trusted = tracker.marks, tracker.trusted
    tracker.generation, tracker.marks, tracker.trusted = generation, set(), True
    return tracker.before, tracker.before_trusted


def arm_tracking(ctx: Ctx) -> Performance:
    ctx.docker()
    number = ctx.view.round
    tracker, fresh = ensure_tracker(ctx)
    yield
    seen, trusted = tracker_arm(tracker, number)
    yield
    order = ctx.view.facts["sync_ordered"]
    assert isinstance(order, SyncOrdered)
    if not order.contents:
        names = dict.fromkeys(sorted(ctx.volume().files), True)
        return {"dirty": (publish(ctx, f"round-{number}", names, everything=True),)}
    if number == 1:
        return {"dirty": ()}
    same_life = ctx.view.boots.get("sync_armed") == ctx.agent.boot
    if fresh or not same_life or not trusted:
        return {"compare": True, "why": "tracking was lost", "dirty": ()}
    return {"dirty": publish_both(ctx, f"round-{number}", seen)}


def vouch_for_tracking(ctx: Ctx) -> Performance:
    order = ctx.view.facts["cutover_ordered"]
    assert isinstance(order, CutoverOrdered)
    yield
    if ctx.stop_intended() or order.untracked:
        return None
    if ctx.view.boots.get("sync_armed") != ctx.agent.boot:
        raise TrackingLostError("the agent was restarted since the last round began")
    tracker = ctx.host.trackers.get(ctx.migration)
    if tracker is None or not tracker.trusted:
        raise TrackingLostError("not being watched")
    return None


def publish_dirty(ctx: Ctx) -> Performance:
    tracker = ctx.host.trackers.get(ctx.migration)
    files = ctx.volume().files
    yield
    if tracker is not None and ctx.view.boots.get("sync_armed") == ctx.agent.boot and tracker.trusted:
        return {"dirty": publish_both(ctx, "stopped", tracker.marks)}
    return {
        "dirty": (
            publish(ctx, "stopped", dict.fromkeys(files, True), everything=True),
            publish(ctx, "stopped", dict.fromkeys(source_layer(ctx), True), everything=True, destination=ROOT),
        )
    }


def digest_trees(ctx: Ctx) -> Performance:
    ctx.host.trackers.pop(ctx.migration, None)
    files = ctx.volume().files
    digest: Tree = {}
    for path in sorted(files):
        yield
        ctx.check_cancelled()
        digest[path] = files.get(path)
    ctx.files["digest"] = digest
    tree = TreeDigest(
        destination=DESTINATION, manifest=reference("digest", digest), files=len(digest), size_bytes=len(digest)
    )
    yield
    layer = dict(source_layer(ctx))
    ctx.files["digest-layer"] = layer
    root = TreeDigest(
        destination=ROOT, manifest=reference("digest-layer", layer), files=len(layer), size_bytes=len(layer)
    )
    stopped, container = ctx.view.source_stopped, ctx.source_container()
    if stopped is not None and stopped.exit_code is None and container is not None:
        return {"trees": (tree, root), "exit_code": container.exit_code, "unclean": False, "stopped_at": "then"}
    return {"trees": (tree, root)}


def carry_back(ctx: Ctx) -> Performance:
    order = ctx.view.facts["rollback_ordered"]
    stopped = ctx.view.facts.get("target_stopped")
    assert isinstance(order, RollbackOrdered)
    yield
    if order.discard_target_writes or not isinstance(stopped, TargetStopped):
        return {"bytes_moved": 0, "files": 0}
    if "target_asserted_off" in ctx.view.facts and "pulled" not in ctx.files:
        return {"bytes_moved": 0, "files": 0}
    lists: dict[str, dict[str, bool]] = {
        tree.destination: fetched(ctx, tree.manifest, ctx.request_target) for tree in stopped.trees
    }
    source = {DESTINATION: ctx.volume().files, ROOT: source_layer(ctx)}
    stage = ctx.files.setdefault("carry", {})
    if "pulled" not in ctx.files:
        for destination, listed in lists.items():
            for path in [path for path, stale in listed.items() if stale and path not in stage]:
                yield
                ctx.check_cancelled()
                ctx.need_link()
                there = there_on_target(ctx, destination)
                if path not in there:
                    raise PermanentError(f"rsync: {path} is not at the place on the target")
                stage[path] = there[path]
        ctx.files["pulled"] = True
    for destination, listed in lists.items():
        files = source[destination]
        for path in sorted(set(files) - set(listed)):
            yield
            del files[path]
        for path, stale in listed.items():
            if stale:
                yield
                files[path] = stage[path]
    return {"bytes_moved": len(stage) * MIB, "files": len(stage)}


def there_on_target(ctx: Ctx, destination: str) -> Tree:
    """What rsync finds at the place that the target has named."""
    if destination == DESTINATION:
        volume = ctx.request_target.volumes.get(VOLUME)
        if volume is None:
            raise PermanentError("the target's data is gone")
        return place(ctx, volume)
    container = ctx.request_target.find(ctx.migration)
    stage = ctx.request_target.layers.get(ctx.migration)
    if container is not None and (stage is None or stage.placed_in == container.id):
        return container.layer
    return stage.tree if stage is not None and not stage.placed_in else {}


def place(ctx: Ctx, volume: Volume) -> Tree:
    """What another host finds where the target's mount lies: without its union, nothing of use."""
    union = volume.federated
    if union is None:
        return volume.files
    if not union.merged:
        return {}
    return {
        path: union.replica.get(value.path) if isinstance(value, Remote) else value
        for path, value in union.upper.items()
    }
