"""Which names of a tree are the same file.

inotify tells the one name through which a file was changed; the change is visible under all its other names too.
So the index knows every name of every file that has several. What it must never do: keep the names of ordinary
files (there may be ten million), or be believed without a look: a name in it is a hint until its inode was compared.

Flow: ``hostd/watching.py`` fills it while it puts a whole tree under watch, each dirty set keeps it current, and
``hostd/dirty.py`` asks it for the other names of what changed.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Collection, Generator, Mapping, MutableMapping
from contextlib import closing
from typing import NamedTuple

from hostd.beneath import open_beneath
from hostd.entry import order_key

NAME = 1
"""The path was made, removed, moved or replaced: whatever is there now is new, with all that is in it."""
CONTENT = 2
"""The regular file there was written to."""
METADATA = 4
"""Owner, mode, times, attributes or number of links changed."""
CLOSED = 8
"""A descriptor that could have written was closed. Alone, it may mean a write through a mapping, or nothing."""
FOLDER = 16
"""With NAME: it concerned a directory, so all names below it may lead elsewhere now."""
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.EXDEV})
"""What says that a path is not in the tree: a part is missing, no directory, a symlink, or a mount point."""
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def look(root: int, path: bytes) -> os.stat_result | None:
    """``lstat`` of a path beneath the descriptor ``root``; None when nothing of this tree is there."""
    try:
        handle = open_beneath(root, path, _LOOK)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)


def names_below(root: int, start: bytes = b"") -> Generator[tuple[bytes, os.DirEntry[bytes]], None, None]:
    """Every path below ``start``, in no order, mount points not entered. What vanishes meanwhile is left out.

    A yielded ``DirEntry`` can be asked for its status only until the next one.
    """
    waiting = [start]
    while waiting:
        folder = waiting.pop()
        try:
            handle = open_beneath(root, folder)
        except OSError as error:
            if error.errno in GONE:
                continue
            raise
        try:
            with os.scandir(b"/proc/self/fd/%d" % handle) as entries:
                for entry in entries:
                    path = folder + b"/" + entry.name if folder else entry.name
                    yield path, entry
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
        finally:
            os.close(handle)


def _is_below(path: bytes, folders: Collection[bytes]) -> bool:
    end = path.rfind(b"/")
    while end > 0:
        if path[:end] in folders:
            return True
        end = path.rfind(b"/", 0, end)
    return False


class _Group:
    __slots__ = ("names", "seen")

    def __init__(self) -> None:
        self.names: set[bytes] = set()
        self.seen: _Status = None


_Status = tuple[int, int, int, int, int] | None
"""Time, size, mode and owner of a file as last seen; None if it never was."""


def _status(found: os.stat_result) -> tuple[int, int, int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_mode, found.st_uid, found.st_gid


class _Left(NamedTuple):
    """A path that led to a file of several names and does no longer."""

    path: bytes
    inode: int
    names: frozenset[bytes]
    """All that the file had when the dirty set began, as far as known."""
    seen: _Status


class LinkIndex:
    """Inode number → names, of the files of one tree that have several. Safe to use from several threads."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._inodes: dict[bytes, int] = {}
        self._lock = threading.RLock()

    def note(self, path: bytes, status: os.stat_result | None) -> None:
        """Take down what was just seen at ``path``: a file of one name, of several, or nothing."""
        with self._lock:
            many = status is not None and status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)
            known = self._inodes.get(path)
            if known is not None and (not many or status is None or known != status.st_ino):
                del self._inodes[path]
                group = self._groups[known]
                group.names.discard(path)
                if not group.names:
                    del self._groups[known]
            if many and status is not None:
                group = self._groups.setdefault(status.st_ino, _Group())
                group.names.add(path)
                group.seen = _status(status)
                self._inodes[path] = status.st_ino

    def names(self, inode: int) -> list[bytes]:
        """All names that a file of several names may have. Compare the inode before believing one."""
        with self._lock:
            group = self._groups.get(inode)
            return sorted(group.names) if group else []

    def settle(self, root: int, marks: MutableMapping[bytes, int], linked: Mapping[bytes, Collection[int]]) -> None:
        """Bring the index up to date with a dirty set, and add to the set what only the index can tell.

        ``linked`` holds the inodes that were seen under paths when these were made as further names. If a path
        no longer leads to a file of several names that it led to, the others may have been changed through it:
        they are marked if that path was changed, or if their time, size, mode or owner is another than before.
        Costs one walk over the tree's names, without any ``stat``, when a file of a single name got others.
        """
        with self._lock:
            left, fresh, loose = self._look_at(root, marks, linked)
            lost = {one.inode for one in left if not one.names}
            found = self._search(root, fresh | lost)
            for one in left:
                flags = marks.get(one.path, 0)
                for name in {*one.names, *self.names(one.inode), *found.get(one.inode, ())}:
                    status = look(root, name)
                    if status is None or status.st_ino != one.inode:
                        continue
                    if flags & (CONTENT | CLOSED) or one.seen is None or _status(status)[:2] != one.seen[:2]:
                        marks[name] = marks.get(name, 0) | CONTENT
                    elif loose or _status(status) != one.seen:
                        marks[name] = marks.get(name, 0) | METADATA

    def _look_at(
        self, root: int, marks: Mapping[bytes, int], linked: Mapping[bytes, Collection[int]]
    ) -> tuple[list[_Left], set[int], bool]:
        """What dirty paths no longer lead to, inodes with unknown names, and whether the metadata of something
        that is not there any more was changed, whatever it was."""
        left = []
        loose = False
        looked = []
        closed: bytes | None = None
        paths = {**dict.fromkeys(self._moved(marks), 0), **marks}
        for path, flags in sorted(paths.items(), key=lambda item: order_key(item[0])):
            if closed is not None and path.startswith(closed):
                status = None  # a removed tree has a mark for every name that was in it: spare the looks
            else:
                status = look(root, path)
                closed = path + b"/" if status is None or not stat.S_ISDIR(status.st_mode) else None
            looked.append((path, flags, status))
            loose = loose or (bool(flags & METADATA) and (status is None or bool(flags & NAME)))
            known = self._inodes.get(path)
            for inode in {*linked.get(path, ()), *(() if known is None else (known,))}:
                if status is not None and status.st_ino == inode:
                    continue
                group = self._groups.get(inode)
                if group is not None:
                    left.append(_Left(path, inode, frozenset(group.names), group.seen))
                elif flags & (CONTENT | CLOSED | METADATA):
                    left.append(_Left(path, inode, frozenset(), None))
        before = set(self._groups)
        links: dict[int, int] = {}
        for path, flags, status in looked:
            self._note_new(path, status, links)
            if flags & NAME and status is not None and stat.S_ISDIR(status.st_mode):
                self._note_all_below(root, path, links)
        fresh = set()
        for inode, count in links.items():
            names = self._true_names(root, inode, marks)
            # A name without a mark is one from before. Then the index knew this very file, and whatever names
            # it lacks lie outside of the tree.
            if len(names) < count and not (inode in before and any(name not in marks for name in names)):
                fresh.add(inode)
        return left, fresh, loose

    def _moved(self, marks: Mapping[bytes, int]) -> list[bytes]:
        """Known names, not marked themselves, at or below directories that were moved or removed."""
        folders = {path for path, flags in marks.items() if flags & FOLDER}
        return [name for name in self._inodes if folders and name not in marks and _is_below(name, folders)]

    def _note_all_below(self, root: int, folder: bytes, links: dict[int, int]) -> None:
        with closing(names_below(root, folder)) as below:
            for path, entry in below:
                try:
                    self._note_new(path, entry.stat(follow_symlinks=False), links)
                except FileNotFoundError:
                    continue

    def _note_new(self, path: bytes, status: os.stat_result | None, links: dict[int, int]) -> None:
        self.note(path, status)
        if status is not None and status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            links[status.st_ino] = status.st_nlink

    def _true_names(self, root: int, inode: int, marks: Mapping[bytes, int]) -> list[bytes]:
        """The names that really lead to the file. Those with marks were looked at just now."""
        true = []
        for name in self.names(inode):
            status = None if name in marks else look(root, name)
            if name in marks or (status is not None and status.st_ino == inode):
                true.append(name)
            else:
                self.note(name, status)
        return true

    def _search(self, root: int, inodes: set[int]) -> dict[int, set[bytes]]:
        found: dict[int, set[bytes]] = {}
        if not inodes:
            return found
        with closing(names_below(root)) as everywhere:
            for path, entry in everywhere:
                if entry.inode() in inodes and not entry.is_dir(follow_symlinks=False):
                    found.setdefault(entry.inode(), set()).add(path)
                    self.note(path, look(root, path))
        return found
