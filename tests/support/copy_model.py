"""A copy of a tree, as a description: what a target would hold if it obeyed manifests to the letter.

Whatever a manifest does not list stays as it was, right or wrong. So the model tells whether a manifest lists enough.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from hostd.manifest import Entry, compare, order_key, walk

UNKNOWN = b"?" * 32
"""The digest of contents that nobody has brought."""


class CopyModel:
    """The first copy of ``tree``, then what manifests make of it."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.entries = {entry.path: entry for entry in walk(tree, digest=True, workers=1)}

    def apply(self, manifest: Iterable[Entry]) -> None:
        """Do what the manifest says; contents of stale files are read from the tree now."""
        manifest = list(manifest)
        listed = {entry.path for entry in manifest}
        for entry in manifest:
            if entry.kind == "-" or entry.kind != "d":
                self._clear(entry.path, set())
            elif entry.stale:
                self._clear(entry.path, listed)
            if entry.kind == "-":
                self.entries.pop(entry.path, None)
                continue
            digest = b""
            if entry.kind == "f":
                before = self.entries.get(entry.path)
                digest = before.digest if before is not None and before.kind == "f" else UNKNOWN
                if entry.stale or entry.size == 0:
                    digest = self._read(entry.path)
            self.entries[entry.path] = msgspec.structs.replace(entry, stale=False, digest=digest)

    def _clear(self, folder: bytes, keep: set[bytes]) -> None:
        for path in [path for path in self.entries if path.startswith(folder + b"/") and path not in keep]:
            del self.entries[path]

    def _read(self, path: bytes) -> bytes:
        found = next(iter(walk(self.tree, digest=True, workers=1, start=path)), None)
        return found.digest if found is not None and found.kind == "f" else UNKNOWN

    def differences(self) -> list[str]:
        """In words, what the copy and the tree disagree on."""
        mine = sorted(self.entries.values(), key=lambda entry: order_key(entry.path))
        wrong = [d.words for d in compare(mine, walk(self.tree, digest=True, workers=1))]
        orphans = [path for path in self.entries if path and self.entries.get(os.path.dirname(path)) is None]
        return wrong + [f"{path!r} has no directory above it" for path in orphans]


def check_form(manifest: list[Entry]) -> None:
    """Whatever it lists, a dirty manifest keeps to the rules that its readers rely on."""
    paths = [entry.path for entry in manifest]
    assert paths == sorted(set(paths), key=order_key), "in order, and each path once"
    by_path = {entry.path: entry for entry in manifest}
    for path in paths:
        parent = path
        while parent:
            parent = os.path.dirname(parent)
            assert parent in by_path, f"{path!r} is listed without {parent!r} above it"
            assert by_path[parent].kind == "d", f"{path!r} is listed below {by_path[parent]}"
    for entry in manifest:
        assert not entry.stale or entry.kind == "d" or (entry.kind == "f" and entry.size > 0), entry
