"""``docker save`` without the layers that the other host has: what of an image must travel.

Docker looks for a layer by its *chain id*, which covers the layers below it, and opens the archive only for what
it does not have. So what a host has of an image is a number of its lowest layers, however its other images are
made; the data of those can be left out, and ``docker load`` takes the rest.

containerd's store is another matter: it unpacks such an archive too, but keeps the archive's parts as they came, and an
image with parts missing runs and can never be packed again (``docker save`` then writes an archive without them and
says nothing). So a host with that store says which layers its other images can give, and puts them back into the archive
(``complete``) before it is loaded.

Which member of the archive is which layer follows from contents alone: a layer's id is the SHA-256 of its tar, of
the unpacked one if it is compressed (gzip; what is compressed otherwise merely travels whole). So the layouts of all
Docker versions are read alike. Used by the effects ``pack_image`` (source) and ``provide_image`` (target).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import shutil
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import msgspec

from events.errors import CancelledError, PermanentError
from events.schema import FileRef

if TYPE_CHECKING:
    from zlib import _Decompress as Inflate

CHUNK_BYTES = 1024 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
GZIP_MAGIC = b"\x1f\x8b"
GZIP = 31
"""zlib's number for a gzip header around the largest window."""
INFLATE_BYTES = 16 * 1024
"""At a time: it becomes a thousand times as much at worst."""
LAYER_FILE = "layer.tar"
"""What every layer is called, in a directory of its own, by engines before 25."""


class _Manifest(msgspec.Struct, frozen=True):
    """An entry of ``manifest.json``, which every version writes: where each layer is, lowest first."""

    layers: tuple[str, ...] = msgspec.field(name="Layers")


@dataclass(frozen=True)
class Packed:
    """An archive that was written, and what was left out of it."""

    archive: FileRef
    left_out_bytes: int


def layers_present(wanted: Sequence[str], layers: Sequence[str]) -> int:
    """How many of the lowest layers of ``wanted`` another image with ``layers`` has. Diff ids, lowest first."""
    common = 0
    for one, other in zip(wanted, layers, strict=False):
        if one != other:
            break
        common += 1
    return common


@dataclass(frozen=True)
class Held:
    """What an archive holds: the digests of its members as they are, and of those that are compressed, unpacked."""

    stored: frozenset[str]
    plain: frozenset[str]


def held_in(pieces: Iterable[bytes], cancelled: threading.Event | None = None) -> Held:
    """The digests in the ``docker save`` stream ``pieces``. Raises PermanentError, CancelledError."""
    stored, plain = set(), set()
    with _reading(pieces, cancelled) as arriving:
        for member in arriving:
            contents = arriving.extractfile(member) if member.isreg() else None
            if contents is not None:
                counted = _Digesting(contents)
                while counted.read(CHUNK_BYTES):
                    pass
                stored.add(counted.stored)
                plain.add(counted.plain)
    return Held(frozenset(stored), frozenset(plain))


def layers_to_leave_out(layers: Sequence[str], present: Sequence[str]) -> frozenset[str]:
    """Those of ``layers`` whose data need not travel to a host that has ``present``, its lowest ones.

    The same data may stand in an image twice (an empty layer often does); what is needed further up must travel.
    Raises PermanentError when ``present`` is not how the image begins.
    """
    if tuple(layers[: len(present)]) != tuple(present):
        raise PermanentError("the target says it has layers that are not the lowest of this image; nothing was packed")
    return frozenset(present) - frozenset(layers[len(present) :])


def pack(
    pieces: Iterable[bytes],
    file: Path,
    without: frozenset[str],
    cancelled: threading.Event | None = None,
    *,
    blobs: Sequence[str] | None = None,
) -> Packed:
    """Write the ``docker save`` stream ``pieces`` to ``file``, durably and as a whole, without these layers.

    ``without`` are diff ids. With ``blobs`` a compressed layer stays out only if its own digest is among them.
    Raises PermanentError when the stream is no tar archive or the disk does not take it, CancelledError; what
    ``pieces`` raises, passes.
    """
    draft = file.with_name(f".{file.name}.part")
    left_out = 0
    try:
        with draft.open("w+b") as raw:
            os.chmod(draft, 0o600)
            with (
                _reading(pieces, cancelled) as arriving,
                tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as kept,
            ):
                for member in arriving:
                    left_out += _take(arriving, member, kept, raw, without, blobs)
            raw.flush()
            os.fsync(raw.fileno())
            raw.seek(0)
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            size_bytes = raw.seek(0, os.SEEK_END)
        draft.replace(file)
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


def complete(
    file: Path, layers: Sequence[str], pieces: Iterable[bytes], cancelled: threading.Event | None = None
) -> int:
    """Put the layers that were left out of the archive ``file`` back in, from another image that has them.

    ``layers`` are the diff ids of the image in ``file``, ``pieces`` the ``docker save`` stream of the other one.
    Returns how many were put back. Raises PermanentError when one is not there; CancelledError.
    """
    lacking = layers_missing(file, layers)
    found = 0
    with _reading(pieces, cancelled) as arriving:
        for member in arriving:
            contents = arriving.extractfile(member) if member.isreg() and lacking else None
            if contents is None:
                continue
            with tempfile.TemporaryFile(dir=file.parent) as kept, tempfile.TemporaryFile(dir=file.parent) as unpacked:
                counted = _Digesting(contents, unpacked)
                shutil.copyfileobj(counted, kept, CHUNK_BYTES)
                for name, layer in list(lacking.items()):
                    asked = name.rpartition("/")[2]
                    if counted.stored == f"sha256:{asked}":
                        found += _append(file, name, kept)
                    elif counted.plain == layer and asked in (layer.removeprefix("sha256:"), LAYER_FILE):
                        found += _append(file, name, unpacked if counted.packed else kept)
                    else:
                        continue
                    del lacking[name]
    if lacking:
        raise PermanentError(
            f"layers of the image that were here when it was asked for are gone ({', '.join(lacking.values())}); "
            "nothing was loaded"
        )
    return found


