"""Mounts on shared storage, as the effects of both hosts see them. Not an effect.

They are never copied: the target attaches the same share. What a host must do with one is to have it, and to have
written everything to it before the other host's container reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from events.errors import TransientError
from events.schema import Mount
from hostd import mounts
from hostd.docker_json import VolumeView, view
from hostd.effects.base import Context
from hostd.effects.fetch_spec import load_spec
from hostd.process import run
from hostd.shared_storage import SharedPlace, bind_problem, find_shared
from hostd.spec import ContainerSpec, data_mounts

FLUSH_TIMEOUT_SECONDS = 120
LOOK_TIMEOUT_SECONDS = 10


def shared_places(context: Context, inspected: Mapping[str, Any]) -> dict[str, SharedPlace]:
    """The mounts of an inspected container that lie on shared storage, by destination."""
    engine = context.bench.engine
    volumes = {
        name: view(VolumeView, raw, f"the volume {name!r}") for name, raw in engine.volumes_of(inspected).items()
    }
    kinds = context.bench.settings.shared_file_systems
    return find_shared(data_mounts(inspected), volumes, mounts.read_mountinfo(), kinds, os.path.realpath)


def moving_mounts(context: Context, inspected: Mapping[str, Any]) -> list[Mount]:
    """The data mounts of an inspected container whose data moves: all but those on shared storage."""
    if not inspected:
        return []
    shared = shared_places(context, inspected)
    return [mount for mount in data_mounts(inspected) if mount.destination not in shared]


def flush_shared(context: Context) -> None:
    """After a stop: what the container wrote must have reached the storage before the other host reads it.

    Raises TransientError when the storage does not answer.
    """
    for place in context.view.source_prepared.shared:
        path = place.name
        if place.kind == "volume":
            volume = context.bench.engine.volume_inspect(place.name)
            path = str((volume or {}).get("Mountpoint") or "")
            if not path or not mounts.is_mounted(os.fsencode(path)):
                continue  # the last container has let go of it, and the kernel wrote everything before it unmounted
        done = run(["sync", "--file-system", "--", path], timeout_seconds=FLUSH_TIMEOUT_SECONDS)
        if done is None or done.returncode != 0:
            why = "it does not answer" if done is None else done.stderr.decode("utf-8", "replace").strip()
            raise TransientError(
                f"what the container wrote to {path} could not be brought to its shared storage: {why}. It is not "
                "started on the other host before that; see to the storage's server"
            )


def bind_problems(context: Context, spec: ContainerSpec) -> list[str]:
    """Why binds on shared storage cannot be had on this host, in words."""
    table = mounts.read_mountinfo()
    problems = []
    for place in spec.shared:
        if place.kind != "bind":
            continue
        # In a child, because a share whose server is away hangs whoever looks.
        done = run(["stat", "--", place.name], timeout_seconds=LOOK_TIMEOUT_SECONDS)
        if done is None:
            problem = f"{place.name} does not answer; see to the server of the storage that it is on"
        else:
            problem = bind_problem(place, os.path.realpath(os.fsencode(place.name)), table)
            if not problem and done.returncode != 0:
                problem = f"{place.name} should be on the share {place.share!r}, but there is no such path"
        problems += [f"{context.host}: {problem}"] if problem else []
    return problems


def require_shares(context: Context) -> None:
    """Before any start, on either host: without its mount, a bind's place is an empty local directory.

    Raises TransientError while one is not there.
    """
    if not any(place.kind == "bind" for place in context.view.source_prepared.shared):
        return
    if problems := bind_problems(context, load_spec(context)):
        raise TransientError("; ".join(problems) + ". The container is started once it is there")
