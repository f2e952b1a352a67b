"""Manifests: exact descriptions of a data tree, made on one host and obeyed or compared on another.

A manifest file is a header, one record for each entry, an empty record, and a trailer that shows whether
anything is missing or changed; each record is MessagePack after its length in 4 bytes, big-endian. In a
manifest of a whole tree parents come before children, in the order of ``order_key``; a dirty manifest
also lists every ancestor directory of whatever it lists.

What this module must never do: believe a record that came from another host before it was checked, or leave a
half-written manifest under its final name. It is also the one place from which the rest of the subject is
imported: entries (``hostd/entry.py``), looking at trees (``hostd/tree_walk.py``) and comparing them
(``hostd/tree_compare.py``).

Flow: the source's tracker publishes dirty manifests, ``hostd/placement.py`` applies them on the target, and
after the fill both sides' full manifests are compared.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec

from events.errors import PermanentError
from events.schema import FileRef
from hostd.entry import DIGEST_BYTES, Entry, entry_problem, escape, order_key, unsupported
from hostd.tree_compare import Difference, TreeSum, compare, differences, tree_digest
from hostd.tree_walk import observe, observe_all, usage, walk

__all__ = [
    "MAX_RECORD_BYTES",
    "Difference",
    "Entry",
    "TreeSum",
    "compare",
    "decode_manifest",
    "differences",
    "escape",
    "observe",
    "observe_all",
    "order_key",
    "read_manifest",
    "tree_digest",
    "unsupported",
    "usage",
    "walk",
    "write_manifest",
]

MAX_RECORD_BYTES = 1024 * 1024
"""Of one record. The longest honest one is a path of some kilobytes with a few xattrs of 64 KiB each."""

_FORMAT = "cargo-manifest"
_VERSION = 1
_LENGTH_BYTES = 4
_BUFFER_BYTES = 256 * 1024


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    format: str
    version: int


class _Trailer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """After an empty record. It shows a manifest that was cut, even exactly between two records."""

    entries: int
    digest: bytes
    """BLAKE2b-256 of everything before the empty record."""


_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(_Header)
_entry_decoder = msgspec.msgpack.Decoder(Entry)
_trailer_decoder = msgspec.msgpack.Decoder(_Trailer)


def write_manifest(file: Path, entries: Iterable[Entry]) -> FileRef:
    """Store ``entries`` durably at ``file`` (mode 0600), all or nothing; whatever was there is replaced.

    Raises PermanentError when an entry cannot be in a manifest or the file cannot be written.
    """
    waiting = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    total, size_bytes = hashlib.sha256(), 0
    try:
        descriptor = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES) as stream:
                for part in _encoded(entries):
                    total.update(part)
                    size_bytes += len(part)
                    stream.write(part)
                stream.flush()
                os.fsync(descriptor)
            waiting.replace(file)
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise PermanentError(
            f"the manifest {file} cannot be written: {error.strerror}. The container's data was not touched; "
            "make room or mend the file system, then try again."
        ) from error
    return FileRef(path=str(file), size_bytes=size_bytes, sha256=total.hexdigest())


def _encoded(entries: Iterable[Entry]) -> Iterator[bytes]:
    state, count = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    part = _record(_encoder.encode(_Header(_FORMAT, _VERSION)))
    state.update(part)
    yield part
    for entry in entries:
        problem = entry_problem(entry)
        raw = _encoder.encode(entry)
        if not problem and len(raw) > MAX_RECORD_BYTES:
            problem = f"its path and attributes take {len(raw)} bytes, over the limit of {MAX_RECORD_BYTES}"
        if problem:
            raise PermanentError(f"{escape(entry.path)} cannot be listed in a manifest: {problem}")
        part = _record(raw)
        state.update(part)
        count += 1
        yield part
    yield _record(b"") + _record(_encoder.encode(_Trailer(count, state.digest())))


def _record(raw: bytes) -> bytes:
    return len(raw).to_bytes(_LENGTH_BYTES, "big") + raw


def read_manifest(file: Path) -> Iterator[Entry]:
    """The entries of a manifest file, each one checked.

    Raises PermanentError for a file that is missing, damaged, cut or hostile; the damage may show only after
    good entries were yielded, so act on the whole or compare the FileRef's SHA-256 first.
    """
    try:
        with file.open("rb", buffering=_BUFFER_BYTES) as stream:
            yield from _decoded(stream, str(file))
    except OSError as error:
        raise PermanentError(f"the manifest {file} cannot be read: {error.strerror}") from error


def decode_manifest(raw: bytes) -> Iterator[Entry]:
    """As ``read_manifest``, from memory."""
    return _decoded(io.BytesIO(raw), "received in an event")


def _decoded(stream: BinaryIO, origin: str) -> Iterator[Entry]:
    state, count = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    try:
        raw = _next_record(stream)
        if _header_decoder.decode(raw) != _Header(_FORMAT, _VERSION):
            _damaged(f"its format is not {_FORMAT} {_VERSION}, the one known here")
        state.update(_record(raw))
        while raw := _next_record(stream):
            entry = _entry_decoder.decode(raw)
            problem = entry_problem(entry)
            if problem:
                _damaged(f"{escape(entry.path[:1000])}: {problem}")
            state.update(_record(raw))
            count += 1
            yield entry
        trailer = _trailer_decoder.decode(_next_record(stream))
        if trailer != _Trailer(count, state.digest()) or stream.read(1):
            _damaged("its end does not fit what stands before it")
    except (_DamagedError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PermanentError(
            f"the manifest {origin} is damaged or was not made by Cargo, and is not used "
            f"(after {count} entries: {error})"
        ) from error


def _damaged(why: str) -> NoReturn:
    raise _DamagedError(why)


class _DamagedError(Exception):
    pass


def _next_record(stream: BinaryIO) -> bytes:
    prefix = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(prefix, "big")
    if length > MAX_RECORD_BYTES:
        raise _DamagedError(f"a record of {length} bytes is over the limit of {MAX_RECORD_BYTES}")
    raw = stream.read(length)
    if len(prefix) < _LENGTH_BYTES or len(raw) < length:
        raise _DamagedError("it ends in the middle")
    return raw
