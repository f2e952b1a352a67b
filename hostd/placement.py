"""Applying a dirty manifest to what the pre-copy rounds brought: the step that makes the cut-over short.

After it, the upper tree equals the frozen source in everything but the contents of stale files. Directories,
symlinks, devices, empty files, deletions and metadata are applied here; a file whose contents must still come
from the source becomes a *placeholder*: an empty sparse file of the right size with its exact owner, mode,
times, xattrs and ACLs, and two marks that make the kernel read its data from the lower layer
(``trusted.overlay.metacopy`` and ``trusted.overlay.redirect``, see the kernel's overlayfs document).

It must never follow a symlink or a mount out of the tree, never change a tree that is mounted in a union, and
never leave a half-made file under its final name: everything is built aside and renamed over. Applying the
same manifest twice is harmless, so a crash in the middle is mended by applying it again.

A manifest lists every name of a hard-link group if it lists one, and every ancestor of whatever it lists. Where
it lists a directory as *stale*, it lists all that is in it, and whatever else lies there is to go.

Flow: the target fetches the manifest after ``source_stopped`` and calls ``apply`` before it mounts the union.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from events.errors import PermanentError, RefusedError
from hostd.beneath import Beneath, empty_directory, reach, remove_tree
from hostd.entry import LAYER_MARKS, escape

if TYPE_CHECKING:
    from hostd.manifest import Entry

OVERLAY_PREFIX = b"trusted.overlay."
METACOPY = b"trusted.overlay.metacopy"
REDIRECT = b"trusted.overlay.redirect"
OPAQUE = b"trusted.overlay.opaque"
MAX_REDIRECT_BYTES = 2048
"""A redirect shares one 4 KiB block with the file's other xattrs on ext4."""
MAX_HANDLE_BYTES = 128
"""MAX_HANDLE_SZ of name_to_handle_at(2)."""
_BLOCK_BYTES = 4096
_ZEROS = memoryview(bytes(_BLOCK_BYTES))
_TYPES = {"d": stat.S_IFDIR, "f": stat.S_IFREG, "l": stat.S_IFLNK}
_TYPES |= {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO, "s": stat.S_IFSOCK}
_libc = ctypes.CDLL(None, use_errno=True)

Giver = Callable[[list[tuple[bytes, int]]], Mapping[bytes, bytes]]
"""Gives the contents of files, by path and size, that it has; the others not."""


@dataclass(frozen=True)
class Placeholder:
    """A file of the upper whose contents are elsewhere."""

    path: bytes
    """Where its contents lie: relative path in the source, and in the replica once filled."""
    size: int
    handle_type: int = 0
    handle: bytes = b""
    """The kernel's lasting handle of the placeholder, valid whatever is renamed. Empty where unsupported."""


@dataclass
class Applied:
    """What one application did."""

    placeholders: list[Placeholder] = field(default_factory=list)
    stale_bytes: int = 0
    written: int = 0
    """Files whose contents were given."""
    removed: int = 0
    entries: int = 0


def obstacles(entries: Iterable[Entry]) -> list[str]:
    """Why a tree with these entries cannot be federated, in words; empty when it can."""
    reasons = []
    for entry in entries:
        if len(entry.path) + 1 > MAX_REDIRECT_BYTES:
            shown = escape(entry.path[:60])
            reasons.append(f"the path {shown}… is longer than {MAX_REDIRECT_BYTES} bytes, too long for a redirect")
        if entry.kind == "c" and entry.rdev == 0:
            reasons.append(f"{escape(entry.path)} is a character device 0:0, which overlayfs takes for a deletion")
        if any(name.startswith(OVERLAY_PREFIX) for name, _ in entry.xattrs):
            reasons.append(f"{escape(entry.path)} carries trusted.overlay attributes: it is an overlay's layer")
    return reasons


