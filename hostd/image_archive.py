"""``docker save`` without the layers that the other host has: what of an image must travel.

Docker looks for a layer by its *chain id*, which covers the layers below it, and opens the archive only for what
it does not have. So what a host has of an image is a number of its lowest layers, however its other images are
made; the data of those can be left out, and ``docker load`` takes the rest.

Which member of the archive is which layer follows from contents alone: a layer's id is the SHA-256 of its tar. So
the layouts of all Docker versions are read alike, and one that stores layers in another form (compressed, as
containerd does) merely travels whole. Used by the effects ``pack_image`` (source) and ``provide_image`` (target).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from events.errors import CancelledError, PermanentError
from events.schema import FileRef

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Packed:
    """An archive that was written, and what was left out of it."""

    archive: FileRef
    left_out_bytes: int


def layers_present(wanted: Sequence[str], images: Iterable[Sequence[str]]) -> int:
    """How many of the lowest layers of ``wanted`` a host has, given the layers of each of its images.

    All are diff ids, lowest first.
    """
    best = 0
    for layers in images:
        common = 0
        for one, other in zip(wanted, layers, strict=False):
            if one != other:
                break
            common += 1
        best = max(best, common)
    return best


def layers_to_leave_out(layers: Sequence[str], present: Sequence[str]) -> frozenset[str]:
    """Those of ``layers`` whose data need not travel to a host that has ``present``, its lowest ones.

    The same data may stand in an image twice (an empty layer often does); what is needed further up must travel.
    Raises PermanentError when ``present`` is not how the image begins.
    """
    if tuple(layers[: len(present)]) != tuple(present):
        raise PermanentError("the target says it has layers that are not the lowest of this image; nothing was packed")
    return frozenset(present) - frozenset(layers[len(present) :])


def pack(
    pieces: Iterable[bytes], file: Path, without: frozenset[str], cancelled: threading.Event | None = None
) -> Packed:
    """Write the ``docker save`` stream ``pieces`` to ``file``, durably and as a whole, without these layers.

    Raises PermanentError when the stream is no tar archive or the disk does not take it, CancelledError; what
    ``pieces`` raises, passes.
    """
    draft = file.with_name(f".{file.name}.part")
    left_out = 0
    try:
        with draft.open("w+b") as raw:
            os.chmod(draft, 0o600)
            with (
                tarfile.open(fileobj=cast(IO[bytes], _Stream(pieces, cancelled)), mode="r|") as arriving,
                tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as kept,
            ):
                for member in arriving:
                    left_out += _take(arriving, member, kept, raw, without)
            raw.flush()
            os.fsync(raw.fileno())
            raw.seek(0)
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            size_bytes = raw.seek(0, os.SEEK_END)
        draft.replace(file)
    except tarfile.TarError as error:
        raise PermanentError(f"Docker's archive of the image cannot be read ({error}); nothing was changed") from error
    except OSError as error:
        raise PermanentError(f"the image could not be packed into {file}: {error}; nothing was changed") from error
    finally:
        draft.unlink(missing_ok=True)
    return Packed(FileRef(path=str(file), size_bytes=size_bytes, sha256=digest), left_out)


def pieces_of(file: Path, cancelled: threading.Event | None = None) -> Iterator[bytes]:
    """The contents of ``file``, to be loaded. Raises CancelledError."""
    with file.open("rb") as opened:
        while piece := opened.read(CHUNK_BYTES):
            _check(cancelled)
            yield piece


def _take(
    arriving: tarfile.TarFile, member: tarfile.TarInfo, kept: tarfile.TarFile, raw: IO[bytes], without: frozenset[str]
) -> int:
    """Copy one member; take it back if its contents turn out to be a layer that is not wanted."""
    contents = arriving.extractfile(member) if member.isreg() else None
    if contents is None:
        kept.addfile(member)
        return 0
    began = kept.offset
    counted = _Digesting(contents)
    with contextlib.closing(contents):
        kept.addfile(member, counted)
    if f"sha256:{counted.digest.hexdigest()}" not in without:
        return 0
    kept.offset = began
    raw.seek(began)
    raw.truncate()
    return member.size


class _Stream:
    """Pieces as a file that is read once, from the front."""

    def __init__(self, pieces: Iterable[bytes], cancelled: threading.Event | None) -> None:
        self._pieces = iter(pieces)
        self._rest = b""
        self._cancelled = cancelled

    def read(self, size: int) -> bytes:
        taken = [self._rest]
        have = len(self._rest)
        while have < size:
            _check(self._cancelled)
            piece = next(self._pieces, b"")
            if not piece:
                break
            taken.append(piece)
            have += len(piece)
        joined = b"".join(taken)
        self._rest = joined[size:]
        return joined[:size]


class _Digesting:
    """Computes the digest of what is read through it."""

    def __init__(self, contents: IO[bytes]) -> None:
        self._contents = contents
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._contents.read(size)
        self.digest.update(piece)
        return piece


def _check(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("the image is not wanted any more")
