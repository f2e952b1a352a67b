"""The container on the target, from its start on: kept up, recalled in a roll-back, or put on plain data."""

from __future__ import annotations

from events.schema import FinaliseOrdered
from tests.simulation.effects.base import Ctx, Performance, set_policy
from tests.simulation.effects.target_data import fold, look_at_source, mount, unmount_all
from tests.simulation.effects.target_setup import create
from tests.simulation.world import Container, Union


def warm_container(ctx: Ctx) -> Performance:
    """A container at its gate does not run, and whatever happens to it there, the start is the same one."""
    yield
    ctx.check_cancelled()
    return {"start": "warm"}


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
    if volume.union is not None and volume.union.remote:
        unmount_all(ctx, volume.union)
    volume.union = None
    ctx.host.layers.pop(ctx.migration, None)
    if container is not None and container.id in ctx.host.containers:
        ctx.docker()
        if not container.running and ("folding" in ctx.files or should_run(ctx, container)):
            ctx.agent.world_start(container)
        ctx.files.pop("folding", None)
        yield
        ctx.files["policy due"] = ctx.view.source_prepared.restart_policy
    return {"outage_seconds": 0.0}


def return_policy(ctx: Ctx) -> Performance:
    if "policy due" not in ctx.files:
        return None
    container = ctx.our_container()
    yield
    if container is not None and container.id in ctx.host.containers:
        ctx.docker()
        set_policy(container, ctx.view.source_prepared.restart_policy)
        yield
        if not container.running and should_run(ctx, container):
            ctx.agent.world_start(container)
        yield
    ctx.files.pop("policy due", None)
    return None
