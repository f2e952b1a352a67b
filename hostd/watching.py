"""The directories of a tree under watch, and what each inotify event says about them.

A queue of events tells the past; the disk shows the present. This module never tries to replay the past: an event
about a name only says *look at that name again*. The rules, from which everything follows:

1. Every change of a directory's entry makes an event for (directory, name), after the change. So when the last
   event about a name has been handled, what was seen there at that moment is what is there still.
2. Handling an event about a directory entry looks at the disk: a directory that is found gets a watch *before* it is
   listed, and so do all directories in it. What happened in it before the watch is not known; but its path has just
   been marked as new, and a new directory is dirty with all that is in it.
3. The kernel gives the same watch descriptor for the same inode. If a directory is found to have one already, it
   was moved here, and the descriptor now means this place.
4. A path given to an event may be newer than the event, because of 2; it is never older, because events come in
   order. Newer is right: the mark must be where the change is to be seen now.
5. A directory that is seen no more where it was is cut off. If it is elsewhere in the tree, 1 and 2 find it there.

What it must never do: follow symlinks, enter mount points, use a path of the data as a string from the root, or
swallow an error that leaves a part of the tree unwatched.

Stands inside ``hostd/tracker.py``, which owns the queue, the thread and the lock; nothing here is for two threads.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator

from hostd.beneath import open_beneath
from hostd.dirty import DirtySet
from hostd.hardlinks import CLOSED, CONTENT, FOLDER, GONE, METADATA, NAME, LinkIndex, look

# inotify(7). The numbers are part of the kernel's interface; only hostd/tracker.py imports the library.
MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF = 0x400, 0x800
UNMOUNT, Q_OVERFLOW, IGNORED = 0x2000, 0x4000, 0x8000
ONLYDIR, ISDIR = 0x1000000, 0x40000000
MASK = MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | ONLYDIR
ROOT_MASK = MASK | DELETE_SELF | MOVE_SELF

_HEADER = struct.Struct("iIII")


class LostError(Exception):
    """Something may have been missed. Stays inside of the tracker, which then is not trusted."""


def parse(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Watch descriptor, mask and name of each event. Names stay bytes, which the library would decode."""
    at = 0
    while at < len(data):
        wd, mask, _, length = _HEADER.unpack_from(data, at)
        at += _HEADER.size + length
        yield wd, mask, data[at - length : at].rstrip(b"\0")


class _Node:
    """A watched directory."""

    __slots__ = ("children", "name", "parent", "wd")

    def __init__(self, parent: _Node | None, name: bytes, wd: int) -> None:
        self.parent = parent
        """None for the root, and for what was cut off."""
        self.name = name
        self.wd = wd
        """-1 once the watch is another node's, or gone."""
        self.children: dict[bytes, _Node] | None = None


