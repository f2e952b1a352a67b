"""An ``Entry``: everything about one path of a data tree that a migration must carry.

The alphabet of manifests, with the rules of what an honest entry can be. What it must never do: touch a file
system, or let pass a record of another host that leads out of the tree or misleads overlayfs.

Flow: ``hostd/tree_walk.py`` makes entries, ``hostd/manifest.py`` carries them, ``hostd/tree_compare.py`` compares
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec

MAX_NAME_BYTES = 255
"""NAME_MAX of Linux."""
MAX_LINK_TARGET_BYTES = 4095
"""PATH_MAX of Linux without its final NUL."""
KINDS = "dflcbps-"
DIGEST_BYTES = 32
BLOCK_BYTES = 512
"""What ``blocks`` counts in, as stat(2) does on any file system."""
BLAKE3_FRAME = b"\x1e\x20"
"""Stands before a BLAKE3 digest: its number among multihashes, and its length."""

LAYER_MARKS = frozenset({b"trusted.overlay.opaque", b"trusted.overlay.redirect"})
"""What overlayfs notes on the directories of a container's writable layer, and what belongs to the layer itself: this
one hides the image's, that one lies elsewhere in it. Everything else it notes is of one host only."""
_CARRIED_XATTRS = (
    b"user.",
    b"trusted.",
    b"security.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
)

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One path of a tree and all that is to be carried of it."""

    path: bytes
    """Relative, without leading slash; ``b""`` is the tree's root, which may be a single file."""
    kind: str
    """Directory, file, link, character or block device, pipe, socket; ``-`` says that nothing is there."""
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] = 0
    uid: _Id = 0
    gid: _Id = 0
    size: _Count = 0
    """Apparent size in bytes of a regular file, else 0."""
    mtime_ns: int = 0
    """Nanoseconds since 1970; negative before."""
    rdev: _Count = 0
    """Of devices, else 0."""
    link_target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Of all namespaces, ACLs included, sorted by name."""
    link_group: _Count = 0
    """Inode number when the file has several names, else 0. Means something within one tree only."""
    stale: bool = False
    """The contents must come from the source."""
    blocks: _Count = 0
    """Allocated, each of BLOCK_BYTES. Says nothing about another host's file system."""
    digest: bytes = b""
    """Of a regular file's contents; empty when not taken. BLAKE3 after its frame, or BLAKE2b-256 without one."""


def order_key(path: bytes) -> bytes:
    """Sorts paths as ``walk`` yields them: by the tuple of their components, so parents come first.

    No name holds a NUL, so putting it where the slashes were compares like the tuples, in less memory.
    """
    return path.replace(b"/", b"\0")


def escape(path: bytes) -> str:
    """``path`` for people, logs and events: printable, on one line, unambiguous. The root is ``.``."""
    if not path:
        return "."
    shown = []
    for character in path.decode("utf-8", "surrogateescape"):
        if character == "\\":
            shown.append("\\\\")
        elif character.isprintable():
            shown.append(character)
        else:
            shown += [f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape")]
    return "".join(shown)


def path_problem(path: bytes) -> str:
    """Why ``path`` can be no path of a tree; empty when it can. The root, ``b""``, can."""
    if b"\0" in path:
        return "its path holds a NUL"
    if b"//" in path or b"/." in path or path[:1] in (b"/", b".") or path[-1:] == b"/":  # hardly ever
        framed = b"/" + path + b"/"
        if b"//" in framed or b"/./" in framed or b"/../" in framed:
            return "its path is not a plain relative one"
    if len(path) > MAX_NAME_BYTES and max(map(len, path.split(b"/"))) > MAX_NAME_BYTES:
        return f"a name in its path is longer than {MAX_NAME_BYTES} bytes"
    return ""


def entry_problem(entry: Entry) -> str:
    """Why ``entry`` can be in no manifest, beyond what its types already exclude; empty when it can."""
    problem = path_problem(entry.path)
    if problem:
        return problem
    kind = entry.kind
    if len(kind) != 1 or kind not in KINDS:
        return f"its kind {kind[:10]!r} is not known"
    if entry.size > 2**63 - 1 or not -(2**63) <= entry.mtime_ns < 2**63:
        return "its size or time is not one that a file can have"
    target = entry.link_target
    if (kind == "l") != bool(target) or len(target) > MAX_LINK_TARGET_BYTES or b"\0" in target:
        return "its link target is not one that a link can have"
    framed = entry.digest.startswith(BLAKE3_FRAME) and len(entry.digest) == len(BLAKE3_FRAME) + DIGEST_BYTES
    if not framed and len(entry.digest) not in (0, DIGEST_BYTES):
        return "its digest is of no kind that is known"
    for name, value in entry.xattrs:
        if not name or len(name) > MAX_NAME_BYTES or b"\0" in name:
            return "the name of an extended attribute is not one that a file can have"
        if name in LAYER_MARKS and kind == "d" and b".." not in value.split(b"/"):
            continue  # a writable layer's; ``placement.apply`` refuses it in any other tree
        if name.startswith(b"trusted.overlay."):
            return f"it carries the attribute {escape(name)}, by which overlayfs would be misled"
    return ""


def plain(entry: Entry) -> bool:
    """Whether it has one name, no attribute, no ACL and the blocks that its size takes, so that a simple copy has all of it.

    A hole may hide behind blocks that were allocated beyond its size: the copy then takes the blocks that the file takes.
    """
    whole = entry.kind != "f" or entry.blocks * BLOCK_BYTES >= entry.size
    return whole and not entry.xattrs and not entry.link_group


def unsupported(entries: Iterable[Entry]) -> Iterator[str]:
    """A sentence for each entry that cannot be carried faithfully, to be told before the cut-over."""
    for entry in entries:
        if entry.kind == "c" and entry.rdev == 0:
            yield f"{escape(entry.path)} is a character device 0:0, which overlayfs takes for a deletion"
        for name, _ in entry.xattrs:
            if name.startswith(b"trusted.overlay."):
                yield f"{escape(entry.path)} carries {escape(name)}: it belongs to an overlay file system of its own"
            elif not name.startswith(_CARRIED_XATTRS):
                yield f"{escape(entry.path)} carries {escape(name)}, which only this kind of file system can hold"
