"""Compare what arrived with what the frozen source was, while the container already works on it.

The container changes its data meanwhile, and those changes are right. What it has changed shows in the
inode's change time, which no program can set: whatever is not younger than the moment the union was mounted
must equal the source, entry by entry, contents by digest. A directory that was renamed takes its unchanged
children with it, so the inode numbers of directories are remembered from before the mount.

It must never count a difference as the container's unless the evidence says so: a false alarm keeps both
copies, a missed one could lose data.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from events.errors import PermanentError
from hostd.beneath import Beneath
from hostd.digests import alike, digest_of_file, open_contents
from hostd.entry import escape
from hostd.federation import Union
from hostd.fold import write_durably
from hostd.layer import layer_entry
from hostd.manifest import (
    Difference,
    Entry,
    TreeSum,
    compare,
    differences,
    observe_all,
    order_key,
    read_manifest,
    tree_digest,
    walk,
    write_manifest,
)
from hostd.own_file import read_own
from hostd.placement import METACOPY, OVERLAY_PREFIX, REDIRECT
from hostd.tree_walk import walk_opened, with_digests

MOUNT_MARK = "mounted-at"
DIRECTORIES = "directories"
DIRTY_DIRECTORIES = "directories-dirty"
MAX_DIFFERENCES = 1000
"""Kept for the report; all are counted."""
ARRIVED = "arrived"
"""What ``list_arrived`` writes into the stage."""


@dataclass
class Found:
    """The result of one tree's comparison."""

    files: int = 0
    size_bytes: int = 0
    digest: str = ""
    """Of the source's whole tree (``TreeSum``)."""
    changed: int = 0
    """Entries that the container had changed itself when they were read here."""
    difference_count: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, difference: Difference) -> None:
        """Count a difference, and keep the first ones."""
        self.difference_count += 1
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)


# --- evidence from before the mount --------------------------------------------------------------


def remember_directories(union: Union) -> None:
    """After a round: the inode number of every directory that has arrived. Outside of the stop window."""
    if union.single_file:
        return
    with Beneath(union.upper_tree) as tree:
        found = {b"": os.fstat(tree.root).st_ino}
        found |= tree.directories()
    write_durably(union.stage / DIRECTORIES, msgspec.msgpack.encode(found))


def remember_dirty_directories(union: Union, entries: Iterable[Entry]) -> None:
    """In the stop window: the same for the directories that the dirty manifest has just made or touched."""
    if union.single_file:
        return
    with Beneath(union.upper_tree) as tree:
        found = {}
        for entry in entries:
            if entry.kind == "d":
                status = tree.stat(entry.path) if entry.path else os.fstat(tree.root)
                if status is not None:
                    found[entry.path] = status.st_ino
    write_durably(union.stage / DIRTY_DIRECTORIES, msgspec.msgpack.encode(found))


def mark_mount(union: Union) -> None:
    """Right before the mount: what changes from here on was changed by the container."""
    write_durably(union.stage / MOUNT_MARK, b"")


# --- the comparison --------------------------------------------------------------------------------


def keep_evidence(union: Union, directory: Path) -> None:
    """Before the stage is removed: keep what tells the container's changes from what arrived."""
    kept = evidence_directory(union, directory)
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (MOUNT_MARK, DIRECTORIES, DIRTY_DIRECTORIES):
        file = union.stage / name
        if file.exists():
            shutil.copy2(file, kept / name)


def evidence_directory(union: Union, directory: Path) -> Path:
    """Where ``keep_evidence`` puts it, below the migration's own directory."""
    identity = hashlib.sha256(os.fsencode(union.place)).hexdigest()[:16]
    return directory / f"evidence-{identity}"


