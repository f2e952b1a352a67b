"""From a union back to a plain directory: contents move under their names, marks go, the tree takes its place.

Nothing here runs while the union is mounted anywhere; the caller (``hostd/federation.py``) makes sure of that.
Every step can be cut off by a crash at any point and is then simply begun again (D24): data is linked under its
final name before anything else refers to it, what would be lost on the way (directory times) is in a journal
first, and the tree takes its place by one exchange of two names. What it must never do: drop a placeholder
whose contents are not here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from events.errors import PermanentError
from hostd.beneath import Beneath, born_ns, exchange, reach, remove_tree
from hostd.own_file import read_own
from hostd.placement import METACOPY, OVERLAY_PREFIX, REDIRECT, Metadata, read_xattrs, set_metadata
from hostd.transport import sync_filesystem

WHITEOUT_MARK = b"trusted.overlay.whiteout"
MAX_NAMED = 10


class _Times(msgspec.Struct, frozen=True, array_like=True):
    path: bytes
    atime_ns: int
    mtime_ns: int


class _Swap(msgspec.Struct, frozen=True, array_like=True):
    """Which tree it is, whatever its name: a file system gives the number of what is removed to what is made next."""

    inode: int
    born_ns: int | None = None

    @classmethod
    def of(cls, path: Path) -> _Swap | None:
        """Of what lies at ``path``, if anything does."""
        try:
            return cls(path.lstat().st_ino, born_ns(path))
        except FileNotFoundError:
            return None

    def lies_at(self, path: Path) -> bool:
        found = _Swap.of(path)
        if found is None or found.inode != self.inode:
            return False
        return found.born_ns == self.born_ns or None in (found.born_ns, self.born_ns)


@dataclass
class _Work:
    placeholders: list[tuple[bytes, bytes]] = field(default_factory=list)
    """(path in the tree, path in the replica)."""
    whiteouts: list[bytes] = field(default_factory=list)
    directories: list[_Times] = field(default_factory=list)
    """The times of the directories that the above will disturb."""


def fold_tree(tree: Path, replica: Path, spare: Path, journal: Path, *, layer: bool = False) -> int:
    """Make ``tree`` a plain directory with all contents in it. Returns the number of files that were completed.

    ``layer``: it is a container's writable layer, whose whiteouts and marks are data, not traces of a union.
    Raises PermanentError, with nothing changed, when contents are missing.
    """
    spare.mkdir(mode=0o700, exist_ok=True)
    with Beneath(tree) as upper, Beneath(replica) as contents, Beneath(spare) as aside:
        work = _survey(upper, layer=layer)
        _require_contents(upper, contents, work)
        if journal.exists():
            # An earlier attempt disturbed the times already; only its own record of them is true.
            times = read_own(journal, list[_Times])
        else:
            times = work.directories
            write_durably(journal, msgspec.msgpack.encode(times))
        for path in work.whiteouts:
            at, name = upper.locate(path)
            os.unlink(name, dir_fd=at)
        for path, source in work.placeholders:
            _complete(upper, path, contents, source, aside, spare)
        if not layer:
            _strip_marks(upper)
        for record in sorted(times, key=lambda record: record.path, reverse=True):
            at, name = upper.locate(record.path)
            os.utime(name, ns=(record.atime_ns, record.mtime_ns), dir_fd=at, follow_symlinks=False)
    sync_filesystem(tree)
    return len(work.placeholders)


def swap_into_place(tree: Path, place: Path, journal: Path) -> None:
    """Exchange ``tree`` with what lies at ``place``, once. What lay there is at ``tree`` afterwards.

    Raises PermanentError when neither name holds what the journal says.
    """
    if not journal.exists():
        write_durably(journal, msgspec.msgpack.encode(_Swap(tree.lstat().st_ino, born_ns(tree))))
    wanted = read_own(journal, _Swap)
    if wanted.lies_at(place):
        return
    if not wanted.lies_at(tree):
        raise PermanentError(
            f"the data that should take its place at {place} is neither there nor at {tree}. Nothing was changed; "
            "somebody has moved it by hand, and a person has to look."
        )
    try:
        exchange(tree, place)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise PermanentError(f"{tree} could not take its place at {place}: {error.strerror}") from error
        tree.rename(place)
    # What is in the tree has been brought to the disk; to wait here for what others write would be a part of the outage.
    sync_directory(place.parent)
    sync_directory(tree.parent)


def swapped(place: Path, journal: Path) -> bool:
    """Whether ``swap_into_place`` has done its work."""
    if not journal.exists():
        return False
    return read_own(journal, _Swap).lies_at(place)


def may_take_its_place(tree: Path, journal: Path) -> bool:
    """Whether ``tree`` is what ``swap_into_place`` is to bring, or has brought, to a place."""
    if not journal.exists():
        return tree.exists()
    return read_own(journal, _Swap).lies_at(tree)


def write_durably(file: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a small file, private by default, so that after a crash it is either whole or absent."""
    new = file.with_name(file.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, mode)  # whatever the umask is
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(file)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """What was created, renamed or removed in it is so after a crash, too. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _survey(upper: Beneath, *, layer: bool) -> _Work:
    work = _Work()
    for directory, entries in upper.walk():
        disturbed = False
        at = upper.directory(directory)
        for name, seen in entries:
            path = directory + b"/" + name if directory else name
            if stat.S_ISCHR(seen.st_mode) and seen.st_rdev == 0 and not layer:
                work.whiteouts.append(path)
                disturbed = True
            elif stat.S_ISREG(seen.st_mode):
                marks = read_xattrs(at, name)
                if METACOPY in marks:
                    work.placeholders.append((path, _redirect(path, marks)))
                    disturbed = True
                elif WHITEOUT_MARK in marks and seen.st_size == 0 and not layer:
                    work.whiteouts.append(path)
                    disturbed = True
        if disturbed:
            own = os.fstat(at)
            work.directories.append(_Times(directory, own.st_atime_ns, own.st_mtime_ns))
    return work


def _redirect(path: bytes, marks: dict[bytes, bytes]) -> bytes:
    redirect = marks.get(REDIRECT, b"")
    source = redirect.lstrip(b"/")
    if not redirect.startswith(b"/") or not source or b".." in source.split(b"/"):
        raise PermanentError(
            f"{path!r} has its contents elsewhere, but does not say where ({redirect!r}). Nothing was folded; the "
            "union can be mounted again as it is."
        )
    return source


def _require_contents(upper: Beneath, contents: Beneath, work: _Work) -> None:
    missing = []
    for path, source in work.placeholders:
        wanted, found = upper.stat(path), contents.stat(source)
        if wanted is None:
            continue
        if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != wanted.st_size:
            missing.append(source)
    if missing:
        named = ", ".join(repr(path) for path in missing[:MAX_NAMED])
        raise PermanentError(
            f"{len(missing)} files have no contents on this host yet: {named}. Nothing was folded; mount the union "
            "again and let the fill finish."
        )


def _complete(upper: Beneath, path: bytes, contents: Beneath, source: bytes, aside: Beneath, spare: Path) -> None:
    """Replace one name of a placeholder by its contents, which take on all of its metadata.

    The contents stay in the replica under their old name, so further names of the same file find them, now
    and after a crash; the replica goes as a whole later.
    """
    at, name = upper.locate(path)
    wanted = Metadata.read(at, name)
    access = os.stat(name, dir_fd=at, follow_symlinks=False).st_atime_ns
    at, name = contents.locate(source)
    set_metadata(at, name, wanted)
    os.utime(name, ns=(access, wanted.mtime_ns), dir_fd=at, follow_symlinks=False)
    remove_tree(aside.root, b"link", spare / "trash")
    os.link(name, b"link", src_dir_fd=at, dst_dir_fd=aside.root, follow_symlinks=False)
    at, name = upper.locate(path)
    os.rename(b"link", name, src_dir_fd=aside.root, dst_dir_fd=at)


def _strip_marks(upper: Beneath) -> None:
    for at, name in _everything(upper):
        marks = [key for key in read_xattrs(at, name) if key.startswith(OVERLAY_PREFIX)]
        for key in marks:
            os.removexattr(reach(at, name), key, follow_symlinks=False)


def _everything(upper: Beneath) -> Iterator[tuple[int, bytes]]:
    yield upper.root, b"."
    for directory, entries in upper.walk():
        for name, _ in entries:
            yield upper.directory(directory), name
