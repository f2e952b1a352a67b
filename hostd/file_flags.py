"""Marks of files that no copy carries: immutable and append-only files, files encrypted or sealed by their file system,
project quotas. They are found and told, never set.

statx(2) shows them without opening anything, so a FIFO or a device is as harmless as a file. Stands before the first round:
a person reads there what the target's copy will lack.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

from hostd.manifest import escape

AT_SYMLINK_NOFOLLOW, AT_NO_AUTOMOUNT, AT_EMPTY_PATH = 0x100, 0x800, 0x1000
STATX_WORDS = 32
ATTRIBUTES_WORD = 1
"""``stx_attributes`` in ``struct statx``, https://man7.org/linux/man-pages/man2/statx.2.html"""
MARKS = {0x10: "immutable", 0x20: "append-only", 0x800: "encrypted by its file system", 0x100000: "sealed by fs-verity"}
FS_IOC_FSGETXATTR = 0x801C581F
FSXATTR = struct.Struct("=IIIII8x")
"""``struct fsxattr``: flags, extent sizes, extents, project id."""
MAX_PATH_CHARACTERS = 200

_ALL_MARKS = sum(MARKS)
_libc = ctypes.CDLL(None, use_errno=True)


def marks(directory: int, path: bytes, buffer: ctypes.Array[ctypes.c_uint64]) -> list[str]:
    """In words, what of the file ``path`` below the descriptor ``directory`` no copy carries; none of what is gone.

    ``buffer``, of STATX_WORDS, is written to: a new one for each of many files would take longer than the question.
    """
    flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | (0 if path else AT_EMPTY_PATH)
    if _libc.statx(directory, path, flags, 0, buffer) != 0:
        return []
    attributes = buffer[ATTRIBUTES_WORD]
    if not attributes & _ALL_MARKS:
        return []
    return [words for mark, words in MARKS.items() if attributes & mark]


def project(tree: str) -> int:
    """The project for whose quota the files in a directory count; 0 for none, or where there are no projects."""
    buffer = bytearray(FSXATTR.size)
    try:
        descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.ioctl(descriptor, FS_IOC_FSGETXATTR, buffer)
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return int(FSXATTR.unpack(buffer)[3])


class Uncarried:
    """What was found in one tree: a sentence for each mark, however many files have it. A context manager."""

    def __init__(self, tree: str) -> None:
        self._root = os.open(tree, os.O_PATH | os.O_CLOEXEC)
        self._tree = tree
        self._buffer = (ctypes.c_uint64 * STATX_WORDS)()
        self._found: dict[str, tuple[int, bytes]] = {}
        """By mark, how many files have it, and the first of them."""

    def __enter__(self) -> Uncarried:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root)

    def look(self, path: bytes) -> None:
        """Take note of the entry at ``path``, relative to the tree; empty for the tree itself."""
        for words in marks(self._root, path, self._buffer):
            count, first = self._found.get(words, (0, path))
            self._found[words] = (count + 1, first)

    def warnings(self, destination: str) -> list[str]:
        """In words, for a person who knows the tree by its ``destination`` in the container."""
        said = [
            f"{destination}: {count} {'entry is' if count == 1 else 'entries are'} {words}, which does not travel; the first: "
            f"{escape(first)[:MAX_PATH_CHARACTERS] or '.'}"
            for words, (count, first) in sorted(self._found.items())
        ]
        number = project(self._tree)
        if number:
            said.append(f"{destination}: its files count for the quota of project {number}, which does not travel")
        return said
