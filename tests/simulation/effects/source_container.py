"""The container on the source: described, stopped, kept from starting, and retired or revived."""

from __future__ import annotations

from events.errors import PermanentError
from hostd.turn import StartedAgainError
from tests.simulation.effects.base import ContainerChangedError, Ctx, Performance, set_policy
from tests.simulation.effects.lists import reference
from tests.simulation.effects.source_data import withdraw
from tests.simulation.world import VOLUME, Container


def describe_container(ctx: Ctx) -> Performance:
    ctx.docker()
    request = ctx.view.requested
    container = ctx.host.containers.get(request.container_id)
    if container is None:
        raise ContainerChangedError("the container was removed after the request was admitted")
    if container.name != request.request.container or not container.running:
        raise ContainerChangedError("the container is not running any more, or is called otherwise")
    if (due := ctx.host.files.get(container.label, {}).get("policy due")) is not None:
        set_policy(container, due)
        yield
        ctx.host.files[container.label].pop("policy due", None)
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
    raise StartedAgainError(words, ctx.agent.place, ctx.view.request.target)


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
