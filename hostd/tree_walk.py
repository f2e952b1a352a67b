"""Looking at a data tree: one path, all of it, or how large it is.

What it must never do: follow a symlink of the data, cross into another mount, change anything (access times
included, where the kernel lets us), or take a tree that cannot be found for an empty one.

Flow: makes the entries that ``hostd/manifest.py`` stores; used by the tracker on the source, and on both
sides for the comparison after the fill.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from events.errors import PermanentError
from hostd.beneath import certainly_bare, open_beneath, reach
from hostd.digests import digest_of
from hostd.entry import Entry, escape, path_problem

_OPEN_DIRECTORIES = 64
"""Descriptors a walk holds at once. A deeper tree costs re-opening, never a want of descriptors."""
_SMALL_BYTES = 256 * 1024
"""A file up to this size is digested where it was found, a larger one by a thread."""
_PENDING = 4096
"""So many entries at most wait for a large file before them to be read."""
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.EXDEV})
"""What says that a path is not in the tree (any more). ELOOP: a directory on the way became a symlink;
EXDEV: it became a mount point, and what lies behind that is not of this tree."""
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_KIND_OF = {
    stat.S_IFDIR: "d",
    stat.S_IFREG: "f",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}


class _Seen(NamedTuple):
    """A path just looked at, with the directory that it is in: valid until the scan goes on."""

    path: bytes
    at: int
    name: bytes
    """In ``at``; empty when ``at`` is the thing itself."""
    status: os.stat_result


def observe(tree: Path | bytes, path: bytes) -> Entry:
    """The entry of one path now, without its contents' digest.

    Raises FileNotFoundError when it is not there (or no longer reached without symlinks and mount points),
    PermanentError when the tree itself is missing or the path cannot be examined.
    """
    entry = next(observe_all(tree, (path,)))
    if entry.kind == "-":
        raise FileNotFoundError(errno.ENOENT, "not in the tree", escape(path))
    return entry


def observe_all(tree: Path | bytes, paths: Iterable[bytes]) -> Iterator[Entry]:
    """The entry of each path, of kind ``-`` where nothing is. Quickest when the paths come sorted.

    Raises PermanentError as ``observe`` does.
    """
    with _root(tree) as root:
        parent, at = b"", root
        try:
            for path in paths:
                problem = path_problem(path)
                if problem:
                    raise PermanentError(f"{escape(path)} was not examined: {problem}")
                above, name = os.path.split(path)
                try:
                    if above != parent:
                        opened = open_beneath(root, above, _HANDLE | os.O_DIRECTORY)
                        if at != root:
                            os.close(at)
                        parent, at = above, opened
                    yield _entry(_look(at, path, name))
                except OSError as error:
                    if error.errno not in _GONE:
                        raise _unreadable(tree, path, error) from error
                    yield Entry(path=path, kind="-")
        finally:
            if at != root:
                os.close(at)


def _look(at: int, path: bytes, name: bytes) -> _Seen:
    status = os.stat(name, dir_fd=at, follow_symlinks=False) if name else os.fstat(at)
    return _Seen(path, at, name, status)


@contextlib.contextmanager
def _root(tree: Path | bytes) -> Iterator[int]:
    """A descriptor of the tree's root: a directory, or the file that a bind mount is of."""
    try:
        root = os.open(tree, _HANDLE)
    except OSError as error:
        raise PermanentError(
            f"the data tree {escape(os.fsencode(tree))} cannot be opened: {error.strerror}. It is not taken "
            "for empty; nothing was changed. See whether it was moved or unmounted."
        ) from error
    try:
        if stat.S_ISLNK(os.fstat(root).st_mode):
            raise PermanentError(
                f"the data tree {escape(os.fsencode(tree))} is a symbolic link, which is never followed; "
                "give the path that it leads to"
            )
        yield root
    finally:
        os.close(root)


def _unreadable(tree: Path | bytes, path: bytes, error: OSError) -> PermanentError:
    return PermanentError(
        f"{escape(path)} in {escape(os.fsencode(tree))} cannot be examined: {error.strerror}. Nothing was "
        "changed, but what is there cannot be carried or verified until this is mended."
    )


def _entry(seen: _Seen, contents: int = -1) -> Entry:
    """``contents``: a descriptor of it, where there is one. Raises OSError, also when the thing vanished meanwhile."""
    path, at, name, status = seen
    mode = status.st_mode
    kind = _KIND_OF[stat.S_IFMT(mode)]
    regular = kind == "f"
    return Entry(
        path=path,
        kind=kind,
        mode=mode & 0o7777,
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if regular else 0,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev if kind in "cb" else 0,
        link_target=os.readlink(name, dir_fd=at) if kind == "l" else b"",
        xattrs=_xattrs(at, name) if contents < 0 else _pairs(contents),
        link_group=status.st_ino if status.st_nlink > 1 and kind != "d" else 0,
        blocks=status.st_blocks,
    )


