"""What lets the kernel itself read the contents that have arrived, without asking the server of the lower layer.

Beside the lower layer, in a union's stage, where the kernel has overlayfs's *data-only layers* (Linux 6.5)::

    names     for each placeholder, under its path, an empty file of its size with the two marks of a placeholder
    twins     a second name of each of these files
    present   a second name of each file of the replica that is whole and on disk

and the union is ``names :: present :: lower`` below the upper. A placeholder of the upper leads to its file in ``names``,
which says: look for the contents under this path in the layers that hold nothing but data. The kernel does so when
a file is opened, or changed in any way, for the first time, ``present`` before ``lower``. So looking and listing never concern
the server, nor do contents that are here.

``names`` never changes while the union is mounted. ``present`` grows, and that is all that it does: a file is linked
into it, never replaced or removed. The kernel keeps nothing of a data-only layer but the files that it has found there
(``ovl_lookup_data_layers`` walks from the layer's root each time), so a file that was looked for in vain is found by the
next who opens it, unless somebody still holds what ``lower`` shows of it, which has the same contents. In ordinary
layers the same would not be safe: there the kernel compares what it finds with what it has found before, and
answers ESTALE. Why the further names: of a file in ``names`` that has one name only overlayfs would show the inode number, until
the container writes to it.

What it must never do: show a file that is not whole, or let the union depend on it. Where the kernel has no such layers,
or there is no room for ``names``, the lower layer alone shows everything, as it does for what is missing here.

Stands below ``hostd/federation.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from events.errors import PermanentError
from hostd import mounts
from hostd.beneath import Beneath, remove_tree
from hostd.own_file import read_own
from hostd.placement import METACOPY, OPAQUE, REDIRECT, Placeholder
from hostd.transport import sync_filesystem

LAYERS = "lowerdir=names::present::lower"
DIRECTORIES = ("names", "twins", "present")
_MARK = "names.complete"
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMLINK}


class _Mark(msgspec.Struct, frozen=True, array_like=True):
    """Of which version of the list of placeholders ``names`` has all."""

    inode: int
    mtime_ns: int
    size: int


class LocalReads:
    """Of one stage. ``admit`` may be called from several threads, under the mounted union."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._mark = stage / _MARK

    def prepare(self) -> None:
        """Make the directories: from now on the union uses them. Only where the kernel was tried."""
        for name in DIRECTORIES:
            (self._stage / name).mkdir(mode=0o700, exist_ok=True)

    @property
    def prepared(self) -> bool:
        """Whether this union was made for it."""
        return (self._stage / "names").is_dir()

    # --- before the union is mounted -----------------------------------------------------------

    def describe(self, holders: Iterable[Placeholder]) -> bool:
        """Put these placeholders into ``names``. False when there is no room; then all of it goes, and the union does without.

        Raises OSError for anything else.
        """
        prefix = os.urandom(6).hex()
        with Beneath(self._stage / "names") as names, Beneath(self._stage / "twins") as twins:
            try:
                for number, holder in enumerate(holders):
                    self._describe(names, twins.root, f"{prefix}-{number}".encode(), holder)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
            else:
                return True
        with Beneath(self._stage) as inside:
            for name in DIRECTORIES:
                remove_tree(inside.root, name.encode(), self._stage / "trash")
        return False

    def _describe(self, names: Beneath, twins: int, twin: bytes, holder: Placeholder) -> None:
        seen = names.stat(holder.path)
        if seen is not None and stat.S_ISREG(seen.st_mode) and seen.st_size == holder.size and seen.st_nlink > 1:
            return  # the marks say nothing but the path
        descriptor = os.open(twin, _FLAGS, 0o600, dir_fd=twins)
        try:
            os.ftruncate(descriptor, holder.size)  # as much is copied when the file is opened for writing
            os.setxattr(descriptor, METACOPY, b"")
            os.setxattr(descriptor, REDIRECT, b"/" + holder.path)
        finally:
            os.close(descriptor)
        try:
            _link(twin, twins, names, holder.path)
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            self._clear(names, holder.path)
            names.make_parents(holder.path)
            _link(twin, twins, names, holder.path)

    def _clear(self, names: Beneath, path: bytes) -> None:
        """What an earlier list had under this name, or where it now has a directory on the way."""
        above = os.path.dirname(path)
        while above:
            seen = names.stat(above)
            if seen is not None and not stat.S_ISDIR(seen.st_mode):
                self._remove(names, above)
            above = os.path.dirname(above)
        if names.stat(path) is not None:
            self._remove(names, path)

    def _remove(self, names: Beneath, path: bytes) -> None:
        at, name = names.locate(path)
        remove_tree(at, name, self._stage / "trash")
        names.forget()

    def vouch(self, listing: Path) -> None:
        """``names`` has every placeholder of this list. Lasting once the file system has been flushed, as is the rest."""
        seen = listing.stat()
        draft = self._mark.with_suffix(".new")
        draft.write_bytes(msgspec.msgpack.encode(_Mark(seen.st_ino, seen.st_mtime_ns, seen.st_size)))
        os.replace(draft, self._mark)

    def vouched(self, listing: Path) -> bool:
        """Whether the union may be mounted with these layers, for this list."""
        if not self.prepared or not self._mark.exists() or not listing.exists():
            return False
        seen = listing.stat()
        try:
            mark = read_own(self._mark, _Mark)
        except PermanentError:
            return False  # it only says that the short way is open
        return mark == _Mark(seen.st_ino, seen.st_mtime_ns, seen.st_size)

    # --- while the fill goes on --------------------------------------------------------------------

    def admit(self, holders: Iterable[Placeholder], *, on_disk: bool = False) -> int:
        """Let the kernel read by itself those that are in the replica, in full. Returns how many came to that.

        They are flushed first, unless they are ``on_disk``: after a loss of power a file that was not may have its name and
        no contents, and here nobody looks at its size any more. Those for which there is no room are read through the
        server. Raises OSError for anything else.
        """
        if not self.prepared or not any(os.scandir(self._stage / "replica")):
            return 0
        count = 0
        with Beneath(self._stage / "replica") as replica, Beneath(self._stage / "present") as present:
            whole = [holder for holder in holders if _is_whole(replica, holder)]
            if not on_disk:
                whole = [holder for holder in whole if present.stat(holder.path) is None]
            if whole and not on_disk:
                sync_filesystem(self._stage)
            try:
                for holder in whole:
                    count += _admit(replica, present, holder.path)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
        return count

    def let_go_of_server(self) -> None:
        """Have the kernel forget which files it has read through the server, those apart that somebody holds open.

        Everyone else reads what has arrived by himself from then on. Harmless, and saves time only.
        """
        merged = self._stage / "merged"
        record = mounts.mount_at(merged)
        if record is not None and self.used_by(record.options):
            # The kernel gives up the names of this file system that nobody uses.
            with contextlib.suppress(PermanentError):
                mounts.remount(merged)

    @staticmethod
    def used_by(options: bytes) -> bool:
        """Whether a union with these options in the mount table has these layers."""
        return LAYERS.encode() in options.split(b",")