def apply(
    upper_tree: Path,
    basis: Path,
    entries: Iterable[Entry],
    *,
    everything: bool = False,
    spare: Path | None = None,
    layer: bool = False,
    contents: Giver | None = None,
) -> Applied:
    """Make ``upper_tree`` equal to the source as the manifest describes it, contents of stale files excepted.

    ``contents`` is asked once, for all that a placeholder would stand for, and what it gives is written instead. ``basis`` receives the old version of each stale file, at the same relative path. ``everything`` says that
    the manifest lists the whole tree, so whatever it does not list is removed. ``spare`` is a directory for
    things in the making, on the same file system (default: next to ``basis``).

    A tree that is a single file takes metadata only: its contents must have been pulled already. ``layer``: the
    tree is a container's writable layer, in which a device 0:0 and the marks of overlayfs mean what they say, and of
    whose stale directories the names are listed, not all that is below these.

    Raises RefusedError when the tree cannot be federated, PermanentError when the manifest contradicts itself
    or this file system cannot hold what it says. Nothing outside of the three directories is touched.
    """
    listed = _checked(entries)
    if not layer and (reasons := obstacles(listed)):
        raise RefusedError(reasons)
    spare = basis.with_name("spare") if spare is None else spare
    if not stat.S_ISDIR(upper_tree.lstat().st_mode):
        return _apply_to_file(upper_tree, listed)
    for directory in (spare, basis):
        directory.mkdir(mode=0o700, exist_ok=True)
    with Beneath(upper_tree) as tree, Beneath(spare) as aside, Beneath(basis) as old:
        empty_directory(aside.root)
        placement = _Placement(tree, aside, old, spare, layer=layer, contents=contents)
        current = b""
        try:
            for step in placement.steps(listed, everything=everything):
                current = step
        except OSError as error:
            raise PermanentError(
                f"{escape(current)} could not be made equal to the source: {error.strerror or error}. The container has "
                "not been started here and its data on the source is whole."
            ) from error
        empty_directory(aside.root)
        return placement.applied


def prune(upper_tree: Path, spare: Path, entries: Iterable[Entry], *, layer: bool = False) -> int:
    """Between two pre-copy rounds: remove what the manifest says is gone, and return how many paths that were.

    rsync brings what a list names, but it removes nothing for a list, and does not see what else lies in a directory that
    was replaced. Call this before such a pull. ``layer``: as for ``apply``.
    """
    listed = _checked(entries)
    if not stat.S_ISDIR(upper_tree.lstat().st_mode):
        return 0
    spare.mkdir(mode=0o700, exist_ok=True)
    with Beneath(upper_tree) as tree, Beneath(spare) as aside:
        placement = _Placement(tree, aside, aside, spare, layer=layer)
        try:
            for _ in placement.removals(listed, everything=False):
                pass
            if layer:
                placement.remove_other_kinds(listed)
        except OSError as error:
            raise PermanentError(f"what is gone could not be removed from {upper_tree}: {error}") from error
        empty_directory(aside.root)
        return placement.applied.removed


def _checked(entries: Iterable[Entry]) -> list[Entry]:
    """Sorted so that a directory precedes what is in it. Paths were validated on reading; here once more."""
    listed = sorted(entries, key=lambda entry: entry.path.split(b"/"))
    previous: bytes | None = None
    for entry in listed:
        parts = entry.path.split(b"/") if entry.path else []
        if any(part in {b"", b".", b".."} or b"\0" in part for part in parts):
            raise PermanentError(f"the manifest holds a path that leads out of the tree: {entry.path!r}")
        if entry.path == previous:
            raise PermanentError(f"the manifest lists {entry.path!r} twice")
        if entry.kind not in _TYPES and entry.kind != "-":
            raise PermanentError(f"the manifest holds an unknown kind {entry.kind!r} for {entry.path!r}")
        previous = entry.path
    return listed


def _apply_to_file(file: Path, listed: list[Entry]) -> Applied:
    """The mount is one file: no union is possible over it, so there are no placeholders either."""
    if not listed:
        return Applied()
    entry = listed[0]
    if len(listed) > 1 or entry.path or entry.kind != "f":
        raise PermanentError("the manifest describes a directory, but the mount is a single file")
    if entry.size != file.lstat().st_size:
        raise PermanentError("a mount that is a single file must be pulled again before its metadata is set")
    parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        set_metadata(parent, os.fsencode(file.name), Metadata.of(entry))
    finally:
        os.close(parent)
    return Applied(entries=1)


