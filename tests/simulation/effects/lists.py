"""The files that one agent makes and the other fetches; most of them list what has changed in a tree."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from events.errors import PermanentError
from events.schema import DirtyManifest, FileRef
from tests.simulation.effects.base import DESTINATION, MIB, ROOT, ContainerChangedError, Ctx
from tests.simulation.world import LAYER_PATHS, Host, Tree


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
