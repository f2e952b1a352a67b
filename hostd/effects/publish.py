"""Turn dirty sets into manifests that the target can read. Not an effect: shared by two of them."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

from events.schema import DirtyManifest, Mount
from hostd.effects.base import Context
from hostd.manifest import Entry, write_manifest

MAX_INLINE_BYTES = 12 * 1024
"""Of a compressed manifest that travels inside the event and so saves the stop window a transfer. Several
mounts share the event's 64 KiB."""
MAX_INLINE_MOUNTS = 3


def publish(
    context: Context, mount: Mount, label: str, entries: list[Entry], *, everything: bool, why: str
) -> DirtyManifest:
    """Write ``entries`` to a file of this migration and describe it for an event."""
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = context.directory / f"{label}-{mount_label(context, mount)}.manifest"
    reference = write_manifest(file, entries)
    stale = [entry for entry in entries if entry.stale and entry.kind == "f"]
    return DirtyManifest(
        destination=mount.destination,
        manifest=reference,
        stale_files=len(stale),
        stale_bytes=sum(entry.size for entry in stale),
        everything=everything,
        why=why,
        inline=_inline(context, file),
    )


def mount_label(context: Context, mount: Mount) -> str:
    """A short, stable file-name part for ``mount``: its position in the container's list."""
    destinations = [known.destination for known in context.view.source_prepared.mounts]
    return str(destinations.index(mount.destination))


def _inline(context: Context, file: Path) -> str:
    if len(context.view.source_prepared.mounts) > MAX_INLINE_MOUNTS or file.stat().st_size > 1024 * 1024:
        return ""
    packed = zlib.compress(file.read_bytes(), 6)
    return base64.b64encode(packed).decode() if len(packed) <= MAX_INLINE_BYTES else ""
