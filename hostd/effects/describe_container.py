"""Describe the container to the target: specification, mounts, ports. Changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import ClassVar

from events.errors import RefusedError
from events.schema import Mount
from hostd import moves as moves_rules
from hostd.effects.base import ContainerChangedError, Context, Effect, Outcome
from hostd.effects.return_policy import return_first
from hostd.effects.shared import shared_places
from hostd.inventory import sharers_on
from hostd.shared_storage import SharedPlace, told
from hostd.spec import ContainerSpec, from_inspect
from hostd.spec_file import write_spec

SPEC_FILE = "spec.json"


class DescribeContainer(Effect):
    """Writes the specification file and returns what the event may say of it (no environment values)."""

    name: ClassVar[str] = "describe_container"

    def run(self, context: Context) -> Outcome:
        request = context.view.requested
        engine = context.bench.engine
        inspected = engine.inspect(request.container_id)
        if inspected is None:
            raise ContainerChangedError(
                f"the container {request.request.container!r} was removed after the request was admitted"
            )
        _check_identity(context, inspected)
        if return_first(context, inspected):
            inspected = engine.inspect(request.container_id) or inspected
        image = engine.image_inspect(inspected["Image"])
        if image is None:
            raise RefusedError([f"the image of {request.request.container!r} is gone from {context.host}"])
        info = engine.info()
        spec, warnings, refusals = from_inspect(
            inspected,
            image,
            volumes=engine.volumes_of(inspected),
            networks=engine.networks(),
            shared=shared_places(context, inspected),
            host_name=info.host_name,
            user_namespace=info.user_namespace,
            others=[raw for raw in engine.inspect_all() if raw.get("Id") != inspected["Id"]],
        )
        refusals += shared_volumes(context, spec)
        refusals += _kept_here(context, spec)
        if not request.request.rootfs:
            warnings += left_behind(context, spec.container_id)
        if refusals:
            raise RefusedError(refusals)
        context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            "container_id": spec.container_id,
            "container_name": spec.name,
            "spec": write_spec(context.directory / SPEC_FILE, spec),
            "image_id": spec.image_id,
            "image_tags": spec.image_tags,
            "mounts": spec.mounts,
            "shared": told(spec.shared),
            "ports": spec.ports,
            "restart_policy": spec.restart_policy,
            "restart_max_retries": spec.restart_max_retries,
            "address": context.bench.settings.address,
            "warnings": tuple(warnings),
        }

    def undo(self, context: Context) -> Outcome:
        """Forget everything kept here about the migration."""
        if context.directory.exists():
            shutil.rmtree(context.directory)
        return None


def _kept_here(context: Context, spec: ContainerSpec) -> list[str]:
    """What this host's configuration does not let go."""
    moves, wish = context.bench.settings.moves, context.view.request
    consented = wish.privileged or moves_rules.PRIVILEGED in wish.without
    return [
        *moves_rules.refusals(moves, context.host, spec.name, places_of(spec.mounts, spec.shared)),
        *moves_rules.privilege_refusal(moves, context.host, spec.host_config, consented),
    ]


def places_of(mounts: Iterable[Mount], shared: Iterable[SharedPlace]) -> list[moves_rules.Place]:
    """A container's mounts as a host's configuration speaks of them, symlinks of this host resolved.

    Of a bind on shared storage they are not: looking there may hang.
    """
    found = [
        moves_rules.Place(mount.kind, mount.name, os.path.realpath(mount.name) if mount.kind == "bind" else "")
        for mount in mounts
        if mount.kind != "rootfs"
    ]
    return [*found, *(moves_rules.Place(place.kind, place.name) for place in shared)]


def _check_identity(context: Context, inspected: dict[str, object]) -> None:
    name = str(inspected.get("Name", "")).removeprefix("/")
    wanted = context.view.requested.request.container
    if name != wanted:
        raise ContainerChangedError(f"the container is called {name!r} now, the request says {wanted!r}")
    state = inspected.get("State")
    assert isinstance(state, dict)
    if not state.get("Running"):
        raise ContainerChangedError(f"the container {wanted!r} is not running any more")
    if state.get("Restarting"):
        raise ContainerChangedError(f"the container {wanted!r} ends and is restarted over and over; mend it first")
    if state.get("Paused"):
        raise ContainerChangedError(f"the container {wanted!r} is paused; unpause it first")


def shared_volumes(context: Context, spec: ContainerSpec) -> list[str]:
    """Refusals for every mount that another running container uses too: its writes would be lost."""
    found = sharers_on(context.bench.engine, spec.mounts, spec.name)
    return [
        f"{name} is also used by the running container {other!r}; its writes would be lost, so stop that one first"
        for name, others in found.items()
        for other in others
    ]


MAX_PATHS_NAMED = 5


def left_behind(context: Context, container_id: str) -> list[str]:
    """P14: with ``rootfs: false`` what the container wrote outside of its mounts stays, so a person is told."""
    changes = context.bench.engine.writable_layer_changes(container_id)
    if not changes:
        return []
    return [
        f"{len(changes)} paths outside of the mounts were changed by the container and are not carried: "
        + ", ".join(changes[:MAX_PATHS_NAMED])
    ]
