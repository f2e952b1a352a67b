"""Every effect of ``hostd/effects/registry.py``, by name, over the model world.

Each mirrors what the product's verb does, in the order in which it does it, and yields wherever a crash, a
cancellation or another process may come in between. Nothing is decided here that a core decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from events.errors import CancelledError, PermanentError, RefusedError, TransientError
from events.schema import (
    CutoverOrdered,
    DirtyManifest,
    FileRef,
    FinaliseOrdered,
    ImagePacked,
    Mount,
    RollbackOrdered,
    SourceDigested,
    SyncArmed,
    SyncOrdered,
    TargetStopped,
    TreeDigest,
)
from hostd import remainder
from hostd.plan import View
from hostd.turn import ENDS_STEP, StartedAgainError
from tests.simulation.world import (
    LAYER_PATHS,
    VOLUME,
    Container,
    Host,
    LayerStage,
    Remote,
    Tracker,
    Tree,
    Union,
    Volume,
    World,
)

if TYPE_CHECKING:
    from tests.simulation.agents import Agent

Outcome = dict[str, Any] | None
Performance = Generator[None, None, Outcome]
DESTINATION = "/data"
ROOT = "/"
MIB = 1024 * 1024


class TrackingLostError(PermanentError):
    """As in the product."""

    code = "tracking_lost"


class ContainerChangedError(PermanentError):
    """As in the product."""

    code = "container_changed"


@dataclass
class Ctx:
    """One step's surroundings."""

    migration: str
    view: View
    agent: Agent
    cancelled: bool = False
    poke_after: float | None = None

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def world(self) -> World:
        return self.agent.host.world

    @property
    def files(self) -> dict[str, Any]:
        """This migration's durable directory, made if absent."""
        return self.host.files.setdefault(self.migration, {})

    @property
    def request_target(self) -> Host:
        return self.world.hosts[self.view.requested.request.target]

    @property
    def request_source(self) -> Host:
        return self.world.hosts[self.view.requested.request.source]

    def check_cancelled(self) -> None:
        if self.cancelled:
            raise CancelledError("the step is no longer wanted")

    def docker(self) -> None:
        """Every call of the engine passes here."""
        if not self.host.docker:
            raise TransientError("the Docker daemon does not answer")

    def need_link(self) -> None:
        """Every transfer passes here."""
        if not self.world.linked("alpha", "beta"):
            raise TransientError("the other host cannot be reached by SSH")

    def stop_intended(self) -> bool:
        return "stopping" in self.host.files.get(self.migration, {})

    def source_container(self) -> Container | None:
        self.docker()
        return self.host.containers.get(self.view.source_prepared.container_id)

    def our_container(self) -> Container | None:
        self.docker()
        found = self.host.find(self.migration)
        return found if found is not None and found.name == self.view.source_prepared.container_name else None

    def volume(self) -> Volume:
        self.docker()
        volume = self.host.volumes.get(VOLUME)
        if volume is None:
            raise PermanentError(f"the volume has gone from {self.host.name}")
        return volume

    def union(self) -> Union:
        union = self.volume().union
        if union is None:
            raise PermanentError("there is no stage")
        return union


