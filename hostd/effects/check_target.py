"""Can this host take the container? Every reason against it is found before anything is created."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from events.errors import RefusedError, TransientError
from hostd import moves as moves_rules
from hostd.effects.arrival import bind_place, export_of, labels, our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.describe_container import places_of
from hostd.effects.fetch_spec import arriving_spec
from hostd.effects.shared import bind_problems
from hostd.engine import EngineInfo
from hostd.fidelity import Target, apparmor_problem, refusals, shortfalls
from hostd.inventory import port_problems
from hostd.layer import ROOTFS
from hostd.nfs_client import client_problem, try_export
from hostd.shared_storage import volume_problem
from hostd.space import shortages
from hostd.spec import ContainerSpec
from hostd.spec_rules import target_problems
from hostd.visibility import engine_pid, invisible_mounts

PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/libexec/docker"
"""Where Docker finds its helpers."""
APPARMOR_PROFILES = Path("/sys/kernel/security/apparmor/profiles")


class CheckTarget(Effect):
    """Raises RefusedError with all reasons."""

    name: ClassVar[str] = "check_target"

    def run(self, context: Context) -> Outcome:
        engine = context.bench.engine
        prepared = context.view.source_prepared
        spec = arriving_spec(context)
        info = engine.info()
        reasons = target_problems(
            spec,
            networks=_networks(context, spec),
            host_addresses=(context.bench.settings.address, prepared.address),
            architecture=info.architecture,
            api_version=info.api_version,
            user_namespace=info.user_namespace,
        )
        reasons += refusals(shortfalls(spec, facts_of(info)))
        reasons += _not_let_in(context, spec)
        inspected = engine.inspect(prepared.container_name)
        if inspected is not None and our_container(context) is None:
            reasons.append(f"there is a container {prepared.container_name!r} on {context.host} already")
        reasons += port_problems(engine, prepared.ports)
        reasons += _volume_problems(context)
        reasons += _shared_problems(context, spec)
        reasons += _apparmor_problems(context, spec, info)
        reasons += _space_problems(context, info)
        reasons += _mount_problems(context)
        reasons += _remote_problems(context)
        if reasons:
            raise RefusedError(reasons)
        return {"warnings": tuple(_notes(context, spec, info))}


def _not_let_in(context: Context, spec: ContainerSpec) -> list[str]:
    """What this host's configuration does not let come, judged by what Docker would be asked for."""
    moves, prepared = context.bench.settings.moves, context.view.source_prepared
    return [
        *moves_rules.refusals(moves, context.host, spec.name, places_of(prepared.mounts, spec.shared)),
        *moves_rules.privilege_refusal(moves, context.host, spec.host_config, context.view.request.privileged),
        *moves_rules.undeclared(
            spec.host_config, [*(mount.name for mount in prepared.mounts), *(place.name for place in spec.shared)]
        ),
    ]


def facts_of(info: EngineInfo) -> Target:
    """What this host offers a container."""
    return Target(
        runtimes=info.runtimes,
        log_drivers=info.log_drivers,
        security=info.security,
        abilities=info.abilities,
        cpus=info.cpus,
        cgroup_driver=info.cgroup_driver,
        path_exists=os.path.exists,
        has_program=lambda name: shutil.which(name, path=PROGRAMS) is not None,
        apparmor_profiles=_apparmor_profiles(),
    )


def _apparmor_problems(context: Context, spec: ContainerSpec, info: EngineInfo) -> list[str]:
    own = any(str(option).startswith("apparmor") for option in spec.host_config.get("SecurityOpt") or ())
    if own or spec.host_config.get("Privileged"):
        return []
    problem = apparmor_problem(info.security, has_parser=shutil.which("apparmor_parser") is not None)
    return [f"{context.host}: {problem}; install the package apparmor there"] if problem else []


def _apparmor_profiles() -> set[str] | None:
    try:
        lines = APPARMOR_PROFILES.read_text().splitlines()
    except OSError:
        return None
    return {line.rpartition(" (")[0] for line in lines}


def _notes(context: Context, spec: ContainerSpec, info: EngineInfo) -> Iterator[str]:
    """What a person agreed to, and what they should know, for the history."""
    for name in context.view.requested.request.without:
        yield f"the container is created without {name}, as the request allows"
    if spec.apparmor_profile not in ("", "unconfined") and "apparmor" not in info.security:
        yield (
            f"the source confines the container by the AppArmor profile {spec.apparmor_profile!r}, "
            "and this host does not enforce AppArmor"
        )


def _networks(context: Context, spec: ContainerSpec) -> dict[str, dict[str, Any]]:
    """This host's networks; those that the container is to join with the addresses in use in them."""
    found = context.bench.engine.networks()
    for name in spec.networks:
        if name in found:
            found[name] = context.bench.engine.network_inspect(name) or found[name]
    return found


def _volume_problems(context: Context) -> list[str]:
    reasons = []
    for mount in context.view.source_prepared.mounts:
        if mount.kind == "bind":
            bind_place(mount)
        if mount.kind != "volume":
            continue
        volume = context.bench.engine.volume_inspect(mount.name)
        if volume is None:
            continue
        theirs = volume.get("Labels") or {}
        if any(theirs.get(key) != value for key, value in labels(context).items()):
            reasons.append(
                f"there is a volume {mount.name!r} on {context.host} already; "
                "it may hold somebody's data, so remove or rename it first"
            )
    return reasons


def _shared_problems(context: Context, spec: ContainerSpec) -> list[str]:
    """Volumes are tried once the container is there, by Docker itself (``create_container``)."""
    reasons = bind_problems(context, spec)
    for place in spec.shared:
        volume = context.bench.engine.volume_inspect(place.name) if place.kind == "volume" else None
        if volume is not None and (problem := volume_problem(place, volume.get("Options"))):
            reasons.append(f"{context.host}: {problem}")
    return reasons


def _remote_problems(context: Context) -> list[str]:
    """Each tree that the source serves by NFS is mounted once; with a client that is not there, or a firewall, nothing is."""
    prepared = context.view.source_prepared
    if prepared.remote != "nfs":
        return []
    if problem := client_problem():
        return [f"{context.host}: {problem}"]
    problems = []
    for number, mount in enumerate(prepared.mounts):
        export = export_of(context, number)
        if export is not None and not mount.single_file and mount.kind != ROOTFS:
            problems.append(try_export(export, context.directory / "trial"))
    return [f"{context.host}: {problem}" for problem in problems if problem]


def _mount_problems(context: Context) -> list[str]:
    """O13: what is mounted here has to be there for the container, too."""
    settings = context.bench.settings
    problem = invisible_mounts(engine_pid(settings.docker_socket), settings.run_dir)
    return [f"{context.host}: {problem}"] if problem else []


def _space_problems(context: Context, info: EngineInfo) -> list[str]:
    # A writable layer lies on the same file system as the volumes, by the place of its stage.
    volumes = Path(info.data_root) / "volumes"
    mounts = context.view.source_prepared.mounts
    places = [(mount, bind_place(mount) if mount.kind == "bind" else volumes) for mount in mounts]
    try:
        return shortages(context.host, places)
    except OSError as error:
        raise TransientError(f"the free space of {context.host} is unknown: {error}") from error
