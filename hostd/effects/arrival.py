"""Where each data mount of the container arrives on the target. Not an effect: shared by the target's.

A named volume's stage lies beside its ``_data``, a bind's beside the bound path, so that both are on the
file system of the final place and the tree can take its place by a rename. The writable layer's lies in Docker's
data root; its place is the upper directory of the container that was created for it, which is noted in a file of the
migration, because looking it up would cost the stop window two questions to Docker each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from events.errors import PermanentError
from events.schema import Mount, TargetStarted
from hostd.effects.base import Context
from hostd.federation import Union
from hostd.layer import ROOTFS
from hostd.nfs_client import Export
from hostd.nfs_server import share_of
from hostd.own_file import read_own
from hostd.peer import Peer
from hostd.spec import MIGRATION_LABEL, SOURCE_LABEL

VOLUME_STAGE = "cargo"
NOT_EMPTY_MARK = ".cargo-arriving"
"""Docker fills an *empty* volume with what the image has at the mount's place. This keeps it from that; the
mark lies in the directory that the arriving tree replaces as a whole."""


LAYER_PLACE = "layer"
"""File of the migration that holds a LayerPlace."""


class LayerPlace(msgspec.Struct, frozen=True, array_like=True):
    """Where the writable layer arrives on this host."""

    container_id: str
    upper: str
    stage: str


@dataclass(frozen=True)
class Arrival:
    """One mount, its place on this host, and its union."""

    mount: Mount
    union: Union
    number: int

    def attach_remote(self, context: Context) -> None:
        """Show the source's tree, by the transport that the source has prepared. Raises TransientError, CancelledError."""
        self.union.attach_remote(
            context.bench.transport,
            peer_of_source(context),
            self.mount.tree,
            export_of(context, self.number),
            cancelled=context.cancelled,
        )


def export_of(context: Context, number: int) -> Export | None:
    """Where the source serves the tree of mount ``number`` by NFS; None when it is looked at through sshfs."""
    prepared = context.view.source_prepared
    if prepared.remote != "nfs":
        return None
    return Export(prepared.address, prepared.remote_port, share_of(number))


def peer_of_source(context: Context) -> Peer:
    """The source's sshd, pinned by the host's name."""
    return peer_at(context, context.view.source_prepared.address)


def peer_at(context: Context, address: str) -> Peer:
    """The same, at an address that it has been registered with. Raises PermanentError for what is none."""
    settings = context.bench.settings
    return Peer(
        host=context.view.requested.request.source,
        address=address,
        port=settings.ssh_port,
        user=settings.ssh_user,
        identity=settings.ssh_identity,
        known_hosts=settings.ssh_known_hosts,
    )


def labels(context: Context) -> dict[str, str]:
    """What marks containers and volumes on this host as this migration's own."""
    return {
        MIGRATION_LABEL: context.migration,
        SOURCE_LABEL: context.view.requested.request.source,
    }


def arrivals(context: Context) -> list[Arrival]:
    """Every data mount, with its union. Volumes must exist by now; the layer is among them once it has a stage."""
    found = volume_arrivals(context)
    layer = layer_arrival(context)
    return found if layer is None else [*found, layer]


def volume_arrivals(context: Context) -> list[Arrival]:
    """As ``arrivals``, without the container's writable layer."""
    return [
        Arrival(mount, _union(context, mount, number), number)
        for number, mount in enumerate(context.view.source_prepared.mounts)
        if mount.kind != ROOTFS
    ]


def existing_arrivals(context: Context) -> list[Arrival]:
    """As ``volume_arrivals``, without volumes that do not exist (any more)."""
    found = []
    for number, mount in enumerate(context.view.source_prepared.mounts):
        if mount.kind == "bind" or (
            mount.kind == "volume" and context.bench.engine.volume_inspect(mount.name) is not None
        ):
            found.append(Arrival(mount, _union(context, mount, number), number))
    return found


def layer_mount(context: Context) -> Mount | None:
    """The container's writable layer, if it travels."""
    return next((mount for mount in context.view.source_prepared.mounts if mount.kind == ROOTFS), None)


def layer_arrival(context: Context) -> Arrival | None:
    """Where the writable layer arrives; None if it does not travel, or before ``open_layer``."""
    mount, place = layer_mount(context), layer_place(context)
    if mount is None or place is None:
        return None
    number = context.view.source_prepared.mounts.index(mount)
    return Arrival(mount, Union(Path(place.stage), Path(place.upper), layer=True), number)


def layer_place(context: Context) -> LayerPlace | None:
    """What ``open_layer`` has noted."""
    return read_layer_place(context.directory / LAYER_PLACE)


def read_layer_place(file: Path) -> LayerPlace | None:
    """What is noted in ``file``; None when there is none."""
    return read_own(file, LayerPlace) if file.exists() else None


def _union(context: Context, mount: Mount, number: int) -> Union:
    if mount.kind == "bind":
        place = bind_place(mount)
        stage = place.parent / f".cargo-{context.migration}-{number}"
    else:
        place = _place_of_volume(context, mount.name)
        stage = place.parent / VOLUME_STAGE
    return Union(
        stage, place, single_file=mount.single_file, patience_seconds=context.bench.settings.read_patience_seconds
    )


def _place_of_volume(context: Context, name: str) -> Path:
    """Asked once a step: an answer takes Docker some milliseconds, of which the stop window has few."""
    if name not in context.places:
        volume = context.bench.engine.volume_inspect(name)
        if volume is None:
            raise PermanentError(f"the volume {name!r} has gone from {context.host}")
        context.places[name] = Path(volume["Mountpoint"])
    return context.places[name]


def bind_place(mount: Mount) -> Path:
    """The bind's path here, which is the same as on the source. Raises PermanentError for an unsafe one."""
    place = Path(mount.name)
    parts = Path(os.path.normpath(mount.name)).parts
    if not place.is_absolute() or ".." in Path(mount.name).parts or len(parts) < 3:
        raise PermanentError(f"{mount.name!r} is no place where a bind mount could arrive")
    return place


def our_container(context: Context) -> str | None:
    """The id of the container that this migration created here, if it exists, whatever it is called by now.

    A person may rename it, and it must still be found: whoever thinks it gone would let it run on beside the source's.
    Once it has started, it is the one that the history names; an image made of it passes its labels on to other
    containers. Before that, nothing but the migration makes containers with its label.
    """
    found = context.bench.engine.find_by_label(MIGRATION_LABEL, context.migration)
    started = context.view.facts.get("target_started")
    if isinstance(started, TargetStarted):
        return next((container.id for container in found if container.id == started.container_id), None)
    name = context.view.source_prepared.container_name
    by_name = next((container.id for container in found if container.name == name), None)
    return by_name or next((container.id for container in found), None)
