"""Where the bytes of a file come from while they are still arriving: from this host if they are here, else from the source.

Decided anew for every read. A file that has arrived (the fill renames it into the replica when it is whole) is read
there, also through a descriptor that was opened long before. Anything else is read from the source, and when the
source does not answer, the reader waits: until it does, or until the file arrives, or until the patience ends.

What it must never do: give a reader bytes that are not the file's. A file of another size, a short read or a broken
link is never papered over with zeros; it ends in another attempt or in an error. Nor may a source that hangs hold up
those who read what is here: the view of the source is touched by worker threads only. And nothing below the view is
kept open for longer than it is read, so that the view can be taken away or replaced at any moment.

Stands below ``hostd/lower.py``.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from hostd.beneath import open_beneath

REMOTE_WORKERS = 32
"""Reads of the source at once. sshfs itself has few connections; the rest wait for a place in them."""
IDLE_SECONDS = 1.0
"""How long a file of the source stays open after a read of it, because another read mostly follows."""
PIECE_BYTES = 128 * 1024
"""What the kernel asks of the view at once."""
WATCH_SECONDS = 0.05
LOOK_AGAIN_SECONDS = 0.2
"""How often a waiting reader looks whether its file has arrived meanwhile."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
AGAIN_SECONDS = 5.0
"""How soon after a reader got an error the next read of the same file counts as the same one."""
HANGING_SECONDS = 2.0
"""A read that takes longer is mentioned in the log."""

_ROOT = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: a FIFO that somebody put in a file's place must not block whoever opens it."""


class ChangedError(OSError):
    """What lies on the source is not the file that was announced. Waiting does not mend that."""


@dataclass
class _Opened:
    descriptor: int
    size: int
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    doomed: bool = False


