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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from hostd.beneath import open_beneath

REMOTE_WORKERS = 32
"""Reads of the source at once. sshfs itself has few connections; the rest wait for a place in them."""
IDLE_SECONDS = 1.0
"""How long a file of the source stays open after a read of it, because another read mostly follows."""
SWEEP_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 0.2
"""How often a waiting reader looks whether its file has arrived meanwhile."""
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
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
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    doomed: bool = False


class Remote:
    """The view of the source. Every method but ``sweep`` may hang for as long as the view does."""

    def __init__(self, stage: int) -> None:
        """``stage`` is a descriptor of the stage directory, below which the view is mounted as ``remote``."""
        self._stage = stage
        self._stage_device = os.fstat(stage).st_dev
        self._opened: dict[bytes, _Opened] = {}
        self._lock = threading.Lock()
        self.used = threading.Event()
        """Set after every read: there may be something to sweep."""

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

    def sweep(self, arrived: Callable[[bytes], bool]) -> int:
        """Close what nobody reads any more. Returns how many files of the source are open still."""
        now = time.monotonic()
        with self._lock:
            idle = [(path, opened) for path, opened in self._opened.items() if opened.users == 0]
        for path, opened in idle:
            if now - opened.used_at < IDLE_SECONDS and not arrived(path):
                continue
            with self._lock:
                if opened.users or self._opened.get(path) is not opened:
                    continue
                del self._opened[path]
            os.close(opened.descriptor)
        return len(self._opened)

    def _take(self, path: bytes, size: int) -> _Opened:
        with self._lock:
            opened = self._opened.get(path)
            if opened is not None:
                opened.users += 1
                return opened
        fresh = _Opened(self._open(path, size), users=1)
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
        self.used.set()
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
            seen = os.fstat(descriptor)
            if seen.st_dev == self._stage_device:
                raise OSError(errno.ENOTCONN, "the view of the source is not mounted")
            if not stat.S_ISREG(seen.st_mode):
                raise ChangedError(errno.EIO, "it is no regular file on the source any more")
            if seen.st_size != size:
                raise ChangedError(errno.EIO, f"it has {seen.st_size} bytes on the source, and had {size} at the stop")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


class Contents:
    """Reads of files by path and size, from whichever side has them. Safe to use from many threads."""

    def __init__(self, stage: bytes, *, patience_seconds: float, log: Callable[[str], None]) -> None:
        """``patience_seconds`` is how long a reader waits for a source that does not answer, before it gets EIO."""
        self._stage = os.open(stage, _ROOT)
        self._replica = os.open("replica", _ROOT, dir_fd=self._stage)
        self._remote = Remote(self._stage)
        self._workers = ThreadPoolExecutor(REMOTE_WORKERS, thread_name_prefix="remote")
        self._patience_seconds = patience_seconds
        self._log = log
        self._waiting = 0
        self._lock = threading.Lock()
        self._sizes: dict[bytes, int] = {}

    def read(self, path: bytes, size: int, offset: int, length: int) -> bytes:
        """What the file has there; shorter than ``length`` only at its end. Raises OSError (EIO) and nothing else."""
        length = min(length, size - offset)
        if length <= 0:
            return b""
        data = self.from_replica(path, size, offset, length)
        if data is None:
            data = self._from_either(path, size, offset, length)
        return data

    def from_replica(self, path: bytes, size: int, offset: int, length: int) -> bytes | None:
        """The same, if the file has arrived; None if not. Never waits for the source."""
        descriptor = self._arrived(path, size)
        if descriptor < 0:
            return None
        try:
            return _read_exactly(descriptor, offset, length)
        finally:
            os.close(descriptor)

    def sweep_forever(self, meanwhile: Callable[[], bool]) -> None:
        """Close files of the source that are not being read. Also calls ``meanwhile`` until it returns True."""
        done = False
        while True:
            done = done or meanwhile()
            left = self._remote.sweep(self._has_arrived)
            if left == 0 and done:
                self._remote.used.wait()
                self._remote.used.clear()
            time.sleep(SWEEP_SECONDS)

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

    def _has_arrived(self, path: bytes) -> bool:
        try:
            descriptor = self._arrived(path, self._sizes.get(path, -1))
        except OSError:
            return False
        if descriptor >= 0:
            os.close(descriptor)
        return descriptor >= 0

    def _from_either(self, path: bytes, size: int, offset: int, length: int) -> bytes:
        started = time.monotonic()
        deadline = started + self._patience_seconds
        pause = FIRST_PAUSE_SECONDS
        failed: OSError | None = None
        self._sizes[path] = size
        try:
            while True:
                attempt = self._workers.submit(self._remote.read, path, size, offset, length)
                while not wait([attempt], timeout=LOOK_AGAIN_SECONDS).done:
                    data = self.from_replica(path, size, offset, length)
                    now = time.monotonic()
                    if data is not None or now > deadline:
                        attempt.cancel()
                        if data is None:
                            raise self._given_up(path, failed)
                        return data
                    if failed is None and now - started > HANGING_SECONDS:
                        failed = OSError(errno.ETIMEDOUT, "it does not answer")
                        self._begin_waiting(path, failed)
                error = attempt.exception()
                if error is None:
                    return attempt.result()
                if isinstance(error, ChangedError):
                    self._log(f"{path!r} cannot be read: {error.strerror}; the reader gets an error")
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if not isinstance(error, OSError):
                    raise error
                if failed is None:
                    self._begin_waiting(path, error)
                failed = error
                ends = time.monotonic() + pause
                while (left := ends - time.monotonic()) > 0:
                    time.sleep(min(left, LOOK_AGAIN_SECONDS))
                    if (data := self.from_replica(path, size, offset, length)) is not None:
                        return data
                    if time.monotonic() > deadline:
                        raise self._given_up(path, failed)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
        finally:
            if failed is not None:
                self._end_waiting()

    def _given_up(self, path: bytes, failed: OSError | None) -> OSError:
        why = "it does not answer" if failed is None else failed.strerror
        self._log(
            f"{path!r} was not to be had from the source for {self._patience_seconds:g} s ({why}); the reader gets an error"
        )
        return OSError(errno.EIO, os.strerror(errno.EIO))

    def _begin_waiting(self, path: bytes, error: OSError) -> None:
        with self._lock:
            self._waiting += 1
            first = self._waiting == 1
        if first:
            self._log(f"the source cannot be read ({error.strerror}); readers wait, the first for {path!r}")

    def _end_waiting(self) -> None:
        with self._lock:
            self._waiting -= 1
            last = self._waiting == 0
        if last:
            self._log("no reader waits for the source any more")


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
