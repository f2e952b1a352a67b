"""What keeps a container from being moved, and what a person should know before it is.

``source_findings`` looks at the container alone; ``target_problems`` compares its specification with
facts about the target that the caller gathered. Both return sentences for a person and take no decision:
a refusal is one that the caller must honour before anything is stopped (FAULTS.md, F9 and F10).

Pure: no I/O, no clock.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hostd.docker_json import ContainerView, MountView, VolumeView
from hostd.networks import creation_problems, existing_problems, network_names

if TYPE_CHECKING:
    from hostd.spec import ContainerSpec

DATA_KINDS = ("volume", "bind")
PRIVATE_PROPAGATION = ("", "private", "rprivate")
CONTROL_SOCKETS = ("docker.sock", "containerd.sock", "podman.sock", "crio.sock")
SYSTEM_TREES = ("/proc", "/sys", "/dev", "/run", "/var/run")
"""Made anew by each host's kernel and boot: copying them means nothing, overlaying them breaks hosts."""
SUBPATH_API = (1, 45)
"""https://docs.docker.com/engine/api/version-history/#v145-api-changes; older engines ignore what they do not know."""
SWARM_LABEL = "com.docker.swarm.task.id"
KUBERNETES_LABEL = "io.kubernetes.pod.name"
COMPOSE_LABEL = "com.docker.compose.project"
SHARED = "container:"
"""Begins the mode of a namespace that is another container's; its id or name follows."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
"""The kernel's name of an architecture, and the one that images use."""


class Findings:
    """Sentences collected on the way: ``warnings`` inform, ``refusals`` forbid."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.refusals: list[str] = []


def source_findings(
    container: ContainerView,
    volumes: Mapping[str, VolumeView] | None = None,
    shared: Container[str] = (),
    others: Sequence[ContainerView] = (),
) -> Findings:
    """Everything about ``container`` that matters before a move.

    ``volumes`` are its volumes by name, for their mount options; without them those go unchecked. ``shared`` are the
    destinations of its mounts on shared storage; ``others`` are the host's containers, for namespaces that are shared.
    """
    found = Findings()
    _supervision(container, found)
    _shared_namespaces(container, others, found)
    _devices_and_rights(container, found)
    _mounts(container, volumes or {}, shared, found)
    return found


def _supervision(container: ContainerView, found: Findings) -> None:
    """A15: whoever else starts and stops this container would undo the move."""
    labels = container.config.labels or {}
    if container.host_config.auto_remove:
        found.refusals.append(
            "the container was started with --rm: Docker deletes it, and its anonymous volumes, the moment "
            "it stops, so there would be no way back; start it without --rm"
        )
    if SWARM_LABEL in labels:
        found.refusals.append("the container is a task of a Swarm service: Swarm would start it again on the source")
    if KUBERNETES_LABEL in labels:
        found.refusals.append("the container belongs to a Kubernetes pod, which would start it again")
    if COMPOSE_LABEL in labels:
        found.warnings.append(
            f"the container belongs to the Compose project {labels[COMPOSE_LABEL]!r}: until the release, "
            "'docker compose up' on the source would start it a second time"
        )


def _shared_modes(container: ContainerView) -> Iterator[tuple[str, str]]:
    """Kinds of namespaces that ``container`` has of another container, each with that one's id or name."""
    host = container.host_config
    for kind, mode in (("network", host.network_mode), ("pid", host.pid_mode), ("ipc", host.ipc_mode)):
        if mode and mode.startswith(SHARED):
            yield kind, mode.removeprefix(SHARED)


def _shared_namespaces(container: ContainerView, others: Sequence[ContainerView], found: Findings) -> None:
    host = container.host_config
    names = {other.id: other.name.removeprefix("/") for other in others}
    for kind, owner in _shared_modes(container):
        found.refusals.append(
            f"the container uses the {kind} namespace of another container, {names.get(owner, owner)!r}, "
            "which does not move with it"
        )
    for other in others:
        if other.id == container.id or not other.state.running:
            continue
        for kind, owner in _shared_modes(other):
            if owner in (container.id, container.name.removeprefix("/")):
                found.refusals.append(
                    f"the running container {other.name.removeprefix('/')!r} uses the {kind} namespace of this one "
                    "and would lose it; stop that one first"
                )
    endpoints = (container.network_settings.networks or {}).values()
    if host.links or any(endpoint is not None and endpoint.links for endpoint in endpoints):
        found.refusals.append("the container is linked (--link) to others, which do not move with it")
    if host.network_mode == "host":
        found.warnings.append(
            "the container uses the host's network: Docker does not know its ports, so they could not be "
            "checked on the target"
        )
    if host.volumes_from:
        found.warnings.append(
            "the container takes volumes from another one (--volumes-from); on the target it gets them "
            "as mounts of its own"
        )


def _devices_and_rights(container: ContainerView, found: Findings) -> None:
    host = container.host_config
    if host.privileged:
        found.warnings.append("the container is privileged and may depend on the source host in any way")
    devices = sorted(device.path_on_host or "?" for device in host.devices or ())
    if devices:
        found.warnings.append(f"the container uses devices of its host: {', '.join(devices)}")


