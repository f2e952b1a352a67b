"""Digests of files' contents, for the comparison of two hosts' trees.

A digest says by which function it was made: BLAKE3's are framed as a multihash, bare ones are BLAKE2b-256, as manifests had
them before. So a host that compares takes the function that the other host took. BLAKE3, because reading everything again must
cost little beside having copied it: one processor does several gigabytes a second.

What it must never do: take a file that could not be read to its end for one that ends there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Protocol

from blake3 import blake3

from hostd.entry import BLAKE3_FRAME, DIGEST_BYTES

READ_BYTES = 512 * 1024
_buffers = threading.local()


class _State(Protocol):
    def update(self, part: memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


def alike(one: bytes, other: bytes) -> bool:
    """Whether both digests were made by the same function."""
    return len(one) == len(other)


def digest_of(contents: int, *, like: bytes = b"", stop: threading.Event | None = None) -> bytes:
    """The digest of an open file from its beginning on, by the function that made ``like``.

    ``contents`` is a descriptor, which stays open. Given up early, and then worthless, once ``stop`` is set. Raises OSError.
    """
    bare = len(like) == DIGEST_BYTES
    state: _State = hashlib.blake2b(digest_size=DIGEST_BYTES) if bare else blake3()
    buffer = getattr(_buffers, "own", None)
    if buffer is None:  # one for each thread: a new one for each file costs more than to read a small file
        buffer = _buffers.own = memoryview(bytearray(READ_BYTES))
    at = 0
    while (stop is None or not stop.is_set()) and (count := os.preadv(contents, [buffer], at)):
        state.update(buffer[:count])
        at += count
    return (b"" if bare else BLAKE3_FRAME) + state.digest()


def open_contents(file: bytes) -> int:
    """A descriptor of a regular file's contents by its path; -1 when it cannot be opened, as a name that is a symlink."""
    try:
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1


def digest_of_file(file: bytes, *, like: bytes = b"") -> bytes:
    """As ``digest_of``, of a regular file by its path; empty when it cannot be opened, as a name that is a symlink."""
    contents = open_contents(file)
    if contents < 0:
        return b""
    try:
        return digest_of(contents, like=like)
    finally:
        os.close(contents)
