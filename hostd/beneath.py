"""Opening things beneath a directory without ever leaving it.

Names come from another host, so a path may name a symlink where a directory was expected, or a directory
may turn into a symlink between two looks. Every descent here is one ``openat2`` (Linux 5.6) that refuses
symlinks, ``..`` and mount points on the way, relative to a descriptor of the tree's root. What it must never
do: resolve a path of the data as a string.

Stands below ``hostd/placement.py`` and ``hostd/federation.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_OPENAT2 = 437
_LISTXATTRAT = 465
_AT_SYMLINK_NOFOLLOW = 0x100
_RESOLVE = 0x01 | 0x04 | 0x08
"""RESOLVE_NO_XDEV, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH of openat2(2)."""
_RENAME_EXCHANGE = 2
_STATX_BTIME = 0x800
_PATH_CHUNK_BYTES = 3500
"""The kernel takes at most 4095 bytes at once; a deeper path is walked in pieces."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _Statx(ctypes.Structure):
    """The beginning of statx(2)'s answer, and room for the rest of its 256 bytes."""

    _fields_ = (
        ("mask", ctypes.c_uint32), ("before", ctypes.c_uint8 * 76), ("birth_seconds", ctypes.c_int64),
        ("birth_nanoseconds", ctypes.c_uint32), ("after", ctypes.c_uint8 * 164),
    )  # fmt: skip


def open_beneath(root: int, path: bytes, flags: int = _DIRECTORY) -> int:
    """Open ``path`` (relative, ``b""`` is the root itself) beneath the descriptor ``root``.

    Raises OSError: ELOOP for a symlink on the way, EXDEV for a mount point, ENOTDIR, ENOENT.
    """
    at, held = root, -1
    try:
        pieces = list(_pieces(path))
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            at, previous = _openat2(at, piece or b".", flags if last else _DIRECTORY), held
            if previous >= 0:
                os.close(previous)
            held = at
    except BaseException:
        if held >= 0:
            os.close(held)
        raise
    return at


def _pieces(path: bytes) -> Iterator[bytes]:
    while len(path) > _PATH_CHUNK_BYTES:
        cut = path.rfind(b"/", 0, _PATH_CHUNK_BYTES)
        if cut <= 0:
            break
        yield path[:cut]
        path = path[cut + 1 :]
    yield path


def _openat2(at: int, path: bytes, flags: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE)
    for _ in range(100):
        descriptor = _libc.syscall(_OPENAT2, at, path, ctypes.byref(how), ctypes.sizeof(how))
        if descriptor >= 0:
            return int(descriptor)
        code = ctypes.get_errno()
        # EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
        if code != errno.EAGAIN:
            raise OSError(code, os.strerror(code), path)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


class Beneath:
    """A tree, addressed by relative byte paths. The last used directory stays open; not for several threads."""

    def __init__(self, root: Path | bytes) -> None:
        self.root = os.open(root, _DIRECTORY)
        self.device = os.fstat(self.root).st_dev
        self._path: bytes | None = None
        self._directory = -1

    def __enter__(self) -> Beneath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.forget()
        os.close(self.root)

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory, valid until the next call. Raises OSError."""
        if self._path != path:
            self.forget()
            self._directory = open_beneath(self.root, path)
            self._path = path
        return self._directory

    def forget(self) -> None:
        """Drop the cached directory, because it may have been replaced."""
        if self._path is not None:
            os.close(self._directory)
            self._path = None

    def locate(self, path: bytes) -> tuple[int, bytes]:
        """Descriptor of the parent directory and name in it. The tree's root has neither: use ``.``."""
        if not path:
            return self.root, b"."
        parent, name = os.path.split(path)
        return self.directory(parent), name

    def stat(self, path: bytes) -> os.stat_result | None:
        """``lstat``; None when there is nothing, or no directory on the way to it."""
        try:
            at, name = self.locate(path)
            return os.stat(name, dir_fd=at, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise

    def make_parents(self, path: bytes, mode: int = 0o700) -> None:
        """Create the missing directories above ``path``."""
        missing = []
        parent = os.path.dirname(path)
        while parent and self.stat(parent) is None:
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            at, name = self.locate(directory)
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=at)

    def directories(self) -> dict[bytes, int]:
        """The inode number of every directory below the root, by path. Never enters a mount point; looks at nothing else."""
        found: dict[bytes, int] = {}
        queue = [b""]
        while queue:
            path = queue.pop()
            at = self.directory(path)
            with os.scandir(b"/proc/self/fd/%d" % at) as children:
                names = [child.name for child in children if child.is_dir(follow_symlinks=False)]
            for name in names:
                seen = os.stat(name, dir_fd=at, follow_symlinks=False)
                below = path + b"/" + name if path else name
                found[below] = seen.st_ino
                if seen.st_dev == self.device:
                    queue.append(below)
        return found

    def walk(self, start: bytes = b"") -> Iterator[tuple[bytes, list[tuple[bytes, os.stat_result]]]]:
        """The path of each directory from ``start`` down, with its entries (name, lstat), parents first.

        Never enters a mount point.
        """
        queue = [start]
        while queue:
            path = queue.pop()
            at = self.directory(path)
            entries = []
            for name in sorted(os.listdir(b"/proc/self/fd/%d" % at)):
                seen = os.stat(name, dir_fd=at, follow_symlinks=False)
                entries.append((name, seen))
                if stat.S_ISDIR(seen.st_mode) and seen.st_dev == self.device:
                    queue.append(path + b"/" + name if path else name)
            yield path, entries


