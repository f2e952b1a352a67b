"""The data on the target: rounds, layer, union, filling, verification, and what a roll-back takes back."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from events.errors import PermanentError, TransientError
from events.schema import DirtyManifest, RollbackOrdered, SourceDigested, SyncArmed, SyncOrdered
from hostd import remainder
from tests.simulation.effects.base import DESTINATION, MIB, ROOT, Ctx, Performance
from tests.simulation.effects.lists import entries_of, fetched, listed_of, reference, source_layer
from tests.simulation.effects.target_setup import create
from tests.simulation.world import VOLUME, Container, LayerStage, Remote, Tree, Union, Volume


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


def connect_source(_ctx: Ctx) -> Performance:
    """Only saves time."""
    yield
    return None


def open_views(ctx: Ctx) -> Performance:
    """The product's thread: here it is as quick as it can be, or, where the source cannot be reached, comes to nothing."""
    yield
    with contextlib.suppress(TransientError, PermanentError):
        yield from attach_remote(ctx)
    return None


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
    decision = remainder.decide(ctx.view)
    here = at_hand(ctx, union, entries) if decision.at_hand else {}
    if decision.kind != "finished" or set(here) == {path for path, present in entries.items() if present}:
        apply_entries(union, entries, everything=dirty.everything, here=here)
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


def at_hand(ctx: Ctx, union: Union, entries: dict[str, bool]) -> Tree:
    """What the open view gives in time: all, every second file or nothing, by how large this host's files are."""
    source = ctx.request_source.volumes.get(VOLUME)
    every = {1: 1, MIB: 2}.get(ctx.agent.file_bytes)
    if every is None or source is None or not union.remote or not ctx.world.linked("alpha", "beta"):
        return {}
    came = sorted(path for path, present in entries.items() if present)[::every]
    return {path: source.files[path] for path in came if path in source.files}


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


def apply_entries(
    union: Union, entries: dict[str, bool], *, everything: bool, brought: bool = False, here: Tree | None = None
) -> None:
    """Stale contents fall through to the source, unless they were ``brought`` before or are ``here``; what is gone goes."""
    if everything:
        for path in [path for path in union.upper if path not in entries]:
            del union.upper[path]
    for path, present in entries.items():
        if not present:
            union.upper.pop(path, None)
        elif here and path in here:
            union.upper[path] = here[path]
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
        if "target_claimed" in ctx.view.facts or union.placeholders:
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


def fill_replica(ctx: Ctx) -> Performance:
    moved = 0
    union = ctx.volume().union
    if union is not None and union.settled and union.remote:
        yield
        unmount_all(ctx, union)
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
    if union is not None and union.remote:
        if not union.settled and union.fill_list():
            raise PermanentError("files still have their contents on the source")
        union.remote = False
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
