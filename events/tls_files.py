"""The TLS files of a process that reaches etcd: read together, checked together, and noticed when they are replaced.

gRPC ends the whole process for a file that is cut, or a certificate that does not belong to its key. An operator who copies
a new certificate to its place makes such a moment, so nothing is handed over that was not looked at, as bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import ssl

Identity = tuple[tuple[int, ...], ...]


class TlsFilesError(Exception):
    """They cannot be used, now."""


class TlsFiles(NamedTuple):
    """PEM."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def identity(paths: Sequence[Path | None]) -> Identity:
    """What tells these files from those that take their places."""
    return tuple(_identity(path) for path in paths if path is not None)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def read(ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles:
    """The three of them. Raises TlsFilesError in words unless each is what it should be, and the key the certificate's."""
    if ca is None and cert is None:
        return TlsFiles(None, None, None)
    import ssl  # noqa: PLC0415 - some MiB that a process without TLS does without

    try:
        files = TlsFiles(*(None if path is None else path.read_bytes() for path in (ca, cert, key)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if files.ca is not None:
            context.load_verify_locations(cadata=files.ca.decode("ascii"))
        if files.cert is not None and files.key is not None:
            _check_pair(context, files.cert, files.key)
    except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
        names = ", ".join(str(path) for path in (ca, cert, key) if path is not None)
        raise TlsFilesError(f"{names}: {error}") from error
    return files


def _check_pair(context: ssl.SSLContext, cert: bytes, key: bytes) -> None:
    """By way of a file in memory, as ssl takes nothing but files."""
    descriptor = os.memfd_create("cargo-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, cert + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    finally:
        os.close(descriptor)
