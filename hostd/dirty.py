"""From what the tracker saw to what must be carried: the dirty manifest.

A dirty set holds hints where to look; every entry of the manifest says what is there *now*. So a manifest made
while the container runs may be newer than its set, never older. What this module must never do: take a file for
clean because no event told of it, when a process could have written it without one; or fail because something
vanished meanwhile.

Flow: ``Tracker.arm`` and ``Tracker.drain`` give dirty sets, ``dirty_manifest`` turns them into entries, the
source publishes these, and the target's ``hostd/placement.py`` or rsync acts on them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import msgspec

from events.errors import PermanentError
from hostd.hardlinks import CLOSED, CONTENT, GONE, NAME, LinkIndex, look, names_below
from hostd.manifest import Entry, observe_all, order_key, walk
from hostd.openfiles import FileKey, OpenFile

_SCAN_NS = 5_000_000_000
"""The open files are looked up before the generation begins, within this time. What changed in between counts as
changed since: a file too many, never one too few."""
_TIMELESS = frozenset({b"tmpfs", b"ramfs", b"hugetlbfs", b"nfs", b"nfs4", b"cifs"})
"""File systems whose ctime does not tell of a write through a mapping. FUSE too, see ``DirtySet.timeless``."""
NO_FILES: Mapping[FileKey, OpenFile] = MappingProxyType({})


@dataclass
class DirtySet:
    """Where one generation of tracking saw changes: at least everything that changed, possibly more."""

    generation: int
    marks: dict[bytes, int] = field(default_factory=dict)
    """Relative path → NAME, CONTENT, METADATA, CLOSED of ``hostd/hardlinks.py``, or-ed."""
    trusted: bool = True
    """False: something may have been missed, so only a comparison of everything helps."""
    why: str = ""
    links: LinkIndex = field(default_factory=LinkIndex)
    linked: dict[bytes, set[int]] = field(default_factory=dict)
    """Paths that were made as further names of a file, and that file's inode numbers."""
    named: set[bytes] = field(default_factory=set)
    """Directories of which every name is marked: whatever else a copy has in them is to go (writable layers only)."""
    known: Container[bytes] | None = None
    """All names that were there as the generation ended (writable layers only)."""
    opened: Mapping[FileKey, OpenFile] = field(default_factory=dict)
    """What could be written without an event when the generation began."""
    mapped: dict[FileKey, bytes] = field(default_factory=dict)
    """Those of them that were mapped, and their paths in the tree at that moment."""
    began_ns: int = field(default_factory=time.time_ns)
    place: bytes = b""
    """The tree's own path within its file system; empty if unknown."""
    file_system: bytes = b""

    @property
    def timeless(self) -> bool:
        """Whether the tree's file system gives no sign of a write through a mapping."""
        return self.file_system in _TIMELESS or self.file_system.startswith(b"fuse")

    def mark(self, path: bytes, flag: int) -> None:
        """Add one change."""
        self.marks[path] = self.marks.get(path, 0) | flag

    def snapshot(self) -> DirtySet:
        """A copy that later events leave alone; the link index stays shared."""
        linked = {path: set(inodes) for path, inodes in self.linked.items()}
        copy = DirtySet(self.generation, dict(self.marks), self.trusted, self.why, self.links, linked)
        copy.opened, copy.mapped, copy.began_ns = self.opened, dict(self.mapped), self.began_ns
        copy.place, copy.file_system = self.place, self.file_system
        return copy