# --- metadata ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """Everything about a file but its name and contents."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]

    @classmethod
    def of(cls, entry: Entry) -> Metadata:
        """As a manifest describes it."""
        return cls(_TYPES[entry.kind], entry.mode, entry.uid, entry.gid, entry.mtime_ns, dict(entry.xattrs))

    @classmethod
    def read(cls, at: int, name: bytes) -> Metadata:
        """As the file has it, without the overlay's own marks."""
        seen = os.stat(name, dir_fd=at, follow_symlinks=False)
        found = read_xattrs(at, name)
        xattrs = {key: value for key, value in found.items() if not key.startswith(OVERLAY_PREFIX)}
        kind, mode = stat.S_IFMT(seen.st_mode), stat.S_IMODE(seen.st_mode)
        return cls(kind, mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns, xattrs)


def read_xattrs(at: int, name: bytes) -> dict[bytes, bytes]:
    """All extended attributes of a file, symlinks not followed."""
    file = reach(at, name)
    try:
        names = os.listxattr(file, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {os.fsencode(key): os.getxattr(file, key, follow_symlinks=False) for key in names}


def set_metadata(at: int, name: bytes, wanted: Metadata, *, layer: bool = False) -> None:
    """Make owner, mode, xattrs and mtime exactly so. Overlay marks stay, but those that belong to a ``layer`` are
    made exactly so as well. Raises OSError.

    The order matters: a change of owner clears set-id bits and file capabilities, an ACL and the mode's group
    bits are one thing seen twice, and the time comes last because everything else is a change.
    """
    file = reach(at, name)
    have = read_xattrs(at, name)
    for key in have.keys() - wanted.xattrs.keys():
        if not key.startswith(OVERLAY_PREFIX) or (layer and key in LAYER_MARKS):
            with _absent_is_fine():
                os.removexattr(file, key, follow_symlinks=False)
    seen = os.stat(name, dir_fd=at, follow_symlinks=False)
    if (seen.st_uid, seen.st_gid) != (wanted.uid, wanted.gid):
        os.chown(name, wanted.uid, wanted.gid, dir_fd=at, follow_symlinks=False)
        have = read_xattrs(at, name) if wanted.xattrs else {}
        seen = os.stat(name, dir_fd=at, follow_symlinks=False)
    is_link = stat.S_ISLNK(seen.st_mode)
    if not is_link and stat.S_IMODE(seen.st_mode) != wanted.mode:
        os.chmod(file, wanted.mode)
        have = read_xattrs(at, name) if wanted.xattrs else {}
    for key, value in wanted.xattrs.items():
        if have.get(key) != value:
            os.setxattr(file, key, value, follow_symlinks=False)
    os.utime(name, ns=(seen.st_atime_ns, wanted.mtime_ns), dir_fd=at, follow_symlinks=False)


@contextlib.contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.ENOTSUP}:
            raise


# --- placement ---------------------------------------------------------------------------------------


