"""A seeded random workload on a directory tree: everything that a container may do to its files.

Names are few, so that they collide; some are not UTF-8. Steps that cannot work at the moment do nothing. Nothing
outside of the tree is touched. As a program (``python -m tests.support.workload TREE SEED``) it works at full
speed until its standard input ends, then finishes its step and leaves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import select
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hostd.beneath import exchange

NAMES = (b"a", b"b", b"c", b"d", b"e", b"f", b"-g", b"h i", b"j\nk", b"\xff\xfe", b"*", b"l" * 200)
KEEP_PUNCHED = 0x1 | 0x2
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE of fallocate(2)."""
UTIME_OMIT = (1 << 30) - 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class Workload:
    """``step`` does one random thing. The same seed on the same tree does the same, but for inode numbers."""

    def __init__(self, tree: Path, seed: int, *, max_entries: int = 60) -> None:
        self.root = os.fsencode(tree)
        self.random = random.Random(seed)
        self.max_entries = max_entries
        self.done: list[str] = []
        """What was done, for the report of a failing seed."""
        self._linked: set[int] = set()
        self._steps: list[Callable[[], None]] = [
            self.create, self.create, self.write, self.append, self.truncate, self.rename, self.rename,
            self.rename_over, self.swap, self.make_and_fill, self.make_and_fill, self.link, self.link,
            self.unlink, self.unlink, self.remove_tree, self.chmod, self.chown, self.utime, self.mtime_only,
            self.xattr, self.symlink, self.special, self.map_and_write, self.punch, self.other_type,
            self.away_and_back, self.replace_directory, self.empty_and_refill, self.open_only,
        ]  # fmt: skip

    def populate(self, entries: int = 25) -> None:
        """The tree before the story begins."""
        for _ in range(entries):
            self._attempt(self.random.choice([self.create, self.create, self.make_and_fill, self.link, self.symlink]))
        self.settled()

    def settled(self) -> None:
        """Say that the tracker has caught up with all hard links made so far."""
        self._linked.clear()

    def step(self) -> None:
        """One random change."""
        if len(self._all()) > self.max_entries:
            self._attempt(self.remove_tree)
        self._attempt(self.random.choice(self._steps))

    def _attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            self.done.append(f"{what.__name__}: {error}")

    # --- choosing ------------------------------------------------------------------------------

    def _all(self) -> list[bytes]:
        found = []
        waiting = [self.root]
        while waiting:
            for entry in sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name):
                found.append(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
        return found

    def _pick(self, *kinds: int) -> bytes:
        paths = [path for path in self._all() if not kinds or stat.S_IFMT(os.lstat(path).st_mode) in kinds]
        if not paths:
            raise FileNotFoundError(0, "nothing to choose from")
        return self.random.choice(paths)

    def _touched(self, *kinds: int) -> bytes:
        """Something to be changed in place. inotify alone cannot tell of a change through a name that lived too
        briefly to be looked at, so files whose new names may not have been seen yet are left in peace."""
        path = self._pick(*kinds)
        if os.lstat(path).st_ino in self._linked:
            raise FileNotFoundError(0, "its names are too new")
        return path

    def _written(self) -> bytes:
        return self._touched(stat.S_IFREG)

    def _folder(self) -> bytes:
        folders = [path for path in self._all() if stat.S_ISDIR(os.lstat(path).st_mode)]
        return self.random.choice([self.root, self.root, *folders])

    def _new(self) -> bytes:
        return self._folder() + b"/" + self.random.choice(NAMES)

    def _data(self) -> bytes:
        size = self.random.choice((0, 1, 7, 100, 4096, 5000, 20000))
        return self.random.randbytes(size)

    def _say(self, *paths: bytes) -> None:
        verb = sys._getframe(1).f_code.co_name
        self.done.append(f"{verb} {' '.join(repr(path[len(self.root) + 1 :]) for path in paths)}")

    # --- files ---------------------------------------------------------------------------------

    def create(self) -> None:
        path = self._new()
        self._say(path)
        if os.path.lexists(path) and os.lstat(path).st_ino in self._linked:
            return
        with open(path, "wb", opener=_nofollow) as file:
            file.write(self._data())

    def write(self) -> None:
        path = self._written()
        self._say(path)
        with open(path, "r+b") as file:
            file.seek(self.random.randrange(6000))
            file.write(self._data())

    def append(self) -> None:
        path = self._written()
        self._say(path)
        with open(path, "ab") as file:
            file.write(self._data())

    def truncate(self) -> None:
        path = self._written()
        self._say(path)
        os.truncate(path, self.random.randrange(9000))

    def map_and_write(self) -> None:
        path = self._written()
        self._say(path)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[self.random.randrange(len(view))] = self.random.randrange(256)

    def punch(self) -> None:
        path = self._written()
        self._say(path)
        with open(path, "r+b") as file:
            _libc.fallocate(file.fileno(), KEEP_PUNCHED, 0, 4096)

    def open_only(self) -> None:
        path = self._written()
        self._say(path)
        os.close(os.open(path, os.O_RDWR))

    def unlink(self) -> None:
        path = self._pick(stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR)
        self._say(path)
        os.unlink(path)

    def link(self) -> None:
        old, new = self._pick(stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK), self._new()
        self._say(old, new)
        os.link(old, new, follow_symlinks=False)
        self._linked.add(os.lstat(old).st_ino)

    def symlink(self) -> None:
        path = self._new()
        self._say(path)
        os.symlink(self.random.choice((b"a", b"../b", b"/nowhere", b".", b"\xff")), path)

    def special(self) -> None:
        path = self._new()
        self._say(path)
        kind, device = self.random.choice(((stat.S_IFIFO, 0), (stat.S_IFCHR, os.makedev(1, 3))))
        os.mknod(path, kind | 0o640, device)

    # --- metadata ------------------------------------------------------------------------------

    def chmod(self) -> None:
        path = self._touched(stat.S_IFREG, stat.S_IFDIR)
        self._say(path)
        os.chmod(path, self.random.choice((0o600, 0o644, 0o700, 0o755, 0o4755, 0o1777)))

    def chown(self) -> None:
        path = self._touched()
        self._say(path)
        os.chown(path, self.random.randrange(2000), self.random.randrange(2000), follow_symlinks=False)

    def utime(self) -> None:
        path = self._touched() if self.random.random() < 0.8 else self.root
        self._say(path)
        os.utime(path, ns=(1, self.random.randrange(10**18)), follow_symlinks=False)

    def mtime_only(self) -> None:
        """inotify calls this a modification, of directories too."""
        path = self._touched(stat.S_IFREG, stat.S_IFDIR)
        self._say(path)
        times = (ctypes.c_long * 4)(0, UTIME_OMIT, self.random.randrange(10**9), self.random.randrange(10**9))
        _libc.utimensat(-100, ctypes.c_char_p(path), times, 0)

    def xattr(self) -> None:
        path = self._touched(stat.S_IFREG, stat.S_IFDIR)
        self._say(path)
        if self.random.random() < 0.3 and os.listxattr(path):
            os.removexattr(path, os.listxattr(path)[0])
        else:
            os.setxattr(path, self.random.choice((b"user.a", b"trusted.b")), self.random.randbytes(9))

    # --- names and directories -----------------------------------------------------------------

    def rename(self) -> None:
        old, new = self._pick(), self._new()
        self._say(old, new)
        if not os.path.lexists(new):
            os.rename(old, new)

    def rename_over(self) -> None:
        old, new = self._pick(), self._pick()
        self._say(old, new)
        os.rename(old, new)

    def swap(self) -> None:
        one, other = self._pick(), self._pick()
        self._say(one, other)
        exchange(one, other)

    def make_and_fill(self) -> None:
        path = self._new()
        self._say(path)
        for _ in range(self.random.randrange(1, 4)):
            os.mkdir(path)
            for name in self.random.sample(NAMES, 2):
                with open(path + b"/" + name, "wb") as file:
                    file.write(self._data())
            path += b"/" + self.random.choice(NAMES[:4])
            if os.path.lexists(path):
                break

    def remove_tree(self) -> None:
        path = self._pick(stat.S_IFDIR)
        self._say(path)
        shutil.rmtree(path)

    def other_type(self) -> None:
        path = self._pick()
        self._say(path)
        self._remove(path)
        self.random.choice((
            lambda: os.mkdir(path),
            lambda: os.symlink(b"a", path),
            lambda: os.mknod(path, stat.S_IFIFO | 0o600),
            lambda: _write(path, self._data()),
        ))()  # fmt: skip

    def away_and_back(self) -> None:
        path, other = self._pick(stat.S_IFDIR), self.root + b"/away"
        self._say(path)
        os.rename(path, other)
        if self.random.random() < 0.5:
            _write(other + b"/" + self.random.choice(NAMES) + b"x", self._data())
        os.rename(other, path)

    def replace_directory(self) -> None:
        """Another directory takes its place, and no event says which names went with it."""
        path, new = self._pick(stat.S_IFDIR), self.root + b"/new"
        self._say(path)
        os.mkdir(new)
        _write(new + b"/" + self.random.choice(NAMES), self._data())
        old = self.root + b"/old%d" % self.random.randrange(3)
        os.rename(path, old)
        os.rename(new, path)

    def empty_and_refill(self) -> None:
        path = self._pick(stat.S_IFDIR)
        self._say(path)
        shutil.rmtree(path)
        os.mkdir(path)
        _write(path + b"/" + self.random.choice(NAMES), self._data())

    def _remove(self, path: bytes) -> None:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _nofollow(path: str | bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def _write(path: bytes, data: bytes) -> None:
    with open(path, "wb", opener=_nofollow) as file:
        file.write(data)


def main() -> None:
    """Work until standard input ends."""
    workload = Workload(Path(sys.argv[1]), int(sys.argv[2]))
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    while not select.select([sys.stdin], [], [], pause)[0]:
        workload.step()
        workload.done.clear()
    time.sleep(0)


if __name__ == "__main__":
    main()