def dirty_manifest(tree: Path, dirty: DirtySet, open_files: Mapping[FileKey, OpenFile] = NO_FILES) -> list[Entry]:
    """What is at each dirty path now, in the order of ``order_key``, with every ancestor directory.

    ``open_files`` is what could be written without an event at the generation's end. A regular file is ``stale``
    when its contents may differ from what they were as the generation began. A *directory* is ``stale`` when its
    names may: then everything in it, down to the leaves, is listed, and whatever else a copy has there is to go.
    Nothing stands below a ``-`` or anything else that is no directory; all names of a file are listed if one is.

    A set that is not trusted gives the whole tree. Costs time in proportion to the set. Raises PermanentError when
    the tree itself is missing or something cannot be read.
    """
    if not dirty.trusted:
        return list(everything(tree))
    with _Root(tree) as root:
        if root < 0:
            return list(everything(tree))  # a single file: its contents always count as changed
        try:
            dirty.links.settle(root, dirty.marks, dirty.linked)
            marks = dict(dirty.marks)
            _weigh_open_files(root, dirty, open_files, marks)
        except OSError as error:
            raise PermanentError(
                f"what changed in {tree} cannot be listed: {error.strerror or error}. Nothing was changed; the "
                "data cannot be carried until this is mended."
            ) from error
        return _list(tree, marks, dirty.links)


def everything(tree: Path) -> Iterator[Entry]:
    """The whole tree, the contents of every regular file to be carried. For when tracking was lost."""
    for entry in walk(tree):
        yield _stale(entry, entry.kind == "f")


class _Root:
    """A descriptor of the tree's root directory; -1 if the tree is something else or missing."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._descriptor = -1

    def __enter__(self) -> int:
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self._tree, flags)
        except OSError as error:
            if error.errno not in GONE:
                raise
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


# --- files that can be written without an event ------------------------------------------------


def locate_mapped(root: int, dirty: DirtySet) -> None:
    """Find the paths of the files that are mapped as the generation begins. May walk over the tree's names."""
    wanted = {}
    for key, file in dirty.opened.items():
        if not file.mapped_writable_shared:
            continue
        paths = _paths(root, dirty, key, file)
        if paths:
            dirty.mapped[key] = paths[0]
        elif _within(dirty.place, file.place) is not None:
            wanted[key[1]] = key  # renamed since it was looked up
    if not wanted:
        return
    for path, entry in names_below(root):
        if entry.inode() in wanted and not entry.is_dir(follow_symlinks=False):
            dirty.mapped[wanted[entry.inode()]] = path


def _weigh_open_files(
    root: int, dirty: DirtySet, open_files: Mapping[FileKey, OpenFile], marks: dict[bytes, int]
) -> None:
    """Decide on what events cannot tell: mapped files, silent writers, and closings without a write."""
    for key in {**dirty.opened, **open_files}:
        both = [file for file in (dirty.opened.get(key), open_files.get(key)) if file is not None]
        mapped = any(file.mapped_writable_shared for file in both)
        for path in {path for file in both for path in _paths(root, dirty, key, file)}:
            status = look(root, path)
            if status is not None and (mapped or _changed(dirty, key, status)):
                marks[path] = marks.get(path, 0) | CONTENT
    for path, flags in list(marks.items()):
        if not flags & CLOSED:
            continue
        if not flags & (CONTENT | NAME) and _merely_closed(root, dirty, open_files, path):
            marks[path] = flags & ~CLOSED
            if not marks[path]:
                del marks[path]


