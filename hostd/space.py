"""Is there room for the data? For each file system of the target that some of it will lie on, bytes and inodes.

What it must never do: count a place by its name. Volumes and binds may share a file system, and Docker's root or the
directory above a bind may be a mount point; so needs are summed up by device.

Stands below ``hostd/effects/check_target.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from events.schema import Mount

SPACE_MARGIN = 1.1
"""Beyond the data itself: blocks, directories, old versions kept as delta basis during the fill."""


@dataclass(frozen=True)
class Room:
    """What a file system has left for root, as ``statvfs`` says it."""

    device: int
    shown_as: str
    """A directory on it."""
    free_bytes: int
    free_inodes: int
    """0 where the file system makes inodes as it needs them."""


def room_at(place: Path) -> Room:
    """Of the file system that ``place`` is or will be made on: its nearest directory that exists. Raises OSError."""
    existing = place
    while not existing.is_dir():
        existing = existing.parent
    found = os.statvfs(existing)
    free_inodes = found.f_favail if found.f_files else 0
    return Room(existing.stat().st_dev, str(existing), found.f_bavail * found.f_frsize, free_inodes)


def shortages(host: str, mounts: Iterable[tuple[Mount, Path]], look: Callable[[Path], Room] = room_at) -> list[str]:
    """Every file system on which the data of ``mounts``, each with its place, does not fit; in words."""
    rooms: dict[int, Room] = {}
    needed: dict[int, tuple[int, int]] = {}
    for mount, place in mounts:
        room = look(place)
        rooms[room.device] = room
        size_bytes, entries = needed.get(room.device, (0, 0))
        # A sparse file takes what it holds. Histories of earlier versions know the apparent size only.
        size_bytes += mount.allocated_bytes if mount.entries else mount.size_bytes
        needed[room.device] = (size_bytes, entries + (mount.entries or mount.files))
    reasons = []
    for device, room in rooms.items():
        size_bytes, entries = (int(number * SPACE_MARGIN) for number in needed[device])
        if size_bytes > room.free_bytes:
            reasons.append(
                f"{host} has {room.free_bytes / 1e6:,.1f} MB free below {room.shown_as}, and the data needs "
                f"{size_bytes / 1e6:,.1f} MB: make room there, and ask again"
            )
        # A full file system has none left, which looks like one that makes them as needed; bytes tell then.
        if room.free_inodes and entries > room.free_inodes:
            reasons.append(f"{host} has {room.free_inodes} inodes free below {room.shown_as}, the data needs {entries}")
    return reasons
