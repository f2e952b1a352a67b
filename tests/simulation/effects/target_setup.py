"""What the target makes ready before any data comes: specification, image, networks, volumes, container."""

from __future__ import annotations

from events.errors import PermanentError, RefusedError, TransientError
from events.schema import ImagePacked
from hostd.turn import ENDS_STEP
from tests.simulation.effects.base import Ctx, Performance
from tests.simulation.effects.lists import fetched
from tests.simulation.world import VOLUME, Container, Union, Volume


def fetch_spec(ctx: Ctx) -> Performance:
    yield
    ctx.files["spec.json"] = fetched(ctx, ctx.view.source_prepared.spec, ctx.request_source)
    return None


def fetch_spec_undo(ctx: Ctx) -> Performance:
    yield
    ctx.host.files.pop(ctx.migration, None)
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
