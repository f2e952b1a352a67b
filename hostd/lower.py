"""The lower layer of one union: a small read-only file system, served by a process of its own.

    python -m hostd.lower STAGE fsname=cargo-lower-… patience=600

It shows exactly the files that are listed in ``STAGE/placeholders`` (path and size), below ``STAGE/lower``: their
contents come from ``STAGE/replica`` or ``STAGE/remote``, see ``hostd/lower_contents.py``. Names, sizes and inode numbers
never change for as long as it is mounted, so the kernel may remember all of it, contents included.

The process outlives the agent, as a container's data must: it has a session of its own, ignores the signals that
end agents, and ends when its file system is unmounted. It may be started before there is a list: nothing is shown and
nothing is remembered until the list is there; from then on the list must not change. What it must never do: write
anything but its log, or decide anything; who mounts and unmounts is ``hostd/lower_process.py``.

The only module that imports mfusepy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import mfusepy
import msgspec

from hostd.lower_contents import Contents

ROOT_NODE = 1
FOREVER_SECONDS = 7 * 24 * 3600
SERVING_THREADS = 1024
"""A reader that waits for the source occupies one, and must leave enough for those who read what is here."""
BACKGROUND_REQUESTS = 512
"""The kernel's read-ahead: its default of 12 would be used up by a few readers that wait."""
SUBTYPE = "cargo"
LOG_FILE = "lower.log"
MAX_LOG_BYTES = 1024 * 1024
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class Listing:
    """The tree that the list of placeholders makes. Nodes are numbered: 1 is the root, then files, then directories."""

    def __init__(self, holders: list[tuple[bytes, int]]) -> None:
        self.paths: list[bytes] = [b"", b""]
        self.sizes: list[int] = [-1, -1]
        self.numbers: dict[bytes, int] = {b"": ROOT_NODE}
        self._children: dict[int, list[int]] | None = None
        for path, size in holders:
            if path not in self.numbers:
                self._add(path, size)
        for path, _ in holders:
            above = os.path.dirname(path)
            while above not in self.numbers:
                self._add(above, -1)
                above = os.path.dirname(above)

    def _add(self, path: bytes, size: int) -> None:
        self.numbers[path] = len(self.paths)
        self.paths.append(path)
        self.sizes.append(size)

    def children(self, number: int) -> list[int]:
        """The nodes directly in a directory."""
        if self._children is None:
            below: dict[int, list[int]] = {}
            for child in range(ROOT_NODE + 1, len(self.paths)):
                below.setdefault(self.numbers[os.path.dirname(self.paths[child])], []).append(child)
            self._children = below
        return self._children.get(number, [])

    def attributes(self, number: int) -> dict[str, int]:
        """What ``stat`` shows. The overlay shows the placeholder's own metadata, so only size and kind matter."""
        size = self.sizes[number]
        if size < 0:
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2, "st_ino": number}
        return {
            "st_mode": stat.S_IFREG | 0o644,
            "st_nlink": 1,
            "st_ino": number,
            "st_size": size,
            "st_blocks": -(-size // 512),
        }


EMPTY = Listing([])


class Lower:
    """The file system's operations, as mfusepy calls them, from many threads."""

    use_ns = True
    flag_nopath = True
    flag_nullpath_ok = True

    def __init__(self, stage: bytes, contents: Contents, ready: int) -> None:
        self._list = os.path.join(stage, b"placeholders")
        self._contents = contents
        self._ready = ready
        self._listing: Listing | None = None
        self._lock = threading.Lock()

    def init_with_config(self, connection: Any, config: Any) -> None:
        """The kernel has begun to ask."""
        connection.max_background = BACKGROUND_REQUESTS
        connection.congestion_threshold = BACKGROUND_REQUESTS * 3 // 4
        config.use_ino = 1
        config.kernel_cache = 1
        threading.Thread(target=self._contents.sweep_forever, args=(self.load,), daemon=True).start()
        os.write(self._ready, b"1")
        os.close(self._ready)

    def load(self) -> bool:
        """Read the list if it has not been read and is there. Returns whether it has been read."""
        return self._loaded() is not EMPTY

    def _loaded(self) -> Listing:
        if self._listing is None:
            with self._lock:
                if self._listing is None:
                    try:
                        with open(self._list, "rb") as file:
                            data = file.read()
                    except FileNotFoundError:
                        return EMPTY
                    # The first two fields of federation's record.
                    records = msgspec.msgpack.decode(data, type=list[tuple[bytes, int, int, bytes]])
                    self._listing = Listing([(record[0], record[1]) for record in records])
        return self._listing

    def _node(self, path: str | None, number: int | None = None) -> tuple[Listing, int]:
        listing = self._loaded()
        if path is not None:
            number = listing.numbers.get(os.fsencode(path[1:]))
        if not number or number >= len(listing.paths):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return listing, number

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        listing, number = (EMPTY, ROOT_NODE) if path == "/" else self._node(path, fh)
        return listing.attributes(number)

    def open(self, path: str, flags: int) -> int:
        listing, number = self._node(path)
        if listing.sizes[number] < 0:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        return number

    def read(self, path: str | None, length: int, offset: int, fh: int) -> bytes:
        listing, number = self._node(None, fh)
        return self._contents.read(listing.paths[number], listing.sizes[number], offset, length)

    def opendir(self, path: str) -> int:
        return self._node(path)[1]

    def readdir(self, path: str | None, fh: int) -> Iterator[tuple[str, dict[str, int], int]]:
        listing, number = self._node(None, fh)
        yield ".", listing.attributes(number), 0
        yield "..", listing.attributes(ROOT_NODE), 0
        for child in listing.children(number):
            yield os.fsdecode(os.path.basename(listing.paths[child])), listing.attributes(child), 0


def _logger(stage: bytes) -> Any:
    file = os.path.join(stage, os.fsencode(LOG_FILE))
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_size > MAX_LOG_BYTES:
        os.ftruncate(descriptor, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)

    def log(words: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError):  # a full disk must not stop the reads
            os.write(descriptor, f"{now} {words}\n".encode(errors="backslashreplace"))

    return log


def _become_a_daemon() -> int:
    """Fork. The child returns with a descriptor to say through that it serves; the parent waits for that and ends."""
    said, says = os.pipe()
    if os.fork():
        os.close(says)
        os._exit(0 if os.read(said, 1) == b"1" else 1)
    os.close(said)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")  # when memory is short, the data of a running container goes last
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("cargo-lower")
    return says


def main(arguments: list[str]) -> int:
    """Mount and serve until unmounted. The caller's process ends with 0 as soon as the file system answers."""
    stage, source, patience = arguments
    says = _become_a_daemon()
    raw = os.fsencode(stage)
    mountpoint = os.path.join(stage, "lower")
    log = _logger(raw)
    contents = Contents(raw, patience_seconds=float(patience.removeprefix("patience=")), log=log)
    mfusepy.FUSE(
        Lower(raw, contents, says),
        mountpoint,
        foreground=True,
        fsname=source.removeprefix("fsname="),
        subtype=SUBTYPE,
        ro=True,
        allow_other=True,
        entry_timeout=FOREVER_SECONDS,
        attr_timeout=FOREVER_SECONDS,
        negative_timeout=0,
        max_threads=SERVING_THREADS,
        max_idle_threads=16,
    )
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(sys.argv[1:])
    except Exception as error:
        sys.stderr.write(f"the lower layer could not be served: {error}\n")
    finally:
        os._exit(code)  # worker threads may still wait for a source that hangs