def _is_whole(replica: Beneath, holder: Placeholder) -> bool:
    seen = replica.stat(holder.path)
    return seen is not None and stat.S_ISREG(seen.st_mode) and seen.st_size == holder.size


def _admit(replica: Beneath, present: Beneath, path: bytes) -> bool:
    source, name = replica.locate(path)
    try:
        _link(name, source, present, path)
    except FileNotFoundError:
        present.make_parents(path)
    except FileExistsError:
        return False
    else:
        return True
    try:
        _link(name, source, present, path)
    except FileExistsError:
        return False
    return True


def _link(name: bytes, at: int, tree: Beneath, path: bytes) -> None:
    """Give a file the further name ``path`` in ``tree``."""
    to, last = tree.locate(path)
    os.link(name, last, src_dir_fd=at, dst_dir_fd=to, follow_symlinks=False)


def possible(trial: Path, name: str, options: str) -> bool:
    """Whether this kernel and file system do it: tried with a tiny union. ``trial`` is an empty directory on the file system."""
    holders = [Placeholder(b"sub/first", 5), Placeholder(b"sub/second", 5)]
    for directory in (*DIRECTORIES, "replica/sub", "lower/sub", "upper/tree", "work", "merged"):
        (trial / directory).mkdir(parents=True)
    try:
        (trial / "replica/sub/first").write_bytes(b"first")
        (trial / "lower/sub/second").write_bytes(b"other")
        for number, holder in enumerate(holders):
            file = trial / "upper" / "tree" / str(number)
            file.touch()
            os.truncate(file, holder.size)
            os.setxattr(file, METACOPY, b"")
            os.setxattr(file, REDIRECT, b"/" + holder.path)
        os.setxattr(trial / "upper" / "tree", OPAQUE, b"y")
        reads = LocalReads(trial)
        if not reads.describe(holders):
            return False
        mounts.mount("overlay", name, "merged", options, working_directory=trial)
        tree = trial / "merged" / "tree"
        before = (tree / "1").read_bytes()
        reads.admit(holders, on_disk=True)  # under the mounted union, as it will be
        return (before, (tree / "0").read_bytes()) == (b"other", b"first")
    except (OSError, PermanentError):
        return False
    finally:
        mounts.unmount(trial / "merged")