def reference(path: str, content: object) -> FileRef:
    """A FileRef whose digest depends on the content."""
    raw = repr(content).encode()
    return FileRef(path=path, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def fetched(ctx: Ctx, ref: FileRef, other: Host) -> Any:
    """Another host's file, kept here once it was fetched."""
    if ref.sha256 not in ctx.files:
        ctx.need_link()
        content = other.files.get(ctx.migration, {}).get(ref.path)
        if content is None:
            raise PermanentError(f"{other.name} has no file {ref.path}")
        if reference(ref.path, content) != ref:
            raise PermanentError(f"the file {ref.path} of {other.name} is not what the event says it is")
        ctx.files[ref.sha256] = content
    return ctx.files[ref.sha256]


def publish(
    ctx: Ctx, label: str, entries: dict[str, bool], *, everything: bool, destination: str = DESTINATION
) -> DirtyManifest:
    """``entries``: path → whether something is there; what is there has stale contents."""
    label = label if destination == DESTINATION else f"{label}-layer"
    ctx.files[label] = dict(entries)
    stale = sum(entries.values())
    inline = json.dumps(entries) if ctx.agent.inline else ""
    return DirtyManifest(
        destination=destination,
        manifest=reference(label, ctx.files[label]),
        stale_files=stale,
        stale_bytes=stale * MIB,
        everything=everything,
        inline=inline,
    )


def entries_of(ctx: Ctx, dirty: DirtyManifest) -> dict[str, bool]:
    if dirty.inline:
        found: dict[str, bool] = json.loads(dirty.inline)
        return found
    known: dict[str, bool] = fetched(ctx, dirty.manifest, ctx.request_source)
    return known


def there_now(tree: Tree, paths: set[str]) -> dict[str, bool]:
    return {path: path in tree for path in sorted(paths)}


def listed_of(ctx: Ctx, dirty: tuple[DirtyManifest, ...], destination: str) -> dict[str, bool]:
    """The entries of one tree's list; none when there is no list."""
    found = next((listed for listed in dirty if listed.destination == destination), None)
    return entries_of(ctx, found) if found is not None else {}


def publish_both(ctx: Ctx, label: str, marks: set[str]) -> tuple[DirtyManifest, ...]:
    """What is there now of what changed, in the volume and in the layer."""
    layer = source_layer(ctx)
    in_layer = marks & set(LAYER_PATHS)
    return (
        publish(ctx, label, there_now(ctx.volume().files, marks - in_layer), everything=False),
        publish(ctx, label, there_now(layer, in_layer), everything=False, destination=ROOT),
    )


def source_layer(ctx: Ctx) -> Tree:
    """The writable layer of the container on the source."""
    container = ctx.request_source.containers.get(ctx.view.requested.container_id)
    if container is None:
        raise ContainerChangedError("the container has been removed")
    return container.layer


# --- the source's ----------------------------------------------------------------------------------


def describe_container(ctx: Ctx) -> Performance:
    ctx.docker()
    request = ctx.view.requested
    container = ctx.host.containers.get(request.container_id)
    if container is None:
        raise ContainerChangedError("the container was removed after the request was admitted")
    if container.name != request.request.container or not container.running:
        raise ContainerChangedError("the container is not running any more, or is called otherwise")
    yield
    ctx.files["spec"] = container.id
    return {
        "container_id": container.id,
        "container_name": container.name,
        "spec": reference("spec", container.id),
        "image_id": "image",
        "image_tags": ("image:1",),
        "ports": (),
        "restart_policy": container.policy,
        "address": ctx.host.name,
    }


def describe_container_undo(ctx: Ctx) -> Performance:
    yield
    ctx.host.files.pop(ctx.migration, None)
    return None


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


def disarm_restart(ctx: Ctx) -> Performance:
    container = ctx.source_container()
    if container is None:
        raise ContainerChangedError("the container has been removed")
    if not container.running and not ctx.stop_intended():
        raise ContainerChangedError("the container has stopped by itself or by a person's hand")
    note_stop(ctx)
    yield
    ctx.docker()
    set_policy(container, "no")
    return None


def note_stop(ctx: Ctx) -> None:
    ctx.files["stopping"] = True


def set_policy(container: Container, policy: str) -> None:
    container.policy = policy


def disarm_restart_undo(ctx: Ctx) -> Performance:
    yield
    if "cutover_ordered" not in ctx.view.facts:
        return None
    container = ctx.source_container()
    if container is not None:
        set_policy(container, ctx.view.source_prepared.restart_policy)
    return None


def stop_container(ctx: Ctx) -> Performance:
    container = ctx.source_container()
    if container is None:
        raise PermanentError("the container does not exist on this host (any more)")
    yield
    ctx.docker()
    if container.policy != "no":
        raise PermanentError("the restart policy is back: something else manages the container")
    ctx.files["stop-asked"] = container.id
    if container.running:
        container.unnoticed, container.ended_for = True, ctx.agent.boot
    ctx.agent.world_stop(container)
    yield
    if container.unnoticed:
        return {}  # Docker takes its time; ``digest_trees`` tells how it ended
    return {"exit_code": container.exit_code, "unclean": False, "stopped_at": "then"}


def docker_says_running(ctx: Ctx, container: Container) -> bool:
    """What the engine's adapter makes of it: who saw the end waits until Docker has taken note."""
    if container.ended_for == ctx.agent.boot:
        container.unnoticed = False
    return container.running or container.unnoticed


def stop_container_undo(ctx: Ctx) -> Performance:
    yield
    if "source_prepared" not in ctx.view.facts:
        return {"running": True, "note": "never touched"}
    container = ctx.source_container()
    if container is None:
        return {"running": False, "note": "the container was removed by somebody else meanwhile"}
    if docker_says_running(ctx, container):
        if "stop-asked" in ctx.files:
            yield
            container.unnoticed = False
        if container.running or container.unnoticed:
            return {"running": True}
    if not ctx.stop_intended():
        return {"running": False, "note": "left stopped: not this migration had stopped it"}
    ctx.agent.world_start(container)
    yield
    return {"running": True}


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


def guard_source(ctx: Ctx) -> Performance:
    container = ctx.source_container()
    yield
    ctx.agent.guarded[ctx.view.source_prepared.container_id] = ctx.migration
    if container is None:
        return None
    set_policy(container, "no")
    if not docker_says_running(ctx, container):
        return None
    running, container.unnoticed = container.running, False
    ctx.agent.world_stop(container)
    if not running:
        return None  # Docker had not taken note of the end yet
    words = "the container was started by something else after it had been stopped for its move"
    raise StartedAgainError(words, ctx.view.state, ctx.agent.place, ctx.view.request.target)


def guard_source_undo(ctx: Ctx) -> Performance:
    yield
    for container_id in [known for known, migration in ctx.agent.guarded.items() if migration == ctx.migration]:
        del ctx.agent.guarded[container_id]
    return None


def retire_container(ctx: Ctx) -> Performance:
    ctx.agent.guarded.pop(ctx.view.source_prepared.container_id, None)
    withdraw(ctx)
    container = ctx.source_container()
    yield
    if ctx.view.requested.request.on_release == "remove":
        if container is not None:
            ctx.agent.world_remove(container)
            yield
        ctx.docker()
        ctx.host.volumes.pop(VOLUME, None)
        ctx.host.files.pop(ctx.migration, None)
        return {"kept_as": None}
    if container is None:
        return {"kept_as": None}
    ctx.docker()
    set_policy(container, "no")
    yield
    container.name = f"{ctx.view.source_prepared.container_name}.cargo-{ctx.migration}"
    ctx.host.files.pop(ctx.migration, None)
    return {"kept_as": container.name}


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


def revive_container(ctx: Ctx) -> Performance:
    prepared = ctx.view.source_prepared
    ctx.agent.guarded.pop(prepared.container_id, None)
    container = ctx.source_container()
    if container is None:
        raise PermanentError("the container that was kept is gone; its data is here, so create it by hand")
    withdraw(ctx)
    container.name = prepared.container_name
    yield
    ctx.docker()
    set_policy(container, prepared.restart_policy)
    yield
    ctx.agent.world_start(container)
    yield
    ctx.host.files.pop(ctx.migration, None)
    return {"running": True}


# --- the target's ----------------------------------------------------------------------------------


def fetch_spec(ctx: Ctx) -> Performance:
    yield
    ctx.files["spec.json"] = fetched(ctx, ctx.view.source_prepared.spec, ctx.request_source)
    return None


def check_target(ctx: Ctx) -> Performance:
    ctx.docker()
    yield
    reasons = []
    if ctx.host.named(ctx.view.source_prepared.container_name) is not None and ctx.our_container() is None:
        reasons.append("there is a container of that name already")
    volume = ctx.host.volumes.get(VOLUME)
    if volume is not None and volume.label != ctx.migration:
        reasons.append("there is a volume of that name already")
    if reasons:
        raise RefusedError(reasons)
    return None


def provide_image(ctx: Ctx) -> Performance:
    ctx.docker()
    yield
    if ctx.host.image:
        return {"warnings": ()}
    packed = ctx.view.facts.get("image_packed")
    if not isinstance(packed, ImagePacked):
        return {ENDS_STEP: True, "image_id": ctx.view.source_prepared.image_id}
    fetched(ctx, packed.archive, ctx.request_source)
    ctx.files["brought"] = True
    yield
    ctx.docker()
    ctx.host.image = True
    return {"warnings": ()}


def provide_image_undo(ctx: Ctx) -> Performance:
    yield
    if "brought" in ctx.host.files.get(ctx.migration, {}):
        ctx.docker()
        ctx.host.image = False
    return None


def pack_image(ctx: Ctx) -> Performance:
    yield
    ctx.check_cancelled()
    ctx.files["image.tar"] = "image"
    return {"archive": reference("image.tar", "image"), "layers": 1}


def create_networks(ctx: Ctx) -> Performance:
    ctx.docker()
    load_spec(ctx)
    yield
    return {"warnings": ()}


def create_volumes(ctx: Ctx) -> Performance:
    ctx.docker()
    volume = ctx.host.volumes.setdefault(VOLUME, Volume(label=ctx.migration))
    yield
    if volume.union is None:
        volume.union = Union()
    return None


def create_volumes_undo(ctx: Ctx) -> Performance:
    yield
    if "source_prepared" not in ctx.view.facts:
        return None
    ctx.docker()
    volume = ctx.host.volumes.get(VOLUME)
    if volume is None or volume.label != ctx.migration:
        return None
    if volume.union is not None and (volume.union.merged or volume.union.remote):
        raise TransientError("the union is still mounted; the volume was not removed")
    volume.union = None
    yield
    del ctx.host.volumes[VOLUME]
    return None


def load_spec(ctx: Ctx) -> None:
    if ctx.files.get("spec.json") != ctx.view.source_prepared.container_id:
        raise PermanentError("the specification is of another container, or missing")


def create(ctx: Ctx) -> Container:
    ctx.docker()
    load_spec(ctx)
    found = ctx.our_container()
    if found is None:
        found = Container(f"t-{ctx.migration}-{ctx.agent.sim.next_number()}", "web", "no", label=ctx.migration)
        ctx.host.containers[found.id] = found
    return found


def create_container(ctx: Ctx) -> Performance:
    container = create(ctx)
    yield
    return {"container_id": container.id}


def open_layer(ctx: Ctx) -> Performance:
    ctx.docker()
    yield
    if ctx.our_container() is None:
        raise PermanentError("the container that was created is gone")
    ctx.host.layers.setdefault(ctx.migration, LayerStage())
    return None


def open_layer_undo(ctx: Ctx) -> Performance:
    yield
    ctx.host.layers.pop(ctx.migration, None)
    return None


def put_layer_in_place(ctx: Ctx) -> None:
    """The tree in the stage becomes the container's layer, once; before the container has ever run."""
    stage, container = ctx.host.layers.get(ctx.migration), ctx.our_container()
    if stage is None or container is None or stage.placed_in == container.id:
        return
    if stage.placed_in:  # a person has removed the container that it was in, and the layer with it
        raise PermanentError("the data that should take its place is not there: somebody has moved it by hand")
    container.layer, container.layer_changed, stage.placed_in = dict(stage.tree), set(), container.id


def layer_here(ctx: Ctx) -> Container | None:
    """The container that has the layer in it; None when a person has removed it, and the layer with it."""
    stage, container = ctx.host.layers.get(ctx.migration), ctx.our_container()
    return container if container is not None and (stage is None or stage.placed_in == container.id) else None


def create_container_undo(ctx: Ctx) -> Performance:
    yield
    if "source_prepared" not in ctx.view.facts:
        return None
    container = ctx.our_container()
    if container is None:
        return None
    if "target_claimed" in ctx.view.facts and "source_restored" not in ctx.view.facts:
        raise PermanentError("the container was claimed for this host; it is removed once the source runs again")
    ctx.agent.world_remove(container)
    return None


def pull_round(ctx: Ctx) -> Performance:
    armed = ctx.view.sync_armed
    order = ctx.view.facts["sync_ordered"]
    assert armed is not None
    assert isinstance(order, SyncOrdered)
    union = ctx.union()
    if not order.contents:
        for dirty in armed.dirty:
            entries = entries_of(ctx, dirty)
            yield
            ctx.check_cancelled()
            apply_entries(union, entries, everything=dirty.everything)
        yield from pull_layer(ctx, armed, whole=True)
        return {"bytes_moved": 0, "files": 0, "duration_seconds": 0.1}
    source = ctx.request_source.volumes.get(VOLUME)
    ctx.need_link()
    if source is None:
        raise TransientError("the source's tree is not there")
    if armed.round == 1 or armed.compare:
        names = sorted(source.files)
        for path in sorted(set(union.upper) - set(names)):
            del union.upper[path]
    else:
        names = sorted(listed_of(ctx, armed.dirty, DESTINATION))
    moved = 0
    for path in names:
        yield
        ctx.check_cancelled()
        ctx.need_link()
        if path in source.files:
            union.upper[path] = source.files[path]
            moved += 1
        else:
            union.upper.pop(path, None)
    moved += yield from pull_layer(ctx, armed)
    size = moved * ctx.agent.file_bytes
    return {"bytes_moved": size, "files": moved, "duration_seconds": 0.1}


def pull_layer(ctx: Ctx, armed: SyncArmed, *, whole: bool = False) -> Generator[None, None, int]:
    tree, there = ctx.host.layers[ctx.migration].tree, source_layer(ctx)
    if whole or armed.round == 1 or armed.compare:
        names = sorted(there)
        for path in sorted(set(tree) - set(names)):
            del tree[path]
    else:
        names = sorted(listed_of(ctx, armed.dirty, ROOT))
    return (yield from bring_layer(ctx, names))


def bring_layer(ctx: Ctx, names: list[str]) -> Generator[None, None, int]:
    """rsync of some paths of the source's layer into the stage. Returns how many came."""
    tree, there, moved = ctx.host.layers[ctx.migration].tree, source_layer(ctx), 0
    for path in names:
        yield
        ctx.check_cancelled()
        ctx.need_link()
        if path in there:
            tree[path] = there[path]
            moved += 1
        else:
            tree.pop(path, None)
    return moved


def attach_remote(ctx: Ctx) -> Performance:
    yield
    if ctx.view.strategy in ("precopy", "cold"):
        return None
    ctx.check_cancelled()
    union = ctx.union()
    if not union.settled and not union.remote:
        look_at_source(ctx, union)
    return None


def look_at_source(ctx: Ctx, union: Union) -> None:
    ctx.need_link()
    source = ctx.request_source
    if ctx.view.source_prepared.remote == "nfs" and not (source.up and ctx.migration in source.exports):
        raise TransientError("the source does not serve its tree by NFS")
    union.remote = True


def warm_container(ctx: Ctx) -> Performance:
    """A container at its gate does not run, and whatever happens to it there, the start is the same one."""
    yield
    ctx.check_cancelled()
    return {"start": "warm"}


def unmount_all(ctx: Ctx, union: Union) -> None:
    container = ctx.host.find(ctx.migration)
    if union.merged and container is not None and container.running and container.sees == "merged":
        raise TransientError("the union is still in use; stop the container first")
    union.unmount()


def unmount_undo(ctx: Ctx) -> Performance:
    yield
    volume = ctx.host.volumes.get(VOLUME)
    if volume is not None and volume.label == ctx.migration and volume.union is not None:
        unmount_all(ctx, volume.union)
    return None


def apply_dirty(ctx: Ctx) -> Performance:
    union = ctx.union()
    dirty = next((d for d in ctx.view.dirty() if d.destination == DESTINATION), None)
    if dirty is None:
        raise PermanentError("the source published no list of changes")
    yield from apply_layer(ctx)
    if union.settled or union.merged:
        return None
    entries = entries_of(ctx, dirty)
    yield
    if remainder.decide(ctx.view).kind != "finished":
        apply_entries(union, entries, everything=dirty.everything)
        return None
    source = ctx.request_source.volumes.get(VOLUME)
    for path in [path for path, present in entries.items() if present]:
        yield
        ctx.check_cancelled()
        ctx.need_link()
        if source is None or path not in source.files:
            raise PermanentError(f"rsync: {path} is not on the source")
        union.upper[path] = source.files[path]
    apply_entries(union, entries, everything=dirty.everything, brought=True)
    return None


def apply_layer(ctx: Ctx) -> Generator[None, None, None]:
    """What is stale in the layer is brought now: there is no union for it."""
    if ctx.our_container() is None:
        create(ctx)
        ctx.host.layers[ctx.migration].placed_in = ""
    stage = ctx.host.layers[ctx.migration]
    if stage.placed_in:
        return
    entries = listed_of(ctx, ctx.view.dirty(), ROOT)
    if any(dirty.everything for dirty in ctx.view.dirty() if dirty.destination == ROOT):
        for path in sorted(set(stage.tree) - set(entries)):
            del stage.tree[path]
    yield from bring_layer(ctx, sorted(entries))


def apply_entries(union: Union, entries: dict[str, bool], *, everything: bool, brought: bool = False) -> None:
    """Stale contents fall through to the source, unless they were ``brought`` before; what is gone goes."""
    if everything:
        for path in [path for path in union.upper if path not in entries]:
            del union.upper[path]
    for path, present in entries.items():
        if not present:
            union.upper.pop(path, None)
        elif not brought:
            union.upper[path] = Remote(path)
    union.placeholders = sorted(value.path for value in union.upper.values() if isinstance(value, Remote))


def mount_union(ctx: Ctx) -> Performance:
    yield
    mount(ctx)
    return None


def mount(ctx: Ctx) -> None:
    put_layer_in_place(ctx)
    volume = ctx.volume()
    union = volume.federated
    if union is None:
        return
    if not union.merged and "target_claimed" not in ctx.view.facts:
        volume.changed = set()
    if not union.merged and not union.fill_list():
        unmount_all(ctx, union)
        fold(volume, union)
        return
    if not union.merged and not union.remote:
        look_at_source(ctx, union)
    union.merged = True


def fold(volume: Volume, union: Union) -> None:
    """Everything is here: the tree takes its place."""
    missing = union.fill_list()
    if missing:
        raise PermanentError(f"{len(missing)} files have no contents on this host yet")
    volume.files = {
        path: union.replica[value.path] if isinstance(value, Remote) else value for path, value in union.upper.items()
    }
    union.settled = True


def start_container(ctx: Ctx) -> Performance:
    container = create(ctx)
    yield
    mount(ctx)
    yield
    ctx.agent.world_start(container)
    yield
    return {"container_id": container.id, "started_at": "then"}


def supervise_container(ctx: Ctx) -> Performance:
    container = ctx.our_container()
    yield
    if container is None or container.running:
        return None
    volume = ctx.volume()
    if volume.union is not None:
        mount_again(ctx, volume.union)
    yield
    if container.id in ctx.host.containers and should_run(ctx, container):
        ctx.agent.world_start(container)
        ctx.poke_after = 1.0
    return None


def should_run(ctx: Ctx, container: Container) -> bool:
    policy = ctx.view.source_prepared.restart_policy
    if container.id in ctx.agent.manual_stops:
        return False
    return policy in ("always", "unless-stopped") or (policy == "on-failure" and container.exit_code != 0)


def mount_again(ctx: Ctx, union: Union) -> None:
    if union.settled or union.merged:
        return
    if union.fill_list() and not union.remote:
        look_at_source(ctx, union)
    union.merged = True


def fill_replica(ctx: Ctx) -> Performance:
    moved = 0
    union = ctx.volume().union
    while union is not None and not union.settled and (wanted := union.fill_list()):
        yield
        ctx.check_cancelled()
        ctx.need_link()
        source = ctx.request_source.volumes.get(VOLUME)
        path = wanted[0]
        if source is None or path not in source.files:
            raise PermanentError(f"rsync: {path} is not on the source")
        union.replica[path] = source.files[path]
        moved += 1
    return {"bytes_moved": moved * MIB, "files": moved, "duration_seconds": 0.1}


def digest_arrived(ctx: Ctx) -> Performance:
    yield
    ctx.check_cancelled()
    return None


def verify_trees(ctx: Ctx) -> Performance:
    digested = ctx.view.facts["source_digested"]
    assert isinstance(digested, SourceDigested)
    expected: Tree = fetched(ctx, digested.trees[0].manifest, ctx.request_source)
    yield
    volume = ctx.volume()
    changed = volume.changed
    if changed is None:
        raise PermanentError("the mark of the mount is missing")
    seen = visible_tree(ctx, volume)
    wrong = sorted(
        path for path in expected.keys() | seen.keys() if path not in changed and expected.get(path) != seen.get(path)
    )
    if wrong:
        raise PermanentError(f"the tree differs from the frozen source at {', '.join(wrong)}")
    yield
    verify_layer(ctx, fetched(ctx, digested.trees[1].manifest, ctx.request_source))
    return {"files": len(expected), "size_bytes": len(expected), "changed_by_container": len(changed)}


def verify_layer(ctx: Ctx, expected: Tree) -> None:
    container = layer_here(ctx)
    if container is None:
        return
    changed = container.layer_changed or set()
    seen = container.layer
    wrong = [p for p in expected.keys() | seen.keys() if p not in changed and expected.get(p) != seen.get(p)]
    if wrong:
        raise PermanentError(f"the layer differs from the frozen source at {', '.join(sorted(wrong))}")


def visible_tree(ctx: Ctx, volume: Volume) -> Tree:
    union = volume.federated
    if union is None:
        return volume.files
    return {
        path: union.replica.get(value.path) if isinstance(value, Remote) else value
        for path, value in union.upper.items()
    }


def detach_remote(ctx: Ctx) -> Performance:
    yield
    union = ctx.volume().union
    if union is not None and union.remote and not union.settled:
        if union.fill_list():
            raise PermanentError("files still have their contents on the source")
        union.remote = False
    return None


def recall_container(ctx: Ctx) -> Performance:
    container = ctx.our_container()
    if container is not None:
        set_policy(container, "no")
        yield
        ctx.docker()
        ctx.agent.world_stop(container)
    yield
    return {"exit_code": 0, "address": ctx.host.name}


def recall_container_undo(ctx: Ctx) -> Performance:
    yield from recall_container(ctx)
    return None


def list_changes(ctx: Ctx) -> Performance:
    order = ctx.view.facts["rollback_ordered"]
    assert isinstance(order, RollbackOrdered)
    yield
    if order.discard_target_writes:
        return {"trees": ()}
    volume = ctx.volume()
    if volume.changed is None:
        raise PermanentError("the mark of the mount is missing")
    tree = volume.files if volume.federated is None else volume.federated.upper
    listed = {path: path in volume.changed for path in sorted(tree)}
    ctx.files["changes"] = listed
    stale = sum(listed.values())
    manifest = DirtyManifest(
        destination=DESTINATION,
        manifest=reference("changes", listed),
        stale_files=stale,
        stale_bytes=stale * MIB,
        everything=True,
    )
    container = layer_here(ctx)
    if container is None:
        return {"trees": (manifest,), "places": {DESTINATION: "/v/data"}}
    changed = container.layer_changed or set()
    root = publish_changes(ctx, {path: path in changed for path in sorted(container.layer)})
    return {"trees": (manifest, root), "places": {DESTINATION: "/v/data", ROOT: "/layer"}}


def publish_changes(ctx: Ctx, listed: dict[str, bool]) -> DirtyManifest:
    ctx.files["changes-layer"] = listed
    stale = sum(listed.values())
    return DirtyManifest(
        destination=ROOT,
        manifest=reference("changes-layer", listed),
        stale_files=stale,
        stale_bytes=stale * MIB,
        everything=True,
    )


def fold_union(ctx: Ctx) -> Performance:
    volume = ctx.volume()
    container = ctx.our_container()
    union = volume.federated
    if union is not None:
        running = container is not None and container.running
        order = ctx.view.facts.get("finalise_ordered")
        if running and not (isinstance(order, FinaliseOrdered) and order.stop_now):
            ctx.poke_after = 30.0
            return None
        yield
        if running:
            assert container is not None
            ctx.files["folding"] = True
            ctx.agent.world_stop(container)
            yield
        unmount_all(ctx, union)
        fold(volume, union)
        yield
        if running:
            assert container is not None
            ctx.agent.world_start(container)
    yield
    volume.union = None
    ctx.host.layers.pop(ctx.migration, None)
    if container is not None and container.id in ctx.host.containers:
        ctx.docker()
        set_policy(container, ctx.view.source_prepared.restart_policy)
        yield
        if not container.running and ("folding" in ctx.files or should_run(ctx, container)):
            ctx.agent.world_start(container)
        ctx.files.pop("folding", None)
    return {"outage_seconds": 0.0}


def fetch_spec_undo(ctx: Ctx) -> Performance:
    yield
    ctx.host.files.pop(ctx.migration, None)
    return None


def nothing(_ctx: Ctx) -> Performance:
    yield
    return None


RUN: dict[str, Callable[[Ctx], Performance]] = {
    verb.__name__: verb
    for verb in (
        describe_container, track_changes, measure_mounts, fetch_spec, check_target, provide_image, create_volumes,
        create_container, open_layer, create_networks, pack_image, arm_tracking, pull_round, attach_remote, warm_container, vouch_for_tracking, disarm_restart, stop_container,
        publish_dirty, apply_dirty, mount_union, start_container, supervise_container, fill_replica, digest_trees, digest_arrived,
        verify_trees, detach_remote, retire_container, guard_source, revive_container, recall_container, list_changes,
        fold_union, carry_back, export_trees,
    )
}  # fmt: skip
"""What an effect's ``run`` does."""

UNDO: dict[str, Callable[[Ctx], Performance]] = dict.fromkeys(RUN, nothing) | {
    "describe_container": describe_container_undo,
    "track_changes": track_changes_undo,
    "disarm_restart": disarm_restart_undo,
    "stop_container": stop_container_undo,
    "guard_source": guard_source_undo,
    "export_trees": export_trees_undo,
    "create_volumes": create_volumes_undo,
    "create_container": create_container_undo,
    "open_layer": open_layer_undo,
    "attach_remote": unmount_undo,
    "mount_union": unmount_undo,
    "recall_container": recall_container_undo,
    "fetch_spec": fetch_spec_undo,
    "provide_image": provide_image_undo,
}
"""What an effect's ``undo`` does."""