class Watches:
    """``add(path, mask)`` and ``remove(wd)`` are the queue's; ``breathe`` is called often during long work."""

    def __init__(
        self,
        root: int,
        add: Callable[[bytes, int], int],
        remove: Callable[[int], None],
        breathe: Callable[[], None],
    ) -> None:
        self._root_descriptor = root
        self._add = add
        self._remove = remove
        self._breathe = breathe
        self._nodes: dict[int, _Node] = {}
        self._cut_off: list[_Node] = []
        self._root = _Node(None, b"", -1)

    def plant(self, links: LinkIndex) -> None:
        """Watch the whole tree, and note its hard links. Raises OSError of ``add``."""
        wd = self._add(b"/proc/self/fd/%d" % self._root_descriptor, ROOT_MASK)
        self._root.wd = wd
        self._nodes[wd] = self._root
        self._grow(self._list(self._root, self._root_descriptor, links), links)

    def handle(self, wd: int, mask: int, name: bytes, dirty: DirtySet) -> None:
        """Take one event into account. Raises LostError, or OSError of ``add``."""
        if mask & Q_OVERFLOW:
            raise LostError("more changed at once than the kernel keeps events for (inotify queue overflow)")
        node = self._nodes.get(wd)
        if node is None:
            return  # cut off, or no longer watched: rule 5
        if mask & (IGNORED | UNMOUNT | DELETE_SELF | MOVE_SELF):
            self._ended(node, wd, mask)
            return
        path = self._path(node)
        if path is None:
            return
        if not name:
            dirty.mark(path, METADATA)
            return
        path = path + b"/" + name if path else name
        if mask & (CREATE | DELETE | MOVED_FROM | MOVED_TO):
            dirty.mark(path, NAME | FOLDER if mask & ISDIR else NAME)
            if mask & ISDIR:
                self._reconsider(node, name)
            elif mask & CREATE:
                self._note_link(path, dirty)
        elif mask & ATTRIB or mask & ISDIR:
            dirty.mark(path, METADATA)
        elif mask & MODIFY:
            dirty.mark(path, CONTENT)
        elif mask & CLOSE_WRITE:
            dirty.mark(path, CLOSED)

    def prune(self) -> None:
        """Give back the watches of directories that left the tree. Whatever comes back is new again."""
        waiting, self._cut_off = self._cut_off, []
        while waiting:
            node = waiting.pop()
            waiting += node.children.values() if node.children else ()
            if node.wd >= 0:
                del self._nodes[node.wd]
                self._remove(node.wd)
                node.wd = -1

    def _ended(self, node: _Node, wd: int, mask: int) -> None:
        if node is self._root:
            raise LostError("the directory that is tracked was itself moved, removed or unmounted")
        if mask & UNMOUNT:
            raise LostError("a file system was unmounted below the directory that is tracked")
        if mask & IGNORED:
            del self._nodes[wd]
            node.wd = -1

    def _path(self, node: _Node) -> bytes | None:
        """None for what was cut off."""
        names = []
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return b"/".join(reversed(names)) if node is self._root else None

    def _reconsider(self, parent: _Node, name: bytes) -> None:
        """Rule 2, whatever the event was: after an exchange of two names a 'moved from' finds a directory."""
        current = parent.children.get(name) if parent.children else None
        wd = current.wd if current is not None else -1
        self._grow([(parent, name)], None)
        if current is not None and parent.children is not None and parent.children.get(name) is current:
            path = self._path(current)
            status = None if path is None else look(self._root_descriptor, path)
            if wd < 0 or status is None or not stat.S_ISDIR(status.st_mode):
                self._cut(current)

    def _grow(self, waiting: list[tuple[_Node, bytes]], links: LinkIndex | None) -> None:
        """Watch the named directories and all below them, unless they are watched at this place already."""
        count = 0
        while waiting:
            parent, name = waiting.pop()
            count += 1
            if count % 32 == 0:
                self._breathe()
            above = self._path(parent)
            if above is None:
                continue
            try:
                descriptor = open_beneath(self._root_descriptor, above + b"/" + name if above else name)
            except OSError as error:
                if error.errno in GONE:
                    continue
                raise
            try:
                node = self._bind(parent, name, descriptor)
                if node is not None:
                    waiting += self._list(node, descriptor, links)
            finally:
                os.close(descriptor)

    def _bind(self, parent: _Node, name: bytes, descriptor: int) -> _Node | None:
        """The node of a directory that is new at this place, None for one that was here before."""
        wd = self._add(b"/proc/self/fd/%d" % descriptor, MASK)
        known = self._nodes.get(wd)
        if parent.children is None:
            parent.children = {}
        current = parent.children.get(name)
        if known is not None and known is current:
            return None
        if known is self._root:
            raise LostError("the directory that is tracked is also visible below itself")
        if known is not None:
            known.wd = -1
        if current is not None:
            self._cut(current)
        node = _Node(parent, name, wd)
        parent.children[name] = node
        self._nodes[wd] = node
        return node

    def _list(self, node: _Node, descriptor: int, links: LinkIndex | None) -> list[tuple[_Node, bytes]]:
        """The directories in a directory. With ``links``, files of several names are noted."""
        folder = self._path(node)
        found = []
        with os.scandir(descriptor) as entries:  # of a descriptor, so that a look at an entry need not go through /proc
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found.append((node, os.fsencode(entry.name)))
                elif links is not None:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if status.st_nlink > 1:
                        name = os.fsencode(entry.name)
                        links.note(folder + b"/" + name if folder else name, status)
        return found

    def _cut(self, node: _Node) -> None:
        if node.parent is not None and node.parent.children is not None:
            node.parent.children.pop(node.name, None)
        node.parent = None
        self._cut_off.append(node)

    def _note_link(self, path: bytes, dirty: DirtySet) -> None:
        """A new name of an old file: what is written through it changes the old names, even if it vanishes."""
        status = look(self._root_descriptor, path)
        if status is not None and status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            dirty.linked.setdefault(path, set()).add(status.st_ino)