class Remote:
    """The view of the source. ``read`` may hang for as long as the view does."""

    def __init__(self, stage: int) -> None:
        """``stage`` is a descriptor of the stage directory, below which the view is mounted as ``remote``."""
        self._stage = stage
        self._stage_device = os.fstat(stage).st_dev
        self._opened: dict[bytes, _Opened] = {}
        self._lock = threading.Lock()

    def read(self, path: bytes, size: int, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises ChangedError when it is another file now, OSError when it cannot be read."""
        opened = self._take(path, size)
        try:
            data = _read_exactly(opened.descriptor, offset, length)
        except OSError:
            self._give_back(path, opened, broken=True)
            raise
        self._give_back(path, opened, broken=False)
        return data

    def read_whole(self, path: bytes, size: int, wanted: Callable[[], bool]) -> bytes | None:
        """All of a file, which is not kept open; None when it is ``wanted`` no more, asked between pieces. Raises as ``read``."""
        descriptor = self._open(path, size)
        try:
            pieces = []
            for offset in range(0, size, PIECE_BYTES):
                if not wanted():
                    return None
                pieces.append(_read_exactly(descriptor, offset, min(PIECE_BYTES, size - offset)))
            return b"".join(pieces)
        finally:
            os.close(descriptor)

    def idle(self, arrived: Callable[[bytes, int], bool]) -> list[int]:
        """Descriptors that nobody needs any more. From now on they are the caller's, to close."""
        now = time.monotonic()
        with self._lock:
            unused = [(path, opened) for path, opened in self._opened.items() if opened.users == 0]
        found = []
        for path, opened in unused:
            if now - opened.used_at < IDLE_SECONDS and not arrived(path, opened.size):
                continue
            with self._lock:
                if opened.users == 0 and self._opened.get(path) is opened:
                    del self._opened[path]
                    found.append(opened.descriptor)
        return found

    def any_open(self) -> bool:
        """Whether a file of the source is open."""
        return bool(self._opened)

    def _take(self, path: bytes, size: int) -> _Opened:
        with self._lock:
            opened = self._opened.get(path)
            if opened is not None:
                opened.users += 1
                return opened
        fresh = _Opened(self._open(path, size), size, users=1)
        with self._lock:
            opened = self._opened.setdefault(path, fresh)
            if opened is not fresh:
                opened.users += 1
        if opened is not fresh:
            os.close(fresh.descriptor)
        return opened

    def _give_back(self, path: bytes, opened: _Opened, *, broken: bool) -> None:
        with self._lock:
            opened.users -= 1
            opened.used_at = time.monotonic()
            opened.doomed = opened.doomed or broken
            if opened.doomed and self._opened.get(path) is opened:
                del self._opened[path]
            close = opened.doomed and opened.users == 0
        if close:
            os.close(opened.descriptor)

    def _open(self, path: bytes, size: int) -> int:
        # Looked up anew each time, because a broken view is replaced by another mount at the same place.
        root = os.open("remote", _ROOT, dir_fd=self._stage)
        try:
            descriptor = open_beneath(root, path, _FILE)
        finally:
            os.close(root)
        try:
            self._require_announced(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_announced(self, descriptor: int, size: int) -> None:
        seen = os.fstat(descriptor)
        if seen.st_dev == self._stage_device:
            raise OSError(errno.ENOTCONN, "the view of the source is not mounted")
        if not stat.S_ISREG(seen.st_mode):
            raise ChangedError(errno.EIO, "it is no regular file on the source any more")
        if seen.st_size != size:
            raise ChangedError(errno.EIO, f"it has {seen.st_size} bytes on the source, and had {size} at the stop")


@dataclass(eq=False)
class Read:
    """One read that the kernel wants answered: ``length`` bytes at ``offset``, which are inside of the file."""

    path: bytes
    size: int
    """Of the whole file, as announced at the stop."""
    offset: int
    length: int
    finished: Callable[[bytes | None], None]
    """Called exactly once, from any thread, with the bytes, or with None for an error."""
    deadline: float = 0.0
    attempt_began: float = 0.0
    under_way: bool = False
    next_attempt: float = 0.0
    next_look: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    failure: str = ""


class Contents:
    """Answers reads of files by path and size, from whichever side has them. Safe to use from many threads."""

    def __init__(self, stage: bytes, *, patience_seconds: float, log: Callable[[str], None]) -> None:
        """``patience_seconds`` is how long a reader waits for a source that does not answer, before it gets EIO."""
        self._stage = os.open(stage, _ROOT)
        self._replica = os.open("replica", _ROOT, dir_fd=self._stage)
        self._remote = Remote(self._stage)
        self._workers = ThreadPoolExecutor(REMOTE_WORKERS, thread_name_prefix="remote")
        self._patience_seconds = patience_seconds
        self._log = log
        self._pending: set[Read] = set()
        self._lock = threading.Lock()
        self._busy = threading.Event()
        self._waiting = False
        self._given_up: dict[bytes, float] = {}

    def read(self, read: Read) -> None:
        """Answer it: at once if the file is here, else when it can be had. Raises OSError if this host's disk fails."""
        data = self._from_replica(read)
        if data is not None:
            read.finished(data)
            return
        now = time.monotonic()
        # The kernel asks once more, page by page, for what its read-ahead did not get: the patience counts once.
        again = now - self._given_up.get(read.path, -AGAIN_SECONDS) < AGAIN_SECONDS
        read.deadline = now + (0 if again else self._patience_seconds)
        read.next_look = now + LOOK_AGAIN_SECONDS
        self._attempt(read, now)
        self._busy.set()

    def watch(self) -> None:
        """Never returns. Looks after reads that wait, and closes files of the source that nobody reads."""
        while True:
            with self._lock:
                pending = list(self._pending)
            for read in pending:
                self._look_after(read, time.monotonic())
            self._tell(pending)
            idle = self._remote.idle(self._has_arrived)
            for descriptor in idle:
                self._workers.submit(os.close, descriptor)  # which may hang, as everything below the view
            if not pending and not self._remote.any_open():
                self._busy.wait()
            self._busy.clear()
            time.sleep(WATCH_SECONDS)

    def _attempt(self, read: Read, now: float) -> None:
        read.under_way = True
        read.attempt_began = now
        with self._lock:
            self._pending.add(read)
        self._workers.submit(self._read_remote, read)

    def _read_remote(self, read: Read) -> None:
        """In a worker, which may hang here for as long as the view of the source does."""
        if read not in self._pending:
            return
        try:
            data = self._remote.read(read.path, read.size, read.offset, read.length)
        except ChangedError as error:
            self._refuse(read, f"cannot be read from the source: {error.strerror}")
        except OSError as error:
            read.failure = error.strerror or str(error)
            read.next_attempt = time.monotonic() + read.pause_seconds
            read.pause_seconds = min(read.pause_seconds * 2, LONGEST_PAUSE_SECONDS)
            read.under_way = False
        else:
            self._finish(read, data)
        self._busy.set()

    def _look_after(self, read: Read, now: float) -> None:
        if now >= read.next_look:
            read.next_look = now + LOOK_AGAIN_SECONDS
            try:
                data = self._from_replica(read)
            except OSError as error:
                self._refuse(read, f"cannot be read from this host's disk: {error.strerror}")
                return
            if data is not None:
                self._finish(read, data)
                return
        if now >= read.deadline:
            why = read.failure or "it does not answer"
            self._given_up[read.path] = now
            self._refuse(read, f"was not to be had from the source for {self._patience_seconds:g} s ({why})")
        elif not read.under_way and now >= read.next_attempt:
            self._attempt(read, now)
        elif read.under_way and not read.failure and now - read.attempt_began > HANGING_SECONDS:
            read.failure = "it does not answer"

    def _refuse(self, read: Read, why: str) -> None:
        if self._finish(read, None):
            self._log(f"{read.path!r} {why}; the reader got an error")

    def _finish(self, read: Read, data: bytes | None) -> bool:
        """Whether this was the answer; it was not if there had been one already."""
        with self._lock:
            if read not in self._pending:
                return False
            self._pending.remove(read)
        read.finished(data)
        return True

    def _tell(self, pending: list[Read]) -> None:
        failing = [read for read in pending if read.failure]
        if failing and not self._waiting:
            first = failing[0]
            self._log(f"the source cannot be read ({first.failure}); readers wait, the first for {first.path!r}")
        elif self._waiting and not failing:
            self._log("no reader waits for the source any more")
        self._waiting = bool(failing)

    def _from_replica(self, read: Read) -> bytes | None:
        """The bytes, if the file has arrived in full. Never waits for the source."""
        descriptor = self._arrived(read.path, read.size)
        if descriptor < 0:
            return None
        try:
            return _read_exactly(descriptor, read.offset, read.length)
        finally:
            os.close(descriptor)

    def _arrived(self, path: bytes, size: int) -> int:
        """A descriptor of the file in the replica; -1 when it is not there in full."""
        try:
            descriptor = open_beneath(self._replica, path, _FILE)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                return -1
            raise
        seen = os.fstat(descriptor)
        if stat.S_ISREG(seen.st_mode) and seen.st_size == size:
            return descriptor
        os.close(descriptor)
        return -1

    def _has_arrived(self, path: bytes, size: int) -> bool:
        try:
            descriptor = self._arrived(path, size)
        except OSError:
            return False
        if descriptor >= 0:
            os.close(descriptor)
        return descriptor >= 0


def _read_exactly(descriptor: int, offset: int, length: int) -> bytes:
    """Raises OSError (EIO) when the file ends before."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    pieces = [data]
    missing = length - len(data)
    while missing and data:
        data = os.pread(descriptor, missing, offset + length - missing)
        pieces.append(data)
        missing -= len(data)
    if missing:
        raise OSError(errno.EIO, f"it ended {missing} bytes too early")
    return b"".join(pieces)
