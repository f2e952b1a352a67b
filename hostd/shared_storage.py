"""Which of a container's mounts lie on storage that other hosts reach too: NFS, CIFS and the like.

Such data is never copied, tracked or compared: the target attaches the same share. What it takes to attach it may hold
a password (``o=username=…,password=…`` of a volume), so a ``SharedPlace`` belongs into the specification, which goes by
SSH into files of mode 0600, and never into an event or a log; those get its ``SharedMount``.

Pure: the mount table and Docker's volumes come in as arguments.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from events.schema import Mount, SharedMount
from hostd.docker_json import VolumeView

if TYPE_CHECKING:
    from hostd.mounts import MountRecord

SHARED_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "fuse.glusterfs"})
"""Kinds, as the mount table writes them, on which every host sees the same files."""
_SAME = {"nfs4": "nfs", "smb3": "cifs"}
"""One kind of storage under two names: a volume of type ``nfs`` is mounted as ``nfs4``."""
_SECRETS = re.compile(r"\b(pass|passwd|password|password2|secret|key|credentials)=[^,\s'\"]*", re.IGNORECASE)


class SharedPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One mount on shared storage, and all that it takes to attach it elsewhere."""

    kind: Literal["volume", "bind"]
    name: str
    """Volume name, or the bind's path on the host."""
    destination: str
    file_system: str
    options: dict[str, str] = {}
    """A volume's options of the local driver, verbatim."""
    share: str = ""
    """Of a bind: what is mounted there, as the mount table says (``10.0.0.5:/export``)."""
    path: str = ""
    """Of a bind: where it lies within the share."""

    def __repr__(self) -> str:
        # The default would print the options into logs and tracebacks.
        return f"SharedPlace(kind={self.kind!r}, name={self.name!r}, destination={self.destination!r})"


def find_shared(
    mounts: Iterable[Mount],
    volumes: Mapping[str, VolumeView],
    table: Sequence[MountRecord],
    kinds: frozenset[str] = SHARED_FILE_SYSTEMS,
    real: Callable[[str], str] = str,
) -> dict[str, SharedPlace]:
    """Those of ``mounts`` that lie on shared storage, by destination.

    ``table`` is the host's mount table in the kernel's order. ``real`` resolves the symlinks of a bind's path; without
    it nothing below a mount point is touched, since a share whose server is away hangs whoever looks.
    """
    found = {}
    for mount in mounts:
        if mount.kind == "volume":
            place = _of_volume(mount, volumes.get(mount.name), kinds)
        else:
            place = _of_bind(mount, os.fsencode(real(mount.tree)), table, kinds)
        if place is not None:
            found[mount.destination] = place
    return found


def _of_volume(mount: Mount, volume: VolumeView | None, kinds: frozenset[str]) -> SharedPlace | None:
    options = (volume.options or {}) if volume is not None else {}
    kind = options.get("type", "")
    if kind not in kinds or volume is None or volume.driver not in ("", "local"):
        return None
    return SharedPlace(
        kind="volume", name=mount.name, destination=mount.destination, file_system=kind, options=dict(options)
    )


def _of_bind(mount: Mount, tree: bytes, table: Sequence[MountRecord], kinds: frozenset[str]) -> SharedPlace | None:
    record = covering(tree, table)
    if record is None or record.kind not in kinds:
        return None
    return SharedPlace(
        kind="bind",
        name=mount.name,
        destination=mount.destination,
        file_system=record.kind,
        share=os.fsdecode(record.source),
        path=os.fsdecode(_within(record, tree)),
    )


def covering(path: bytes, table: Sequence[MountRecord]) -> MountRecord | None:
    """The mount that ``path``, absolute and without symlinks, lies on; of several on one point the topmost."""
    best = None
    for record in table:
        point = record.point.rstrip(b"/") + b"/"
        if (path + b"/").startswith(point) and (best is None or len(record.point) >= len(best.point)):
            best = record
    return best


def _within(record: MountRecord, path: bytes) -> bytes:
    inside = path[len(record.point.rstrip(b"/")) :]
    return (record.root.rstrip(b"/") + inside).rstrip(b"/") or b"/"


def told(places: Iterable[SharedPlace]) -> tuple[SharedMount, ...]:
    """What an event may say of them: no options, which may hold a password."""
    return tuple(
        SharedMount(kind=place.kind, name=place.name, destination=place.destination, file_system=place.file_system)
        for place in places
    )


def volume_problem(place: SharedPlace, existing: Mapping[str, str] | None) -> str:
    """Why an existing volume of this name, with these options, is not the same share; empty when it is."""
    theirs = dict(existing or {})
    if theirs == place.options:
        return ""
    differing = sorted({*theirs, *place.options} - {k for k in theirs if theirs.get(k) == place.options.get(k)})
    return (
        f"there is a volume {place.name!r} already, and it is not the source's share: its options "
        f"{', '.join(differing)} differ (their values, which may be secret, are not shown); remove or rename it first"
    )


def bind_problem(place: SharedPlace, real_path: bytes, table: Sequence[MountRecord]) -> str:
    """Why this host does not have the same share at the same place; empty when it has.

    ``real_path`` is the bind's path with the symlinks of this host resolved.
    """
    record = covering(real_path, table)
    if record is not None and _kind(record.kind) == _kind(place.file_system):
        same_path = os.fsdecode(_within(record, real_path)) == place.path
        if os.fsdecode(record.source) == place.share and same_path:
            return ""
    seen = f"it lies on {os.fsdecode(record.source)!r} ({record.kind})" if record is not None else "nothing is there"
    return (
        f"{place.name} is on the shared storage {place.share!r} ({place.file_system}) on the source, but here {seen}; "
        f"mount {place.share!r} here at the same place, under the same name, and ask again"
    )


def _kind(kind: str) -> str:
    return _SAME.get(kind, kind)


def without_secrets(words: str) -> str:
    """``words`` of the kernel or of Docker about a mount, without passwords that were among its options."""
    return _SECRETS.sub(lambda match: f"{match.group(1)}=…", words)