def _xattrs(at: int, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    # An O_PATH descriptor has no xattr calls of its own; its name in /proc leads to exactly that inode.
    if not name:
        return _pairs(b"/proc/self/fd/%d" % at)
    return () if certainly_bare(at, name) else _pairs(reach(at, name), follow_symlinks=False)


def _pairs(place: bytes | int, *, follow_symlinks: bool = True) -> tuple[tuple[bytes, bytes], ...]:
    """The extended attributes of a path or a descriptor, sorted by name. Raises OSError."""
    try:
        names = os.listxattr(place, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return ()
        raise
    if not names:
        return ()
    pairs = []
    for key in sorted(map(os.fsencode, names)):
        try:
            pairs.append((key, os.getxattr(place, key, follow_symlinks=follow_symlinks)))
        except OSError as error:
            if error.errno != errno.ENODATA:  # removed since it was listed
                raise
    return tuple(pairs)


# --- walking a tree ----------------------------------------------------------------------------


def walk(tree: Path | bytes, *, digest: bool = False, workers: int = 2, start: bytes = b"") -> Iterator[Entry]:
    """Every entry from ``start`` down, parents first, in the order of ``order_key``.

    What vanishes during the walk is left out. A directory that is a mount point is listed, but not entered.
    ``digest`` adds the digests of regular files, taken by ``workers`` threads. Memory: the names in the
    directories on the way to the present one. Raises PermanentError when the tree is missing or something in
    it cannot be read; a missing ``start`` in an existing tree yields nothing.
    """
    problem = path_problem(start)
    if problem:
        raise PermanentError(f"{escape(start)} was not examined: {problem}")
    if digest:
        yield from _walk_digesting(tree, start, max(1, workers))
        return
    with _root(tree) as root, contextlib.closing(_scan(tree, root, start)) as scan:
        for seen in scan:
            try:
                yield _entry(seen)
            except OSError as error:
                if error.errno not in _GONE:
                    raise _unreadable(tree, seen.path, error) from error


class _Frame:
    """A directory of which some names are still to be visited."""

    __slots__ = ("descriptor", "names", "path")

    def __init__(self, path: bytes, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        """-1 while it is closed to save descriptors."""
        self.names = sorted(os.listdir(b"/proc/self/fd/%d" % descriptor), reverse=True)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _scan(tree: Path | bytes, root: int, start: bytes) -> Generator[_Seen, None, None]:
    """``lstat`` of everything from ``start`` down."""
    device = os.fstat(root).st_dev
    frames: list[_Frame] = []
    path = start
    try:
        yield from _begin(frames, root, start, device)
        while frames:
            frame = frames[-1]
            try:
                if frame.descriptor < 0 and frame.names:
                    path = frame.path
                    frame.descriptor = open_beneath(root, path)
                at, names, prefix = frame.descriptor, frame.names, frame.path + b"/" if frame.path else b""
                while names and frames[-1] is frame:
                    name = names.pop()
                    path = prefix + name
                    seen = _Seen(path, at, name, os.stat(name, dir_fd=at, follow_symlinks=False))
                    yield seen
                    _descend(frames, seen, device)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                if frame.descriptor < 0:  # it vanished while deeper levels were visited
                    frame.names.clear()
            if not frame.names and frames[-1] is frame:
                frames.pop().close()
    except OSError as error:
        raise _unreadable(tree, path, error) from error
    finally:
        for frame in frames:
            frame.close()


def _begin(frames: list[_Frame], root: int, start: bytes, device: int) -> Iterator[_Seen]:
    """The first path of a scan. Raises OSError."""
    above, name = os.path.split(start)
    try:
        at = open_beneath(root, above, _HANDLE | os.O_DIRECTORY) if above else os.dup(root)
        try:
            seen = _look(at, start, name)
            yield seen
            _descend(frames, seen, device)
        finally:
            os.close(at)
    except OSError as error:
        if error.errno not in _GONE:
            raise


def _descend(frames: list[_Frame], seen: _Seen, device: int) -> None:
    """Push a frame for a directory, unless it is a mount point. Raises OSError."""
    if not stat.S_ISDIR(seen.status.st_mode) or seen.status.st_dev != device:
        return
    # A bind mount of the same disk has the same st_dev; for that one this raises EXDEV.
    descriptor = open_beneath(seen.at, seen.name)
    try:
        frame = _Frame(seen.path, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    frames.append(frame)
    if len(frames) > _OPEN_DIRECTORIES:
        frames[-1 - _OPEN_DIRECTORIES].close()


def usage(tree: Path | bytes) -> tuple[int, int, int]:
    """(bytes, regular files, inodes) of a tree, a quick look without xattrs or contents.

    Bytes are the apparent sizes of the regular files, because a copy may lose sparseness; several names of
    one inode count once in all three numbers. Raises PermanentError as ``walk`` does.
    """
    size_bytes = files = inodes = 0
    linked: set[int] = set()
    with _root(tree) as root, contextlib.closing(_scan(tree, root, b"")) as scan:
        for seen in scan:
            status = seen.status
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if status.st_ino in linked:
                    continue
                linked.add(status.st_ino)
            inodes += 1
            if stat.S_ISREG(status.st_mode):
                files += 1
                size_bytes += status.st_size
    return size_bytes, files, inodes


# --- digests -----------------------------------------------------------------------------------


def _walk_digesting(tree: Path | bytes, start: bytes, workers: int) -> Iterator[Entry]:
    def unreadable(entry: Entry, error: OSError) -> PermanentError:
        return _unreadable(tree, entry.path, error)

    with contextlib.closing(walk_opened(tree, start=start)) as opened:
        yield from with_digests(opened, unreadable, workers)


def walk_opened(tree: Path | bytes, *, start: bytes = b"") -> Generator[tuple[Entry, int], None, None]:
    """As ``walk``, each entry with a descriptor of its contents, which is the caller's to close; -1 if it is no regular file."""
    with _root(tree) as root, contextlib.closing(_scan(tree, root, start)) as scan:
        yield from _opened(tree, scan)


def with_digests(
    opened: Iterator[tuple[Entry, int]], unreadable: Callable[[Entry, OSError], PermanentError], workers: int = 2
) -> Iterator[Entry]:
    """The entries in their order, with digests. Each comes with a descriptor of its contents, which is closed here, or -1.

    Large files are read by threads, small ones at once: to hand one over costs more than to read it. What cannot
    be read raises what ``unreadable`` makes of it; what has vanished is left out.
    """
    stop = threading.Event()
    pending: deque[Entry | Future[Entry | None] | None] = deque()
    reading = 0

    def finished(*, all_of_them: bool) -> Iterator[Entry]:
        nonlocal reading
        while pending:
            head = pending[0]
            if isinstance(head, Future):
                many = reading > 2 * workers or len(pending) > _PENDING
                if not (all_of_them or many or head.done()):
                    return
                reading -= 1
                head = head.result()
            pending.popleft()
            if head is not None:
                yield head

    with ThreadPoolExecutor(workers, thread_name_prefix="digest") as pool:
        try:
            for entry, contents in opened:
                if contents >= 0 and entry.size > _SMALL_BYTES:
                    reading += 1
                    pending.append(pool.submit(_digested, entry, contents, unreadable, stop))
                else:
                    known = _digested(entry, contents, unreadable, stop) if contents >= 0 else entry
                    if not pending:  # nearly always
                        if known is not None:
                            yield known
                        continue
                    pending.append(known)
                yield from finished(all_of_them=False)
            yield from finished(all_of_them=True)
        finally:
            # When given up early, what still waits runs through at once, and so closes its descriptors.
            stop.set()


def _digested(
    entry: Entry, contents: int, unreadable: Callable[[Entry, OSError], PermanentError], stop: threading.Event
) -> Entry | None:
    try:
        return msgspec.structs.replace(entry, digest=digest_of(contents, stop=stop))
    except OSError as error:
        if error.errno not in _GONE:
            raise unreadable(entry, error) from error
        return None
    finally:
        os.close(contents)


def _opened(tree: Path | bytes, scan: Iterable[_Seen]) -> Iterator[tuple[Entry, int]]:
    for seen in scan:
        contents = -1
        try:
            if stat.S_ISREG(seen.status.st_mode):
                seen, contents = _open_contents(seen)  # noqa: PLW2901 (a fresher look at the same)
            entry = _entry(seen, contents)
        except OSError as error:
            if contents >= 0:
                os.close(contents)
            if error.errno not in _GONE:
                raise _unreadable(tree, seen.path, error) from error
            continue
        yield entry, contents


def _open_contents(seen: _Seen) -> tuple[_Seen, int]:
    """Open a regular file for reading, without touching its access time where the kernel lets us.

    The descriptor is -1 when it is no regular file any more. It is never opened by name for reading: a device
    put in its place would notice.
    """
    handle = os.open(seen.name, _HANDLE, dir_fd=seen.at) if seen.name else os.dup(seen.at)
    try:
        seen = _Seen(seen.path, seen.at, seen.name, os.fstat(handle))
        if not stat.S_ISREG(seen.status.st_mode):
            return seen, -1
        flags, own = os.O_RDONLY | os.O_CLOEXEC, _descriptors(os.getpid())
        try:
            return seen, os.open(b"%d" % handle, flags | os.O_NOATIME, dir_fd=own)
        except PermissionError:
            return seen, os.open(b"%d" % handle, flags, dir_fd=own)
    finally:
        os.close(handle)


@functools.cache
def _descriptors(_process: int) -> int:
    """A descriptor of /proc/self/fd, which saves the way there. It means the process that opened it."""
    return os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