class _Tree:
    """The target's tree, with what is known of it from before the mount."""

    def __init__(self, union: Union, kept: Path | None = None) -> None:
        self.union = union
        folded = not union.stage.exists()
        layer = union.layer_root() if union.layer else None
        self.root = layer or (union.place if folded or union.state().settled else union.upper_tree)
        self.prefix = os.fsencode(self.root) + b"/"
        evidence = kept if folded and kept is not None else union.stage
        self.since_ns = (evidence / MOUNT_MARK).stat().st_mtime_ns
        self._inodes: dict[bytes, int] = {}
        for name in (DIRECTORIES, DIRTY_DIRECTORIES):
            file = evidence / name
            if file.exists():
                self._inodes |= read_own(file, dict[bytes, int])
        self._moved: dict[bytes, bool] = {}

    def changed(self, inside: Beneath, path: bytes) -> bool:
        """Whether the container has changed, made or moved here what ``path`` names now."""
        status = inside.stat(path) if path else os.fstat(inside.root)
        if status is None or status.st_ctime_ns > self.since_ns:
            return True
        return self.moved(inside, os.path.dirname(path)) if path else False

    def moved(self, inside: Beneath, directory: bytes) -> bool:
        """Whether ``directory``, or one above it, is not the one that lay there before the mount."""
        if not directory:
            return False
        known = self._moved.get(directory)
        if known is None:
            status = inside.stat(directory)
            same = status is not None and self._inodes.get(directory) == status.st_ino
            known = self._moved[directory] = not same or self.moved(inside, os.path.dirname(directory))
        return known

    def removable(self, inside: Beneath, path: bytes) -> bool:
        """Whether the container may have removed ``path``: the directory it was in has changed since."""
        parent = os.path.dirname(path)
        while parent:
            status = inside.stat(parent)
            if status is not None:
                return status.st_ctime_ns > self.since_ns or self.moved(inside, parent)
            parent = os.path.dirname(parent)
        return os.fstat(inside.root).st_ctime_ns > self.since_ns


def list_arrived(union: Union, *, check: Callable[[], None] = lambda: None) -> None:
    """Describe what has arrived, digests included, while the source describes what it had: ``verify`` then only compares.

    Harmless when repeated. What the container changes afterwards is younger than its mount, and so is never held against
    this list. Raises PermanentError, and what ``check`` raises, which is called often.
    """
    file = union.stage / ARRIVED
    if union.single_file or not union.stage.exists() or file.exists():
        return
    tree = _Tree(union)

    def checked() -> Iterator[Entry]:
        for entry in _arrived(tree):
            check()
            yield entry

    write_manifest(file, checked())


def verify(manifest: Path, union: Union, *, check: Callable[[], None] = lambda: None) -> Found:
    """Compare the tree of ``union`` with the source's ``manifest``. ``check`` is called often and may raise.

    Raises PermanentError when either side cannot be read.
    """
    tree = _Tree(union)
    found = Found()
    if union.single_file:
        found.digest = tree_digest(read_manifest(manifest))
        _verify_file(manifest, tree, found)
        return found
    summed = TreeSum()
    listed = union.stage / ARRIVED
    arrived = read_manifest(listed) if listed.exists() else _arrived(tree)
    with Beneath(tree.root) as inside:
        _compare(summed.over(read_manifest(manifest)), arrived, tree, inside, found, check)
    found.digest = summed.hexdigest()
    listed.unlink(missing_ok=True)  # whoever asks again has everything read again
    return found


def changed_entries(union: Union, directory: Path, source: Path | None = None) -> Iterator[Entry]:
    """Every entry of the tree as the container left it; ``stale`` where its contents have to be carried.

    For going back. An inode that is younger than the mount may be the container's work, or that of the fold, which moves
    files; ``source``, the manifest of the frozen source with digests, tells those from each other by contents.
    Raises PermanentError when the tree or the manifest cannot be read.
    """
    tree = _Tree(union, evidence_directory(union, directory))
    if union.single_file:
        for file in walk(tree.root):
            yield msgspec.structs.replace(file, stale=tree.root.lstat().st_ctime_ns > tree.since_ns)
        return
    known = read_manifest(source) if source is not None else iter(())
    with Beneath(tree.root) as inside:
        for before, entry in _merged(known, walk(tree.root)):
            if entry is None:
                continue
            without = msgspec.structs.replace(_without_marks(entry), link_group=entry.link_group)
            plain = layer_entry(entry) if union.layer else without
            stale = entry.kind == "f" and entry.size > 0 and tree.changed(inside, entry.path)
            stale = stale and not (before is not None and _lies_there_already(tree, before, entry))
            yield msgspec.structs.replace(plain, stale=stale)


def _lies_there_already(tree: _Tree, before: Entry, entry: Entry) -> bool:
    """Whether the source has these very contents under this name.

    Not asked of files with several names, here or there: which inode a name belongs to counts, too.
    """
    alone = before.kind == "f" and not before.link_group and not entry.link_group
    if not alone or before.size != entry.size or not before.digest:
        return False
    return digest_of_file(_contents(tree, entry), like=before.digest) == before.digest


