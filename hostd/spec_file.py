"""Writes and reads the file that holds a container's specification.

The file holds environment values, so it has mode 0600 from its first byte on, and its contents never enter
an event: the event carries a FileRef, with which the reader on the other host checks what it fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from events.errors import PermanentError, TransientError
from events.schema import FileRef
from hostd.spec import MAX_SPEC_BYTES, ContainerSpec, decode_spec, encode_spec


def write_spec(file: Path, spec: ContainerSpec) -> FileRef:
    """Put ``spec`` in ``file``, durably and as a whole. Writing the same again is harmless.

    Raises PermanentError when it cannot be encoded, TransientError when the disk does not take it.
    """
    raw = encode_spec(spec)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise TransientError(f"the specification of {spec.name!r} could not be written to {file}: {error}") from error
    return FileRef(path=str(file), size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def read_spec(file: Path, expected: FileRef | None = None) -> ContainerSpec:
    """The specification in ``file``, which must be the very one that ``expected`` names.

    Raises TransientError when the file cannot be read, PermanentError when it is not that specification.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise TransientError(f"the container's specification {file} cannot be read: {error}") from error
    if expected is not None and hashlib.sha256(raw).hexdigest() != expected.sha256:
        raise PermanentError(
            f"the container's specification {file} is not the one that the source recorded; it was not used"
        )
    return decode_spec(raw)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
