"""What changed in a container's writable layer: found by looking at the layer, not by events.

overlayfs writes to its upper directory without telling inotify, so ``hostd/tracker.py`` sees nothing there. But the
layer holds only what differs from the image, mostly little, and each of its inodes has a change time that no program
can set. So a generation begins with a look at all of them (inode number and change time, no contents), and what
changed in it shows in the next look. That costs time in proportion to the number of entries in the layer: nothing
depends on their size or on the image.

Interface and law are the tracker's: a change belongs to the generation in which it was made, or to the next one; never to
neither. A file that was written to in the same tick of the kernel's clock as the look counts as changed, and so does
whatever a process has mapped shared and writable when a generation begins or ends: such writes move no time.

What it must never do: open a file of the container, or forget a path that it has once listed as changed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from events.errors import PermanentError
from hostd.dirty import NO_FILES, DirtySet
from hostd.hardlinks import CONTENT, FOLDER, METADATA, NAME, names_below
from hostd.openfiles import FileKey, OpenFile

RECENT_NS = 100_000_000
"""A change time is as fine as the kernel's tick (1 to 10 ms). What changed this recently is looked at again."""


class _Look(NamedTuple):
    inode: int
    ctime_ns: int
    """-1 when it was too recent to be compared with."""
    directory: bool


class LayerTracker:
    """Watches one writable layer. All methods may be called from any thread."""

    def __init__(self, tree: Path, name: str = "layer") -> None:
        self.tree = tree
        self.name = name
        self._lock = threading.Lock()
        self._generation = 0
        self._before: DirtySet | None = None
        self._seen: dict[bytes, _Look] = {}
        self._whole = True
        """Whether the copy under way takes whatever it finds, so that a name may come, be copied and go between two looks."""
        self._unsettled: set[bytes] = set()
        """Directories that changed while that was so, of which no list has named everything yet."""
        self._mapped: Mapping[FileKey, OpenFile] = NO_FILES
        self._started = False
        self._why = "tracking was not started"

    @property
    def trusted(self) -> bool:
        """Whether the present generation can have missed nothing so far."""
        return self._started

    @property
    def why(self) -> str:
        """Why not, in words."""
        return self._why

    def start(self) -> None:
        """Begin the generation 0. Raises PermanentError when the layer is not there or cannot be looked at."""
        with self._lock:
            if not self._started:
                self._seen = self._look()
                self._started, self._why = True, ""

    def arm(self, generation: int, open_files: Mapping[FileKey, OpenFile] = NO_FILES) -> DirtySet:
        """Begin a generation and return what the one before saw; the same again for the same generation.

        The copy of the new generation is thought to take whatever it finds, see ``copy_takes``.
        """
        with self._lock:
            if self._before is not None and self._generation == generation:
                return self._before
            found = self._look() if self._started else {}
            before = self._before = self._told(found, open_files)
            self._unsettled, self._whole = set(before.named), True
            self._generation, self._seen, self._mapped = generation, found, dict(open_files)
            return before

    def copy_takes(self, *, everything: bool) -> None:
        """Say what the copy of the present generation takes: whatever it finds, or the names that ``arm`` told, if found.

        A copy of listed names leaves nothing behind that the last look did not have: what that lacked goes before.
        """
        with self._lock:
            self._whole = everything
            self._unsettled = set(self._before.named) if everything and self._before is not None else set()

    def drain(self, open_files: Mapping[FileKey, OpenFile] = NO_FILES) -> DirtySet:
        """What has changed in the present generation until now; ``open_files`` were looked up at its end."""
        with self._lock:
            return self._told(self._look() if self._started else {}, open_files)

    def _told(self, found: Mapping[bytes, _Look], open_files: Mapping[FileKey, OpenFile]) -> DirtySet:
        """What has changed; and every name in the directories that changed under a copy that took what it found.

        Only so it learns what came, was copied, and went between two looks.
        """
        dirty = self._changes(found, open_files)
        if dirty.trusted:
            dirty.known = found.keys()
            dirty.named = (
                self._unsettled | (self._changed_directories(found) if self._whole else set())
            ) & found.keys()
            for path in found:
                if path in dirty.named or (path and os.path.dirname(path) in dirty.named):
                    dirty.mark(path, METADATA)
        return dirty

    def stop(self) -> None:
        """Forget everything. Harmless when repeated, or before the start."""
        with self._lock:
            self._started, self._why = False, "tracking was stopped"
            self._seen, self._before = {}, None
            self._unsettled, self._whole = set(), True

    def _changes(self, found: Mapping[bytes, _Look], open_files: Mapping[FileKey, OpenFile]) -> DirtySet:
        dirty = DirtySet(self._generation, trusted=self._started, why=self._why)
        if not self._started:
            return dirty
        for path, look in found.items():
            known = self._seen.get(path)
            if known is None or known.inode != look.inode or known.directory != look.directory:
                dirty.mark(path, CONTENT)  # names in a new directory are new themselves, so all of them are listed
            elif known.ctime_ns != look.ctime_ns or known.ctime_ns < 0:
                dirty.mark(path, METADATA if look.directory else CONTENT)
        for path in self._seen.keys() - found.keys():
            dirty.mark(path, NAME | (FOLDER if self._seen[path].directory else 0))
        for path in _mapped_paths(found, (*self._mapped.items(), *open_files.items())):
            dirty.mark(path, CONTENT)
        return dirty

    def _changed_directories(self, found: Mapping[bytes, _Look]) -> set[bytes]:
        return {
            path
            for path, look in found.items()
            if look.directory and (look.ctime_ns < 0 or self._seen.get(path) != look)
        }

    def _look(self) -> dict[bytes, _Look]:
        recent = time.time_ns() - RECENT_NS
        found: dict[bytes, _Look] = {}
        try:
            root = os.open(self.tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found[b""] = _look_of(os.fstat(root), True, recent)
                for path, entry in names_below(root):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    found[path] = _look_of(status, entry.is_dir(follow_symlinks=False), recent)
            finally:
                os.close(root)
        except OSError as error:
            raise PermanentError(
                f"the container's writable layer {self.tree} cannot be looked at: {error.strerror or error}. Nothing "
                "was changed; it cannot be carried until this is mended, or with rootfs: false."
            ) from error
        return found


def _look_of(status: os.stat_result, directory: bool, recent: int) -> _Look:
    return _Look(status.st_ino, status.st_ctime_ns if status.st_ctime_ns < recent else -1, directory)


def _mapped_paths(found: Mapping[bytes, _Look], files: tuple[tuple[FileKey, OpenFile], ...]) -> Iterator[bytes]:
    """Files of the layer that may have been written through a mapping.

    What a process maps is a file of the *overlay*, whose device is never the layer's, and whose inode number is only mostly
    that of the layer's file. So its path in the container counts as well; one too many does no harm.
    """
    places, inodes = set(), set()
    for (_, inode), file in files:
        if file.mapped_writable_shared:
            places.add(file.place.lstrip(b"/"))
            inodes.add(inode)
    if not inodes:
        return
    for path, look in found.items():
        if not look.directory and (look.inode in inodes or path in places):
            yield path
