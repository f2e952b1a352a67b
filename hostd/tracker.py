"""The change tracker: inotify on a whole tree, cut into generations. The only module that imports inotify_simple.

    tracker.start()                    every directory is watched
    tracker.arm(1, open_files)         generation 1 begins; whatever is copied is copied after this
    before = tracker.arm(2, …)         generation 2 begins; ``before`` holds what changed during 1
    last = tracker.drain()             after the stop: what changed during 2
    dirty_manifest(tree, last, …)      the entries to carry

The law: a change is in the set of the generation in which it was made, or, at the border, in that of the next one;
never in neither. Whoever cannot be sure of that (queue overflow, watch limit, the tree itself gone) is not
``trusted`` and says ``why``; then only comparing everything helps, and the next ``arm`` begins afresh.
What it must never do: raise for a lost event, or call a set trusted that may lack one.

A tree that is a single file has no directory to watch: its contents count as changed in every generation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from fcntl import ioctl
from pathlib import Path
from termios import FIONREAD

from inotify_simple import INotify

from events.errors import PermanentError
from hostd.dirty import NO_FILES, DirtySet, dirty_manifest, everything, locate_mapped
from hostd.hardlinks import CONTENT
from hostd.openfiles import FileKey, OpenFile, place_of
from hostd.watching import LostError, Watches, parse

__all__ = ["DirtySet", "Queue", "Tracker", "dirty_manifest", "everything"]

_EVENTS_BETWEEN_READS = 256
"""The kernel keeps 16,384 events by default; handling one takes some microseconds, a burst comes faster."""
_MAX_BACKLOG_BYTES = 64 * 1024 * 1024
"""About a million events read but not yet handled. Beyond that a comparison is cheaper than catching up."""
_JOIN_SECONDS = 10.0


class Queue(INotify):  # type: ignore[misc]
    """An inotify instance. Tests replace single methods to bring about what the kernel does only under stress."""

    def take(self) -> bytes:
        """All events that are waiting, as the kernel wrote them; empty if there are none."""
        waiting = array("i", [0])
        ioctl(self.fileno(), FIONREAD, waiting)
        return os.read(self.fileno(), waiting[0]) if waiting[0] else b""


class Tracker:
    """Watches one tree. All methods may be called from any thread; ``arm`` and ``drain`` wait for the queue."""

    def __init__(
        self, tree: Path, name: str = "tracker", *, open_queue: Callable[[], Queue] = lambda: Queue(False, True)
    ) -> None:
        self.tree = tree
        self.name = name
        self.plain = False
        """Whether a look at the whole tree, begun after the start, found nothing but what is ``plain`` (``hostd/entry.py``)."""
        self._open_queue = open_queue
        self._lock = threading.RLock()
        self._dirty = DirtySet(0, trusted=False, why="tracking was not started")
        self._before: DirtySet | None = None
        self._root = -1
        self._single_file = False
        self._queue: Queue | None = None
        self._watches: Watches | None = None
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._place = self._file_system = b""

    # --- for the effects -----------------------------------------------------------------------

    @property
    def trusted(self) -> bool:
        """Whether the present generation can have missed nothing so far."""
        return self._dirty.trusted

    @property
    def why(self) -> str:
        """Why not, in words."""
        return self._dirty.why

    def start(self) -> None:
        """Watch everything; returns when the whole tree is. Harmless when repeated.

        Raises PermanentError when the tree is missing or no directory or file. A limit of inotify does not raise:
        the tracker then is not trusted.
        """
        with self._lock:
            if self._wake >= 0:
                return
            try:
                kind = self.tree.lstat().st_mode
            except OSError as error:
                raise PermanentError(
                    f"the data tree {self.tree} cannot be opened: {error.strerror}. Nothing was changed. See "
                    "whether it was moved or unmounted."
                ) from error
            self._single_file = stat.S_ISREG(kind)
            if not self._single_file and not stat.S_ISDIR(kind):
                raise PermanentError(f"the data tree {self.tree} is neither a directory nor a file")
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._dirty = self._begin(0, NO_FILES)
            self._watch()
            self._thread = threading.Thread(target=self._run, name=f"inotify {self.name}", daemon=True)
            self._thread.start()

    def arm(self, generation: int, open_files: Mapping[FileKey, OpenFile] = NO_FILES) -> DirtySet:
        """Begin a generation and return what the one before saw.

        ``open_files`` are the files that can be written without an event, looked up right before. If trust was
        lost, the tree is watched anew, so the new generation is trusted again unless that fails too.
        Asked again for the generation that it is in, it returns the same set again: a caller whose report was lost
        must not lose what was in it.
        """
        with self._lock:
            if self._before is not None and self._dirty.generation == generation:
                return self._before
            self._pump()
            before = self._before = self._dirty
            fresh = self._begin(generation, open_files)
            if self._wake < 0:
                fresh.trusted, fresh.why = False, "tracking was stopped"
            elif not before.trusted:
                self._dirty = fresh
                self._watch()
            else:
                fresh.links = before.links
                self._dirty = fresh
                if self._watches is not None:
                    self._watches.prune()
            root = os.dup(self._root) if self._root >= 0 and fresh.trusted else -1
        if root < 0:
            return before
        try:
            if before.trusted:
                before.links.settle(root, before.marks, before.linked)
            locate_mapped(root, fresh)
        except OSError as error:
            before.trusted, before.why = False, _words(error)
        finally:
            os.close(root)
        return before

    def drain(self) -> DirtySet:
        """Everything the present generation saw of what was changed before this call. It goes on."""
        with self._lock:
            self._pump()
            return self._dirty.snapshot()

    def stop(self) -> None:
        """Give back all watches. Harmless when repeated, or before the start."""
        with self._lock:
            self._distrust("tracking was stopped")
            self._forget()
            thread, self._thread = self._thread, None
            self._poke()
        if thread is not None:
            thread.join(_JOIN_SECONDS)
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    # --- beginning and ending ------------------------------------------------------------------

    def _begin(self, generation: int, open_files: Mapping[FileKey, OpenFile]) -> DirtySet:
        fresh = DirtySet(generation, opened=dict(open_files), began_ns=time.time_ns())
        fresh.place, fresh.file_system = self._place, self._file_system
        if self._single_file:
            fresh.mark(b"", CONTENT)
        return fresh

    def _watch(self) -> None:
        """Watch the tree from nothing. The events of that time are kept, to be handled afterwards."""
        self._forget()
        if self._single_file:
            return
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._root = os.open(self.tree, flags)
            self._place, self._file_system = place_of(self._root)
            self._dirty.place, self._dirty.file_system = self._place, self._file_system
            self._queue = self._open_queue()
            self._watches = Watches(self._root, self._queue.add_watch, self._unwatch, self._breathe)
            self._watches.plant(self._dirty.links)
        except OSError as error:
            self._distrust(_words(error))
        except LostError as error:
            self._distrust(str(error))
        self._poke()

    def _unwatch(self, wd: int) -> None:
        with contextlib.suppress(OSError):  # EINVAL: the directory itself is gone, and its watch with it
            if self._queue is not None:
                self._queue.rm_watch(wd)

    def _distrust(self, why: str) -> None:
        """Nothing that still comes can mend this generation, so the watches are given back at once."""
        if self._dirty.trusted:
            self._dirty.trusted, self._dirty.why = False, why
        self._forget()

    def _forget(self) -> None:
        self._watches = None
        self._backlog.clear()
        self._backlog_bytes = 0
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
        self._poke()

    def _poke(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # --- events --------------------------------------------------------------------------------

    def _breathe(self) -> None:
        """Make room in the kernel's queue."""
        if self._queue is None:
            return
        data = self._queue.take()
        if data:
            self._backlog.append(data)
            self._backlog_bytes += len(data)
            if self._backlog_bytes > _MAX_BACKLOG_BYTES:
                raise LostError("changes come faster than they can be listed")

    def _pump(self) -> None:
        """Handle what was waiting when this was called; what comes meanwhile waits in the backlog."""
        if self._watches is None:
            return
        try:
            self._check_root()
            self._breathe()
            for _ in range(len(self._backlog)):
                data = self._backlog.popleft()
                self._backlog_bytes -= len(data)
                for count, (wd, mask, name) in enumerate(parse(data), 1):
                    self._watches.handle(wd, mask, name, self._dirty)
                    if count % _EVENTS_BETWEEN_READS == 0:
                        self._breathe()
        except OSError as error:
            self._distrust(_words(error))
        except LostError as error:
            self._distrust(str(error))

    def _check_root(self) -> None:
        """Something mounted over the tree, or another tree put in its place, sends no event."""
        try:
            there, here = self.tree.lstat(), os.fstat(self._root)
        except OSError as error:
            raise LostError(f"the tracked directory cannot be reached: {error.strerror}") from error
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise LostError("another directory is now where the tracked one was")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                self._pump()
                poll = select.poll()
                poll.register(self._wake, select.POLLIN)
                if self._queue is not None:
                    poll.register(self._queue.fileno(), select.POLLIN)
                timeout = 0 if self._backlog else None
            for descriptor, _ in poll.poll(timeout):
                if descriptor == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)


def _words(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return (
            "the tree has more directories than inotify may watch; raise the sysctl fs.inotify.max_user_watches "
            "to track it"
        )
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return f"no inotify instance is left ({error.strerror}); raise the sysctl fs.inotify.max_user_instances"
    return f"the tree could not be watched completely: {error.strerror or error}"