def _arrived(tree: _Tree) -> Iterator[Entry]:
    """The tree as it is to be compared: without what belongs to the union, and with digests of what can be opened."""

    def opened(walked: Iterator[tuple[Entry, int]]) -> Iterator[tuple[Entry, int]]:
        for entry, contents in walked:
            layer = tree.union.layer
            plain = msgspec.structs.replace(layer_entry(entry), link_group=0) if layer else _without_marks(entry)
            if contents >= 0 and any(name == METACOPY for name, _ in entry.xattrs):  # a placeholder, of no contents
                os.close(contents)
                contents = open_contents(_contents(tree, entry))  # noqa: PLW2901 (those of the replica instead)
            yield plain, contents

    with contextlib.closing(walk_opened(tree.root)) as walked:
        yield from with_digests(opened(walked), _unreadable)


def _unreadable(entry: Entry, error: OSError) -> PermanentError:
    return PermanentError(
        f"{escape(entry.path)} cannot be read here: {error.strerror}. Both copies are kept; look at this host's disk"
    )


def _compare(
    expected: Iterator[Entry],
    arrived: Iterator[Entry],
    tree: _Tree,
    inside: Beneath,
    found: Found,
    check: Callable[[], None],
) -> None:
    """What has been read is asked after: an entry that differs may have been changed by the container meanwhile."""
    for left, right in _merged(expected, arrived):
        check()
        if left is not None and right is not None and _same(left, right):  # nearly always
            _count(right, found)
        elif right is None:
            assert left is not None
            if tree.removable(inside, left.path):
                found.changed += 1
            else:
                found.add(Difference(left.path, "missing", left, None))
        elif tree.changed(inside, right.path):
            found.changed += 1
        elif left is None:
            found.add(Difference(right.path, "unexpected", None, right))
        else:
            _compare_entry(left, right, tree, inside, found)


def _compare_entry(left: Entry, right: Entry, tree: _Tree, inside: Beneath, found: Found) -> None:
    if left.kind == right.kind == "f" and not alike(left.digest, right.digest):
        # The source takes another function than this host, or the contents could not be read: look once more.
        here = next(observe_all(tree.root, (right.path,)))
        digest = digest_of_file(_contents(tree, here), like=left.digest)
        right = msgspec.structs.replace(right, digest=digest)
        if tree.changed(inside, right.path):  # while it was being read
            found.changed += 1
            return
    differing = [difference for difference in differences(left, right) if difference.what != "contents"]
    if not differing and left.kind == "f" and left.digest != right.digest:
        differing = [Difference(left.path, "contents", left, right)]
    for difference in differing:
        found.add(difference)
    if not differing:
        _count(right, found)


def _same(left: Entry, right: Entry) -> bool:
    """Whether ``differences`` would find none, contents included, said in one go."""
    return (
        left.path == right.path
        and left.digest == right.digest
        and left.mtime_ns == right.mtime_ns
        and left.size == right.size
        and left.kind == right.kind
        and left.mode == right.mode
        and left.uid == right.uid
        and left.gid == right.gid
        and left.xattrs == right.xattrs
        and left.link_target == right.link_target
        and left.rdev == right.rdev
    )


def _count(entry: Entry, found: Found) -> None:
    found.files += entry.kind != "d"
    found.size_bytes += entry.size


def _merged(lefts: Iterator[Entry], rights: Iterator[Entry]) -> Iterator[tuple[Entry | None, Entry | None]]:
    left, right = next(lefts, None), next(rights, None)
    while left is not None or right is not None:
        if left is not None and right is not None and left.path == right.path:  # nearly always
            yield left, right
            left, right = next(lefts, None), next(rights, None)
        elif right is None or (left is not None and order_key(left.path) < order_key(right.path)):
            yield left, None
            left = next(lefts, None)
        else:
            yield None, right
            right = next(rights, None)


def _without_marks(entry: Entry) -> Entry:
    if not entry.xattrs and not entry.link_group:
        return entry
    kept = tuple(pair for pair in entry.xattrs if not pair[0].startswith(OVERLAY_PREFIX))
    return msgspec.structs.replace(entry, xattrs=kept, link_group=0)


def _contents(tree: _Tree, entry: Entry) -> bytes:
    """The file that holds the contents: the replica's for a placeholder."""
    xattrs = dict(entry.xattrs)
    if METACOPY in xattrs:
        return os.fsencode(tree.union.replica) + b"/" + xattrs[REDIRECT].lstrip(b"/")
    return tree.prefix + entry.path


def _verify_file(manifest: Path, tree: _Tree, found: Found) -> None:
    """A mount of one file: it is the container's own change or it is equal."""
    if tree.root.lstat().st_ctime_ns > tree.since_ns:
        found.changed += 1
        return
    found.files += 1
    for difference in compare(read_manifest(manifest), walk(tree.root, digest=True)):
        found.add(difference)