def reach(at: int, name: bytes) -> bytes:
    """A path for the calls that take no directory descriptor (xattrs, chmod)."""
    return b"/proc/self/fd/%d/%s" % (at, name)


def certainly_bare(at: int, name: bytes) -> bool:
    """Whether ``name`` in the directory ``at`` has no extended attribute at all; False where this does not tell.

    listxattrat(2) of Linux 6.13, asked for the length only. ``reach`` leads through /proc, which takes three times as long.
    """
    return _has_listxattrat() and _libc.syscall(_LISTXATTRAT, at, name, _AT_SYMLINK_NOFOLLOW, None, 0) == 0


@functools.cache
def _has_listxattrat() -> bool:
    return _libc.syscall(_LISTXATTRAT, -1, b"x", 0, None, 0) < 0 and ctypes.get_errno() == errno.EBADF


def exchange(first: Path | bytes, second: Path | bytes) -> None:
    """Swap two names of one file system in a single step (renameat2(2), RENAME_EXCHANGE). Raises OSError."""
    at = -100  # AT_FDCWD
    if _libc.renameat2(at, os.fsencode(first), at, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(first))


def born_ns(path: Path) -> int | None:
    """When what ``path`` names, itself, was made (statx(2)), which nothing changes later. None: not kept here. Raises OSError.

    With the inode's number it tells a thing from a later one that got the same number.
    """
    answer = _Statx()
    at, no_follow = -100, 0x100  # AT_FDCWD, AT_SYMLINK_NOFOLLOW
    if _libc.statx(at, os.fsencode(path), no_follow, _STATX_BTIME, ctypes.byref(answer)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    if not answer.mask & _STATX_BTIME:
        return None
    return int(answer.birth_seconds) * 10**9 + int(answer.birth_nanoseconds)


def remove_tree(at: int, name: bytes, trash: Path) -> None:
    """Remove a file or a whole subtree; nothing when it is not there.

    Subdirectories are first moved flat into ``trash`` (same file system), so neither depth nor path length
    matters, and a mount point anywhere below stops the removal (the kernel refuses to move it): what lies
    behind a mount is never touched. Raises OSError (EBUSY, EXDEV).
    """
    try:
        seen = os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(seen.st_mode):
        os.unlink(name, dir_fd=at)
        return
    trash.mkdir(mode=0o700, exist_ok=True)
    bin_directory = os.open(trash, _DIRECTORY)
    try:
        if os.fstat(bin_directory).st_dev != seen.st_dev:
            raise OSError(errno.EXDEV, "a mount point is in the way", name)
        os.rename(name, os.urandom(8).hex().encode(), src_dir_fd=at, dst_dir_fd=bin_directory)
        empty_directory(bin_directory)
    finally:
        os.close(bin_directory)


def empty_directory(directory: int) -> None:
    """Remove everything in a directory, keeping it. Constant depth of descriptors, see ``remove_tree``."""
    while names := os.listdir(b"/proc/self/fd/%d" % directory):
        for name in names:
            if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=directory)
                continue
            inner = open_beneath(directory, name)  # EXDEV for a mount point, also for a bind of this very disk
            try:
                for child in os.listdir(b"/proc/self/fd/%d" % inner):
                    if stat.S_ISDIR(os.stat(child, dir_fd=inner, follow_symlinks=False).st_mode):
                        parked = b"." + os.urandom(8).hex().encode()
                        os.rename(child, parked, src_dir_fd=inner, dst_dir_fd=directory)
                    else:
                        os.unlink(child, dir_fd=inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=directory)