def _mounts(
    container: ContainerView, volumes: Mapping[str, VolumeView], shared: Container[str], found: Findings
) -> None:
    for mount in container.mounts or ():
        where = f"the mount at {mount.destination}"
        if mount.type in DATA_KINDS:
            if mount.destination in shared:
                found.warnings.append(
                    f"{where} lies on shared storage: the target attaches the same, nothing is copied"
                )
                volumes = {name: volume for name, volume in volumes.items() if name != mount.name}
            found.refusals.extend(f"{where} {why}" for why in _mount_problems(mount, volumes))
            if mount.propagation not in (None, *PRIVATE_PROPAGATION):
                found.warnings.append(
                    f"{where} shares mounts with its host (propagation {mount.propagation!r}); what is mounted there "
                    "later does not move with it"
                )
        elif mount.type != "tmpfs":
            found.refusals.append(f"{where} is of the kind {mount.type!r}, which is not supported")
    found.refusals.extend(_overlaps([m for m in container.mounts or () if m.destination not in shared]))


def _mount_problems(mount: MountView, volumes: Mapping[str, VolumeView]) -> Iterator[str]:
    tree = mount.source or ""
    if not tree.startswith("/") or "\0" in tree or posixpath.normpath(tree) != tree:
        yield f"has no usable place on the source ({tree!r})"
        return
    if "\ufffd" in tree or "\ufffd" in mount.destination:
        yield f"has a path that is not UTF-8 and that Docker therefore reports wrongly ({tree!r})"
    if mount.type == "bind":
        if posixpath.basename(tree) in CONTROL_SOCKETS:
            yield f"gives it control of the source's container engine ({tree}); the target has another"
        elif tree == "/" or any(tree == top or tree.startswith(top + "/") for top in SYSTEM_TREES):
            yield f"is a part of the source's own system ({tree}), not data that could be moved"
        return
    if not mount.name:
        yield "is a volume without a name"
    if mount.driver not in (None, "", "local"):
        yield f"is a volume of the driver {mount.driver!r}; only the driver 'local' is supported"
    volume = volumes.get(mount.name or "")
    if volume is not None and volume.options:
        kind = volume.options.get("type", "")
        yield (
            f"is a volume with mount options (of the type {kind!r}), so its data may lie anywhere; only volumes of a "
            "type that the agent's setting shared_file_systems names can be attached on the target"
        )


def _overlaps(mounts: Sequence[MountView]) -> Iterator[str]:
    """The same data under two mounts would become two diverging copies on the target."""
    data = sorted(
        (
            (mount.source, mount.destination)
            for mount in mounts
            # What has no place, or the whole system for one, is refused for that already.
            if mount.type in DATA_KINDS and mount.source not in (None, "", "/")
        ),
        key=lambda pair: (f"{pair[0]}/", pair[1]),
    )
    for (tree, destination), (inner, other) in itertools.pairwise(data):
        if f"{inner}/".startswith(f"{tree}/"):
            yield (
                f"the mounts at {destination} and {other} share data on the source "
                f"({inner} lies in {tree}), which is not supported"
            )


def target_problems(
    spec: ContainerSpec,
    *,
    networks: Mapping[str, Mapping[str, Any]],
    architecture: str,
    api_version: str = "",
    user_namespace: str = "",
    host_addresses: Sequence[str] = (),
) -> list[str]:
    """Why the container could not be created or started on this target; empty when nothing was found.

    ``networks`` are the target's networks by name as inspected, ``host_addresses`` those by which the hosts reach
    each other, ``architecture``, ``api_version`` and ``user_namespace`` are from ``docker info``. What a request can
    consent to is found in hostd/fidelity.py. Names, ports, volumes, space and the image's presence are checked by the
    effects.
    """
    problems = list(_network_problems(spec, networks, host_addresses))
    ours = ARCHITECTURES.get(architecture, architecture)
    if spec.architecture and ours and spec.architecture != ours:
        problems.append(f"the image is for {spec.architecture}, the target is {ours}")
    if spec.subpaths and _version(api_version) < SUBPATH_API:
        problems.append(
            f"the target's Docker (API {api_version}) cannot show only a part of a volume (volume-subpath), as asked for at "
            f"{', '.join(spec.subpaths)}; it would silently show all of it"
        )
    theirs = "" if spec.host_config.get("UsernsMode") == "host" else user_namespace
    if spec.user_namespace != theirs:
        problems.append(
            f"Docker maps the container's users to {spec.user_namespace or 'the same ones'} on the source and to "
            f"{theirs or 'the same ones'} on the target (userns-remap): its files would belong to others there"
        )
    return problems


def _version(text: str) -> tuple[int, ...]:
    """``1.45`` as numbers that can be compared; the lowest for anything else."""
    parts = text.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else ()


def _network_problems(
    spec: ContainerSpec, networks: Mapping[str, Mapping[str, Any]], host_addresses: Sequence[str]
) -> Iterator[str]:
    for name in network_names(spec.networks, spec.network_mode):
        wanted, endpoint = spec.network_definitions.get(name), spec.networks.get(name)
        if name in networks:
            yield from existing_problems(name, wanted, endpoint, networks[name])
        else:
            yield from creation_problems(name, wanted, endpoint, networks, host_addresses)
