"""Make the place where the container's writable layer will arrive: a stage beside the upper directory of the new container.

The container has been created and not started, so nothing has that directory mounted: the tree that arrives takes its
place as a whole. overlayfs accepts no overlay as an upper directory, so there is no union for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from events.errors import PermanentError, RefusedError
from hostd.effects.arrival import (
    LAYER_PLACE,
    Arrival,
    LayerPlace,
    layer_arrival,
    layer_mount,
    layer_place,
    our_container,
)
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.create_container import create
from hostd.effects.fetch_spec import arriving_spec
from hostd.federation import Union
from hostd.fold import write_durably
from hostd.gate import end_forgotten
from hostd.rootfs import UnknownStoreError, layer_stage, remove_empty_stages, unmount_left, upper_directory
from hostd.verification import mark_mount
from hostd.warm import settle_gate


class OpenLayer(Effect):
    """Nothing to do for a layer that stays behind (``rootfs: false``, or a history from before layers travelled)."""

    name: ClassVar[str] = "open_layer"

    def run(self, context: Context) -> Outcome:
        if layer_mount(context) is not None:
            open_layer(context)
        return None

    def undo(self, context: Context) -> Outcome:
        """Remove the stage. The container, with what had arrived in it, has been removed before."""
        if "source_prepared" not in context.view.facts or layer_mount(context) is None:
            return None
        place = layer_place(context)
        if place is None:
            return None
        stage = Path(place.stage)
        Union(stage, stage / "nowhere", layer=True).remove(abandon=True)
        remove_empty_stages(stage)
        return None


def open_layer(context: Context) -> Arrival:
    """The layer's arrival, its place looked up anew. Raises RefusedError where it cannot be brought."""
    engine = context.bench.engine
    container_id = our_container(context)
    if container_id is None:
        raise PermanentError(f"the container that was created on {context.host} is gone")
    info = engine.info()
    try:
        upper = upper_directory(engine.inspect(container_id) or {}, info)
    except UnknownStoreError as error:
        raise RefusedError([f"{context.host}: {error}; leave it behind with rootfs: false"]) from error
    stage = layer_stage(upper, context.migration)
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = LayerPlace(container_id, str(upper), str(stage))
    if layer_place(context) != place:
        write_durably(context.directory / LAYER_PLACE, msgspec.msgpack.encode(place))
    stage.parent.mkdir(mode=0o700, exist_ok=True)
    arrival = layer_arrival(context)
    assert arrival is not None
    arrival.union.create()
    return arrival


def ensure_layer(context: Context) -> None:
    """Before the layer takes its place: the container that it belongs into is there, created anew if it has gone."""
    arrival = layer_arrival(context)
    if layer_mount(context) is None or (arrival is not None and arrival.union.place.is_dir()):
        return
    create(context, arriving_spec(context))
    open_layer(context)


def place_early(context: Context) -> None:
    """Before a container is started up to its gate: what the rounds brought of its layer goes into it.

    From then on the kernel has the layer mounted, so it must not change any more (``withdraw_layer``).
    """
    arrival = layer_arrival(context)
    if arrival is not None and not arrival.union.state().settled:
        mark_mount(arrival.union)  # what is younger was changed by the container, or by the runtime for it
        arrival.union.place_plain()


def withdraw_layer(context: Context, why: str) -> None:
    """Before the claim: the layer has to change after all. A container that waits with it is sent away.

    Harmless when the layer is not in a container. The start was undone, so it is not repeated on the same one.
    """
    arrival, place = layer_arrival(context), layer_place(context)
    if arrival is None or place is None or not arrival.union.state().settled:
        return
    warm = context.bench.warm.pop(context.migration, None)
    if warm is not None:
        warm.cool()
        context.bench.why_cold[context.migration] = why
    else:
        settle_gate(context.bench.engine, place.container_id)
    remove_container(context, place.container_id)
    ensure_layer(context)


def remove_container(context: Context, container_id: str) -> None:
    """The container goes, its writable layer stays: it may have written to it, and the next one is to go on with that."""
    arrival = layer_arrival(context)
    state = (context.bench.engine.inspect(container_id) or {}).get("State") or {}
    if not state.get("Running"):
        end_forgotten(container_id)
        if arrival is not None:
            unmount_left(arrival.union.place)
    if arrival is not None:
        arrival.union.take_out()
    context.bench.engine.remove(container_id)