def _merely_closed(root: int, dirty: DirtySet, open_files: Mapping[FileKey, OpenFile], path: bytes) -> bool:
    """Whether the end of the container's processes alone explains that the file was closed.

    Only if a process had it open for writing, not mapped, and nothing touched it since. Mapped and written
    before that, with the descriptor still open, would show in the ctime, which is compared with the one at the
    generation's beginning.
    """
    status = look(root, path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return True  # there are no contents; whatever happened to the name has a mark of its own
    key = (status.st_dev, status.st_ino)
    file = open_files.get(key)
    if file is None or file.mapped_writable_shared or file.ctime_ns != status.st_ctime_ns:
        return False
    return not _changed(dirty, key, status)


def _changed(dirty: DirtySet, key: FileKey, status: os.stat_result) -> bool:
    """Whether a file that is open for writing may have changed since the generation began.

    Needed beside the events: Linux's native asynchronous writes (io_submit) send none, nor do mappings.
    """
    if dirty.timeless:
        return True
    before = dirty.opened.get(key)
    if before is not None:
        return before.ctime_ns != status.st_ctime_ns
    return status.st_ctime_ns >= dirty.began_ns - _SCAN_NS


def _paths(root: int, dirty: DirtySet, key: FileKey, file: OpenFile) -> list[bytes]:
    """The paths in the tree at which this file is, as far as they are known."""
    candidates = set(dirty.links.names(key[1]))
    inside = _within(dirty.place, file.place)
    candidates |= {path for path in (inside, dirty.mapped.get(key)) if path}
    found = []
    for path in candidates:
        status = look(root, path)
        if status is not None and (status.st_dev, status.st_ino) == key:
            found.append(path)
    return found


def _within(tree: bytes, place: bytes) -> bytes | None:
    prefix = tree.rstrip(b"/") + b"/"
    return place[len(prefix) :] if tree and place.startswith(prefix) else None


# --- the listing -------------------------------------------------------------------------------


def _list(tree: Path, marks: Mapping[bytes, int], links: LinkIndex) -> list[Entry]:
    listed: dict[bytes, Entry] = {}
    covered: bytes | None = None
    closed: bytes | None = None

    def worth_a_look() -> Iterator[bytes]:
        # A removed tree has a mark for every name that was in it. The top one says it all.
        for path in sorted(marks, key=order_key):
            if closed is None or not path.startswith(closed):
                yield path

    for entry in observe_all(tree, worth_a_look()):
        path, flags = entry.path, marks[entry.path]
        closed = None if entry.kind == "d" else path + b"/"
        if covered is not None and path.startswith(covered):
            if entry.kind == "-":
                listed.setdefault(path, entry)
            continue
        if entry.kind == "d" and flags & NAME:
            covered = path + b"/" if path else b""
            for inner in walk(tree, start=path):
                listed[inner.path] = _stale(inner, inner.kind in "df")
        else:
            listed[path] = _stale(entry, entry.kind == "f" and bool(flags & (NAME | CONTENT | CLOSED)))
    _add_other_names(tree, listed, links)
    _add_ancestors(tree, listed)
    return list(_reachable(listed.values()))


def _stale(entry: Entry, stale: bool) -> Entry:
    if stale and (entry.size > 0 or entry.kind == "d"):
        return msgspec.structs.replace(entry, stale=True)
    return entry


def _add_other_names(tree: Path, listed: dict[bytes, Entry], links: LinkIndex) -> None:
    """One file, one fate: if one of its names is listed, all are; if one is stale, all are."""
    stale: dict[int, bool] = {}
    for entry in listed.values():
        if entry.link_group:
            stale[entry.link_group] = stale.get(entry.link_group, False) or entry.stale
    others = {name for group in stale for name in links.names(group)} - listed.keys()
    for entry in observe_all(tree, sorted(others, key=order_key)):
        if entry.link_group in stale:
            listed[entry.path] = entry
    for path, entry in listed.items():
        if entry.kind == "f" and stale.get(entry.link_group) and not entry.stale:
            listed[path] = _stale(entry, True)


def _add_ancestors(tree: Path, listed: dict[bytes, Entry]) -> None:
    above: set[bytes] = set()
    for path in listed:
        parent = path
        while parent:
            parent = os.path.dirname(parent)
            if parent in above:
                break
            above.add(parent)
    for entry in observe_all(tree, sorted(above - listed.keys(), key=order_key)):
        # No directory any more: the next generation knows, but this manifest must be sound by itself.
        listed[entry.path] = _stale(entry, entry.kind == "f")


def _reachable(entries: Iterable[Entry]) -> Iterator[Entry]:
    """In order, without what stands below something that is no directory."""
    closed: bytes | None = None
    for entry in sorted(entries, key=lambda entry: order_key(entry.path)):
        if closed is not None and entry.path.startswith(closed):
            continue
        closed = None if entry.kind == "d" else entry.path + b"/"
        yield entry
