"""Read the manifests that the source published. Not an effect: shared by the target's.

A manifest is another host's word: size and digest must be those of the event, and every record is
validated when it is read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from events.errors import PermanentError
from events.schema import DirtyManifest, FileRef
from hostd.effects.arrival import peer_of_source
from hostd.effects.base import Context
from hostd.manifest import Entry, decode_manifest, read_manifest
from hostd.peer import Peer

_SHA256 = re.compile(r"[0-9a-f]{64}")
"""It becomes the name of a file, and comes from another host."""
MAX_INLINE_BYTES = 4 * 1024 * 1024
"""Of an inline manifest once unpacked: the source does not inline larger ones."""


def entries_of(context: Context, dirty: DirtyManifest) -> Iterator[Entry]:
    """The entries of a dirty manifest, taken from the event itself when they are in it."""
    if dirty.inline:
        return decode_manifest(unpacked(dirty))
    return read_manifest(fetched(context, dirty.manifest))


def fetched(context: Context, reference: FileRef) -> Path:
    """The source's file that ``reference`` names, brought here if it is not here yet."""
    return fetched_from(context, peer_of_source(context), reference)


def fetched_from(context: Context, peer: Peer, reference: FileRef) -> Path:
    """The file of ``peer`` that ``reference`` names, brought here if it is not here yet."""
    file = _place_of(context, reference)
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not file.exists():
        context.bench.transport.fetch(peer, reference, file, cancelled=context.cancelled)
    return file


def here_already(context: Context, reference: FileRef) -> Path | None:
    """The same, only if it was brought here before and is still what it was."""
    file = _place_of(context, reference)
    if not file.exists():
        return None
    with file.open("rb") as opened:
        whole = hashlib.file_digest(opened, "sha256").hexdigest() == reference.sha256
    return file if whole else None


def _place_of(context: Context, reference: FileRef) -> Path:
    if not _SHA256.fullmatch(reference.sha256):
        raise PermanentError(f"a file is named by {reference.sha256[:80]!r}, which is no SHA-256; not fetched")
    return context.directory / f"{reference.sha256}.manifest"


def unpacked(dirty: DirtyManifest) -> bytes:
    """The manifest that is in the event itself. Raises PermanentError when it is not what the event says."""
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(dirty.inline, validate=True), MAX_INLINE_BYTES)
    except (zlib.error, binascii.Error, ValueError) as error:
        raise PermanentError(f"the list of changes of {dirty.destination} cannot be unpacked") from error
    if (
        unpacker.unconsumed_tail
        or len(raw) != dirty.manifest.size_bytes
        or hashlib.sha256(raw).hexdigest() != dirty.manifest.sha256
    ):
        raise PermanentError(f"the list of changes of {dirty.destination} is not what the event says it is")
    return raw
