"""The entries of a container's writable layer: a tree like any other, but for what overlayfs writes into it.

An overlay's upper directory holds what the container made or changed. What it deleted of the image is a character
device 0:0 (a *whiteout*), and a directory that hides the image's has the mark ``trusted.overlay.opaque``. Those
belong to the layer and travel. Other marks are notes of this one host's kernel (file handles, counters, hints) and
must not: a handle of another host's file system may mean any file here.

What it must never do: treat a file whose contents overlayfs left in the image (``metacopy``) as one with contents.

Flow: the source's manifests of the layer pass through ``carried``; ``hostd/placement.py`` makes it on the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from events.errors import PermanentError
from events.schema import Mount
from hostd.entry import LAYER_MARKS, Entry, escape

ROOTFS: Final = "rootfs"
"""The kind of ``Mount`` that is a writable layer."""
_OVERLAY_PREFIX = b"trusted.overlay."
_METACOPY = b"trusted.overlay.metacopy"


def is_whiteout(entry: Entry) -> bool:
    """Whether the entry says that the container deleted this path of its image."""
    return entry.kind == "c" and entry.rdev == 0


def layer_entry(entry: Entry) -> Entry:
    """``entry`` with what travels of it, and nothing else.

    The kernel makes all whiteouts of a layer names of one inode to save inodes; that ties nothing together.
    """
    if is_whiteout(entry):
        return msgspec.structs.replace(entry, link_group=0, xattrs=())
    kept = tuple(
        pair
        for pair in entry.xattrs
        if not pair[0].startswith(_OVERLAY_PREFIX) or (pair[0] in LAYER_MARKS and entry.kind == "d")
    )
    return entry if len(kept) == len(entry.xattrs) else msgspec.structs.replace(entry, xattrs=kept)


def carried(mount: Mount, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries of ``mount``'s tree as they belong into a manifest. Raises PermanentError, see ``layer_obstacle``."""
    if mount.kind != ROOTFS:
        yield from entries
        return
    for entry in entries:
        if obstacle := layer_obstacle(entry):
            raise PermanentError(obstacle)
        yield layer_entry(entry)


def layer_obstacle(entry: Entry) -> str:
    """Why this entry of a writable layer, as it was found, cannot be carried; empty when it can."""
    if entry.kind == "f" and any(name == _METACOPY for name, _ in entry.xattrs):
        return (
            f"{escape(entry.path)} has its contents in the image (overlayfs' metacopy), which a copy of the layer would "
            "lose; switch metacopy off, or leave the layer behind with rootfs: false"
        )
    return ""