def layers_missing(file: Path, layers: Sequence[str]) -> dict[str, str]:
    """The layers that the archive speaks of and does not have: the diff id of each, by its member's name.

    ``layers`` are all diff ids of the image. Raises PermanentError when the archive is of another one.
    """
    try:
        with tarfile.open(file) as tar:
            members = {posixpath.normpath(member.name): member for member in tar}
            described = members.get("manifest.json")
            contents = tar.extractfile(described) if described is not None and described.isreg() else None
            if contents is None:
                raise PermanentError("the archive of the image has no manifest; nothing was loaded")
            (manifest,) = msgspec.json.decode(contents.read(MAX_MANIFEST_BYTES), type=list[_Manifest])
    except (tarfile.TarError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PermanentError(f"the archive of the image cannot be read ({error}); nothing was loaded") from error
    if len(manifest.layers) != len(layers):
        raise PermanentError("the archive is not of the image that it should be; nothing was loaded")
    lacking = {}
    for raw, layer in zip(manifest.layers, layers, strict=True):
        name = posixpath.normpath(raw)
        link = members.get(name)
        if link is not None and link.issym():  # the same data twice: the second is a link to the first
            name = posixpath.normpath(posixpath.join(posixpath.dirname(name), link.linkname))
        if name.startswith(("/", "../")):
            raise PermanentError(f"the archive of the image has a layer in an impossible place ({name!r})")
        if name not in members:
            lacking[name] = layer
    return lacking


def _append(file: Path, name: str, contents: IO[bytes]) -> int:
    member = tarfile.TarInfo(name)
    member.size = contents.seek(0, os.SEEK_END)
    contents.seek(0)
    with tarfile.open(file, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, contents)
    return 1


def _take(
    arriving: tarfile.TarFile,
    member: tarfile.TarInfo,
    kept: tarfile.TarFile,
    raw: IO[bytes],
    without: frozenset[str],
    blobs: Sequence[str] | None,
) -> int:
    """Copy one member; take it back if its contents turn out to be a layer that is not wanted."""
    contents = arriving.extractfile(member) if member.isreg() else None
    if contents is None:
        kept.addfile(member)
        return 0
    began = kept.offset
    counted = _Digesting(contents)
    with contextlib.closing(contents):
        kept.addfile(member, cast(IO[bytes], counted))
    if counted.plain not in without or (counted.packed and blobs is not None and counted.stored not in blobs):
        return 0
    kept.offset = began
    raw.seek(began)
    raw.truncate()
    return member.size


@contextlib.contextmanager
def _reading(pieces: Iterable[bytes], cancelled: threading.Event | None) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=cast(IO[bytes], _Stream(pieces, cancelled)), mode="r|") as arriving:
            yield arriving
    except tarfile.TarError as error:
        raise PermanentError(f"Docker's archive of the image cannot be read ({error}); nothing was changed") from error


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
    """Computes the digests of what is read through it, and writes what is compressed in it to ``unpacked``."""

    def __init__(self, contents: IO[bytes], unpacked: IO[bytes] | None = None) -> None:
        self._contents = contents
        self._unpacked = unpacked
        self._stored = hashlib.sha256()
        self._plain = hashlib.sha256()
        self._inflate: Inflate | None = None
        self._began = False
        self._broken = False

    @property
    def stored(self) -> str:
        """``sha256:…`` of the contents as they are."""
        return f"sha256:{self._stored.hexdigest()}"

    @property
    def packed(self) -> bool:
        """Whether they are compressed, and intact to the end."""
        return self._inflate is not None and not self._broken and self._inflate.eof

    @property
    def plain(self) -> str:
        """``sha256:…`` of the contents, unpacked if they are compressed."""
        return f"sha256:{self._plain.hexdigest()}" if self.packed else self.stored

    def read(self, size: int = -1) -> bytes:
        piece = self._contents.read(size)
        self._stored.update(piece)
        if not self._began and piece:
            self._began = True
            self._inflate = zlib.decompressobj(GZIP) if piece.startswith(GZIP_MAGIC) else None
        if self._inflate is not None and not self._broken:
            self._unpack(piece)
        return piece

    def _unpack(self, piece: bytes) -> None:
        try:
            for start in range(0, len(piece), INFLATE_BYTES):
                rest = piece[start : start + INFLATE_BYTES]
                while rest:
                    if self._inflate is None or self._inflate.eof:  # it may be several, one behind the other
                        self._inflate = zlib.decompressobj(GZIP)
                    out = self._inflate.decompress(rest)
                    self._plain.update(out)
                    if self._unpacked is not None:
                        self._unpacked.write(out)
                    rest = self._inflate.unused_data
        except zlib.error:
            self._broken = True


def _check(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("the image is not wanted any more")