class _Placement:
    """One application of a manifest. ``steps`` yields each path before it is worked on, for error messages."""

    def __init__(
        self,
        tree: Beneath,
        aside: Beneath,
        old: Beneath,
        spare: Path,
        *,
        layer: bool = False,
        contents: Giver | None = None,
    ) -> None:
        self.layer = layer
        self._ask = contents
        self._given: Mapping[bytes, bytes] = {}
        self._lacking: list[list[Entry]] = []
        """Groups of names whose contents are not here."""
        self.tree = tree
        self.aside = aside
        self.old = old
        self.trash = spare / "trash"
        self.applied = Applied()

    def steps(self, listed: list[Entry], *, everything: bool) -> Iterator[bytes]:
        yield from self.removals(listed, everything=everything)
        directories = []
        groups: dict[tuple[int, bytes], list[Entry]] = defaultdict(list)
        for entry in listed:
            yield entry.path
            self.applied.entries += 1
            if entry.kind == "d":
                self._make_directory(entry)
                directories.append(entry)
            elif entry.kind != "-":
                lone = b"" if entry.link_group else entry.path
                groups[entry.link_group, lone].append(entry)
        shared = self._wrongly_shared(groups)
        for key, names in groups.items():
            yield names[0].path
            self._settle(names, distrust=key in shared)
        if self._lacking and self._ask is not None:
            self._given = self._ask([(names[0].path, names[0].size) for names in self._lacking])
        for names in self._lacking:
            yield names[0].path
            self._build(names)
            self._share(names)
        for entry in reversed(directories):
            yield entry.path
            at, name = self.tree.locate(entry.path)
            set_metadata(at, name, Metadata.of(entry), layer=self.layer)

    def removals(self, listed: list[Entry], *, everything: bool) -> Iterator[bytes]:
        """Remove what is said to be gone, and what a directory that is listed in full does not list."""
        present = {entry.path for entry in listed if entry.kind != "-"}
        covered: bytes | None = None
        if everything:
            yield from self._remove_unlisted(b"", present, everything=True)
        for entry in listed:
            if entry.kind == "-":
                yield entry.path
                self._remove(entry.path)
            elif entry.kind == "d" and entry.stale and not everything:
                if covered is not None and entry.path.startswith(covered):
                    continue
                yield from self._remove_unlisted(entry.path, present)
                if self.layer:
                    continue
                covered = entry.path + b"/" if entry.path else b""

    def remove_other_kinds(self, listed: list[Entry]) -> None:
        """What lies under a listed name and is something else goes: rsync stumbles over directories in the way."""
        for entry in listed:
            seen = self.tree.stat(entry.path) if entry.path and entry.kind != "-" else None
            if seen is not None and stat.S_IFMT(seen.st_mode) != _TYPES[entry.kind]:
                self._remove(entry.path)

    def _remove(self, path: bytes) -> None:
        if not path:
            raise PermanentError("the manifest says that the whole tree is gone; that is never applied")
        if self.tree.stat(path) is None:
            return
        at, name = self.tree.locate(path)
        remove_tree(at, name, self.trash)
        self.tree.forget()
        self.applied.removed += 1

    def _remove_unlisted(self, start: bytes, present: set[bytes], *, everything: bool = False) -> Iterator[bytes]:
        seen = self.tree.stat(start)
        if seen is None or not stat.S_ISDIR(seen.st_mode):
            return
        unlisted = []
        for directory, entries in self.tree.walk(start):
            for name, _ in entries:
                path = directory + b"/" + name if directory else name
                if path not in present:
                    unlisted.append(path)
            if self.layer and not everything:
                break
        for path in unlisted:
            yield path
            self._remove(path)

    def _make_directory(self, entry: Entry) -> None:
        seen = self.tree.stat(entry.path)
        if seen is not None and stat.S_ISDIR(seen.st_mode):
            return
        if seen is not None:
            self._remove(entry.path)
        at, name = self.tree.locate(entry.path)
        os.mkdir(name, 0o700, dir_fd=at)

    def _wrongly_shared(self, groups: dict[tuple[int, bytes], list[Entry]]) -> set[tuple[int, bytes]]:
        """Groups whose inode here also has names that are not in the group there.

        Changing such a file through one name would change the others, so it is built anew.
        """
        wrong = set()
        for key, names in groups.items():
            inodes: dict[int, int] = defaultdict(int)
            links = {}
            for entry in names:
                seen = self.tree.stat(entry.path)
                if seen is not None and not stat.S_ISDIR(seen.st_mode):
                    inodes[seen.st_ino] += 1
                    links[seen.st_ino] = seen.st_nlink
            if any(links[inode] > count for inode, count in inodes.items()):
                wrong.add(key)
        return wrong

    def _settle(self, names: list[Entry], *, distrust: bool) -> None:
        """Make all names of one inode what they should be: the first is settled, the others linked to it.

        One that is stale goes first, if there is any: it is under this name that the contents will come.
        """
        names = sorted(names, key=lambda entry: not entry.stale)
        first = names[0]
        kept = None if distrust else self._usable(names)
        if kept is None and first.kind == "f" and first.size > 0:
            self._lacking.append(names)
            return
        if kept is None:
            self._build(names)
        elif kept is not first:
            self._link(kept.path, first.path)
        self._share(names)

    def _share(self, names: list[Entry]) -> None:
        """The first of the names is what it should be: the others become names of it."""
        first = names[0]
        at, name = self.tree.locate(first.path)
        set_metadata(at, name, Metadata.of(first))
        inode = os.stat(name, dir_fd=at, follow_symlinks=False).st_ino
        for other in names[1:]:
            seen = self.tree.stat(other.path)
            if seen is None or seen.st_ino != inode:
                self._link(first.path, other.path)

    def _usable(self, names: list[Entry]) -> Entry | None:
        """The name under which the right contents already lie here; None when they must be made or fetched."""
        entry = names[0]
        if entry.kind == "f" and entry.size > 0 and any(name.stale for name in names):
            return None
        inodes = set()
        found = None
        for name in names:
            seen = self.tree.stat(name.path)
            if seen is None or stat.S_IFMT(seen.st_mode) != _TYPES[entry.kind]:
                continue
            inodes.add(seen.st_ino)
            at, last = self.tree.locate(name.path)
            if entry.kind == "f" and seen.st_size > 0 and METACOPY in read_xattrs(at, last):
                return None  # an interrupted application left it: it is built again, so that it is counted
            if found is None and _same_contents(at, last, seen, entry):
                found = name
        # Several inodes here for one there: no telling which of them has the contents, unless there are none.
        return found if len(inodes) == 1 or entry.kind != "f" else None

    def _build(self, names: list[Entry]) -> None:
        first = names[0]
        # An old version under any of the names is what the fill can save traffic with.
        for entry in names:
            if first.kind == "f" and self._keep_old_version(entry.path, first.path):
                break
        self._clear_directory(first.path)
        new = b"new"
        remove_tree(self.aside.root, new, self.trash)
        if first.kind == "f":
            self._build_file(new, first)
        elif first.kind == "l":
            os.symlink(first.link_target, new, dir_fd=self.aside.root)
        elif first.kind in "cb":
            os.mknod(new, _TYPES[first.kind] | 0o600, first.rdev, dir_fd=self.aside.root)
        else:
            os.mknod(new, _TYPES[first.kind] | 0o600, dir_fd=self.aside.root)
        set_metadata(self.aside.root, new, Metadata.of(first))
        at, name = self._parent_of(first.path)
        os.rename(new, name, src_dir_fd=self.aside.root, dst_dir_fd=at)

    def _build_file(self, new: bytes, entry: Entry) -> None:
        given = self._given.get(entry.path, b"")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(new, flags, 0o600, dir_fd=self.aside.root)
        try:
            if entry.size == 0:
                return
            if given and len(given) == entry.size and self._written(descriptor, given):
                return
            os.ftruncate(descriptor, entry.size)
            os.setxattr(descriptor, METACOPY, b"")
            os.setxattr(descriptor, REDIRECT, b"/" + entry.path)
            kind, handle = file_handle(descriptor)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.E2BIG, errno.ERANGE}:
                raise PermanentError(
                    f"the path {entry.path[:60]!r}… ({len(entry.path)} bytes) does not fit into an attribute here"
                ) from error
            raise
        finally:
            os.close(descriptor)
        self.applied.placeholders.append(Placeholder(entry.path, entry.size, kind, handle))
        self.applied.stale_bytes += entry.size

    def _written(self, descriptor: int, given: bytes) -> bool:
        """Whether there was room for it. If not, a placeholder needs none, and the fill waits for some."""
        try:
            write_sparse(descriptor, given)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            os.ftruncate(descriptor, 0)
            self._given = {}
            return False
        self.applied.written += 1
        return True

    def _keep_old_version(self, path: bytes, as_path: bytes) -> bool:
        """Move a real old file aside, as delta basis for the fill. A placeholder is no version of anything."""
        seen = self.tree.stat(path)
        if seen is None or not stat.S_ISREG(seen.st_mode) or seen.st_size == 0:
            return False
        at, name = self.tree.locate(path)
        if METACOPY in read_xattrs(at, name):
            return False
        kept = self.old.stat(as_path)
        if kept is not None and stat.S_ISDIR(kept.st_mode):
            return False
        try:
            self.old.make_parents(as_path)
            to, last = self.old.locate(as_path)
            os.rename(name, last, src_dir_fd=at, dst_dir_fd=to)
        except (FileExistsError, NotADirectoryError):
            return False  # a basis only saves traffic
        return True

    def _clear_directory(self, path: bytes) -> None:
        """A directory cannot be renamed over by a file."""
        seen = self.tree.stat(path)
        if seen is not None and stat.S_ISDIR(seen.st_mode):
            self._remove(path)

    def _link(self, path: bytes, to: bytes) -> None:
        """Give the file at ``path`` the further name ``to``, replacing atomically what is there."""
        self._clear_directory(to)
        temporary = b"link"
        remove_tree(self.aside.root, temporary, self.trash)
        at, name = self.tree.locate(path)
        os.link(name, temporary, src_dir_fd=at, dst_dir_fd=self.aside.root, follow_symlinks=False)
        at, name = self._parent_of(to)
        os.rename(temporary, name, src_dir_fd=self.aside.root, dst_dir_fd=at)

    def _parent_of(self, path: bytes) -> tuple[int, bytes]:
        try:
            return self.tree.locate(path)
        except OSError as error:
            raise PermanentError(f"the manifest lists {path!r}, but not the directory it is in") from error


