"""Two descriptions of a tree held against each other, and one summed up in a digest.

Both work on streams of entries, so that the number of files does not matter. What it must never do: look at a
file system, or treat a description that is out of order as comparable.

Flow: after the fill, the target compares the source's manifest with what it has itself.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import msgspec

from events.errors import PermanentError
from hostd.entry import DIGEST_BYTES, Entry, escape, order_key

_encoder = msgspec.msgpack.Encoder()


class Difference(msgspec.Struct, frozen=True):
    """One way in which one path is not as expected."""

    path: bytes
    what: str
    """``missing``, ``unexpected``, ``kind``, ``mode``, ``uid``, ``gid``, ``size``, ``mtime``, ``device``,
    ``link target``, ``xattrs``, ``contents`` or ``hard links``."""
    expected: Entry | None
    actual: Entry | None

    @property
    def words(self) -> str:
        """A sentence for people, with the path escaped."""
        path, expected, actual = escape(self.path), self.expected, self.actual
        if expected is None or self.what == "unexpected":
            return f"{path} is there, but should not be"
        if actual is None or self.what == "missing":
            return f"{path} is missing"
        if self.what == "hard links":
            return f"{path} is not a hard link of the same files as expected"
        if self.what == "contents":
            return f"the contents of {path} differ"
        if self.what == "xattrs":
            pairs = set(expected.xattrs) ^ set(actual.xattrs)
            names = ", ".join(sorted({escape(name) for name, _ in pairs}))
            return f"the extended attributes of {path} differ: {names}"
        show = _SHOWN[self.what]
        return f"the {self.what} of {path} is {show(actual)}, expected {show(expected)}"


_SHOWN: dict[str, Callable[[Entry], str]] = {
    "kind": lambda entry: entry.kind,
    "mode": lambda entry: f"{entry.mode:04o}",
    "uid": lambda entry: str(entry.uid),
    "gid": lambda entry: str(entry.gid),
    "size": lambda entry: f"{entry.size} bytes",
    "mtime": lambda entry: f"{entry.mtime_ns} ns",
    "device": lambda entry: f"{os.major(entry.rdev)}:{os.minor(entry.rdev)}",
    "link target": lambda entry: escape(entry.link_target),
}


def compare(expected: Iterable[Entry], actual: Iterable[Entry]) -> Iterator[Difference]:
    """Every difference between two descriptions in the order of ``order_key``, reading both as streams.

    Contents are compared by digest where both have one. ``link_group`` numbers are compared by which names
    they tie together. An entry of kind ``-`` is the same as none. Memory: one path for each group of hard
    links. Raises PermanentError when a description is not in order or lists a path twice.
    """
    lefts, rights = _in_order(expected, "expected"), _in_order(actual, "actual")
    left, right = next(lefts, None), next(rights, None)
    left_links, right_links = _Links(), _Links()
    while left is not None or right is not None:
        if right is None or (left is not None and order_key(left.path) < order_key(right.path)):
            assert left is not None
            yield Difference(left.path, "missing", left, None)
            left = next(lefts, None)
        elif left is None or order_key(right.path) < order_key(left.path):
            yield Difference(right.path, "unexpected", None, right)
            right = next(rights, None)
        else:
            yield from differences(left, right)
            # Evaluated for both sides at every common path: each must learn the groups' first names.
            if left_links.first(left) != right_links.first(right) and left.kind == right.kind:
                yield Difference(left.path, "hard links", left, right)
            left, right = next(lefts, None), next(rights, None)


def differences(expected: Entry, actual: Entry) -> Iterator[Difference]:
    """How two entries of the same path differ, hard links aside."""
    for what in _differing(expected, actual):
        yield Difference(expected.path, what, expected, actual)


def _in_order(entries: Iterable[Entry], which: str) -> Iterator[Entry]:
    previous: bytes | None = None
    for entry in entries:
        key = order_key(entry.path)
        if previous is not None and key <= previous:
            raise PermanentError(
                f"the description of the {which} tree is not in order at {escape(entry.path)}, so the trees "
                "cannot be compared"
            )
        previous = key
        if entry.kind != "-":
            yield entry


def _differing(expected: Entry, actual: Entry) -> Iterator[str]:
    if expected.kind != actual.kind:
        yield "kind"
        return
    if expected.mode != actual.mode:
        yield "mode"
    if expected.uid != actual.uid:
        yield "uid"
    if expected.gid != actual.gid:
        yield "gid"
    if expected.kind == "f" and expected.size != actual.size:
        yield "size"
    if expected.mtime_ns != actual.mtime_ns:
        yield "mtime"
    if expected.kind in "cb" and expected.rdev != actual.rdev:
        yield "device"
    if expected.link_target != actual.link_target:
        yield "link target"
    if expected.xattrs != actual.xattrs:
        yield "xattrs"
    if expected.digest and actual.digest and expected.digest != actual.digest:
        yield "contents"


class _Links:
    """Names each hard-link group by its first path: two partitions are equal if all these names are."""

    def __init__(self) -> None:
        self._first: dict[int, bytes] = {}

    def first(self, entry: Entry) -> bytes:
        if not entry.link_group:
            return entry.path
        return self._first.setdefault(entry.link_group, entry.path)


class TreeSum:
    """One BLAKE2b-256 of all that can be carried: equal trees on two hosts show the same.

    Inode numbers, allocation and staleness are left out; hard links count by the names they tie together.
    """

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._links = _Links()

    def over(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The same entries, each taken into account when it is asked for."""
        for entry in entries:
            first = self._links.first(entry)
            tied_to = b"" if first == entry.path else b"/" + first
            same = msgspec.structs.replace(entry, link_group=0, stale=False, blocks=0)
            raw = _encoder.encode((same, tied_to))
            self._state.update(len(raw).to_bytes(4, "big") + raw)
            yield entry

    def hexdigest(self) -> str:
        """Of what has been asked for so far."""
        return self._state.hexdigest()


def tree_digest(entries: Iterable[Entry]) -> str:
    """The TreeSum of a whole tree, in hex."""
    summed = TreeSum()
    deque(summed.over(entries), maxlen=0)
    return summed.hexdigest()