def write_sparse(descriptor: int, data: bytes) -> None:
    """Make a new, empty file hold ``data``, with a hole for every block that is all zeros. Raises OSError."""
    os.ftruncate(descriptor, len(data))
    view = memoryview(data)
    start = 0  # of what is not written yet
    for begin in range(0, len(data), _BLOCK_BYTES):
        end = min(begin + _BLOCK_BYTES, len(data))
        if view[begin:end] == _ZEROS[: end - begin]:
            _write_all(descriptor, view[start:begin], start)
            start = end
    _write_all(descriptor, view[start:], start)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _same_contents(at: int, name: bytes, seen: os.stat_result, entry: Entry) -> bool:
    if entry.kind == "f":
        return seen.st_size == entry.size
    if entry.kind == "l":
        return os.readlink(name, dir_fd=at) == entry.link_target
    return entry.kind not in "cb" or seen.st_rdev == entry.rdev


# --- file handles --------------------------------------------------------------------------------------


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * MAX_HANDLE_BYTES),
    )


def file_handle(descriptor: int) -> tuple[int, bytes]:
    """The kernel's lasting handle of an open file, as (type, bytes); (0, b"") where there are none."""
    handle = _FileHandle(MAX_HANDLE_BYTES)
    mount_id = ctypes.c_int()
    at_empty_path = 0x1000
    code = _libc.name_to_handle_at(descriptor, b"", ctypes.byref(handle), ctypes.byref(mount_id), at_empty_path)
    if code != 0:
        return 0, b""
    return handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes])


def still_placeholder(mount: int, placeholder: Placeholder) -> bool:
    """Whether the file still takes its contents from below, wherever the container has moved it.

    ``mount`` is a descriptor on the upper's file system. False once it was copied up or removed.
    """
    if not placeholder.handle:
        return True
    handle = _FileHandle(len(placeholder.handle), placeholder.handle_type)
    ctypes.memmove(handle.f_handle, placeholder.handle, len(placeholder.handle))
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME
    descriptor = int(_libc.open_by_handle_at(mount, ctypes.byref(handle), flags))
    if descriptor < 0:
        return bool(ctypes.get_errno() != errno.ESTALE)
    try:
        os.getxattr(descriptor, METACOPY)
    except OSError as error:
        return bool(error.errno != errno.ENODATA)
    else:
        return True
    finally:
        os.close(descriptor)
