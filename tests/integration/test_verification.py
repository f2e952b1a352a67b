"""P4, D23: what arrived equals the frozen source, and only the container's own changes are excused."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hostd.federation import Union
from hostd.manifest import Entry, tree_digest, walk, write_manifest
from hostd.placement import METACOPY, REDIRECT
from hostd.verification import (
    Found,
    changed_entries,
    keep_evidence,
    list_arrived,
    mark_mount,
    remember_directories,
    verify,
)

pytestmark = pytest.mark.root


class Move:
    """A source tree and its copy on the target, as they are right before the container starts."""

    def __init__(self, directory: Path, *, ahead: bool) -> None:
        self.ahead = ahead
        """What has arrived is described before it is compared."""
        self.source = directory / "source"
        (self.source / "a" / "deep").mkdir(parents=True)
        (self.source / "b").mkdir()
        for name in ("a/one", "a/two", "a/deep/three", "b/one", "top"):
            (self.source / name).write_bytes(name.encode() * 100)
        (self.source / "link").symlink_to("a/one")
        self.manifest = directory / "manifest"
        write_manifest(self.manifest, walk(self.source, digest=True))
        place = directory / "volume" / "_data"
        place.mkdir(parents=True)
        self.union = Union(directory / "volume" / "cargo", place)
        self.union.create()
        shutil.copytree(self.source, self.union.upper_tree, symlinks=True, dirs_exist_ok=True)
        for entry in walk(self.source):
            path = self.union.upper_tree / os.fsdecode(entry.path)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        self.tree = self.union.upper_tree

    def mount(self) -> None:
        remember_directories(self.union)
        mark_mount(self.union)
        _next_tick(self.union.stage)

    def verify(self) -> Found:
        if self.ahead:
            list_arrived(self.union)
        return verify(self.manifest, self.union)

    def differing(self) -> dict[str, str]:
        return {os.fsdecode(found.path): found.what for found in self.verify().differences}


def _next_tick(directory: Path) -> None:
    """Wait until the file system's clock has moved past what it last stamped."""
    probe = directory / "probe"
    probe.touch()
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        probe.chmod(0o600)
    probe.unlink()


@pytest.fixture(params=["ahead", "at the end"])
def move(request: pytest.FixtureRequest, tmp_path: Path) -> Move:
    return Move(tmp_path, ahead=request.param == "ahead")


def test_a_faithful_copy_has_no_difference(move: Move) -> None:
    move.mount()
    found = move.verify()
    assert (found.differences, found.changed, found.files) == ([], 0, 6)
    assert found.digest == tree_digest(walk(move.source, digest=True))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda tree: (tree / "a/one").write_bytes(b"x" * 500), ("a/one", "contents")),
        (lambda tree: (tree / "a/one").chmod(0o600), ("a/one", "mode")),
        (lambda tree: (tree / "b/one").unlink(), ("b/one", "missing")),
        (lambda tree: (tree / "b/extra").touch(), ("b/extra", "unexpected")),
        (lambda tree: os.truncate(tree / "top", 3), ("top", "size")),
        (lambda tree: os.setxattr(tree / "top", "user.x", b"1"), ("top", "xattrs")),
    ],
)
def test_a_copy_that_was_wrong_before_the_start_is_found(
    move: Move, spoil: Callable[[Path], None], expected: tuple[str, str]
) -> None:
    """P4: names, metadata and contents are all compared."""
    times = {entry.path: entry.mtime_ns for entry in walk(move.tree)}
    spoil(move.tree)
    for path, mtime in times.items():
        place = move.tree / os.fsdecode(path)
        if os.path.lexists(place):
            os.utime(place, ns=(mtime, mtime), follow_symlinks=False)
    move.mount()
    assert expected in move.differing().items()


def test_what_the_container_changed_after_its_start_is_excused(move: Move) -> None:
    move.mount()
    (move.tree / "a/one").write_bytes(b"new")
    (move.tree / "a/two").unlink()
    (move.tree / "b/new").write_bytes(b"new")
    (move.tree / "top").rename(move.tree / "moved")
    found = move.verify()
    assert found.differences == []
    assert found.changed >= 5
    assert found.digest == tree_digest(walk(move.source, digest=True)), "of the source, whatever has become of the copy"


def test_a_renamed_directory_takes_its_unchanged_children_with_it(move: Move) -> None:
    move.mount()
    (move.tree / "a").rename(move.tree / "x")
    (move.tree / "b").rename(move.tree / "a")
    assert move.differing() == {}


def test_a_file_spoiled_before_the_start_is_found_although_its_directory_was_used(move: Move) -> None:
    """D23: a touched directory excuses nothing that lies in it."""
    before = (move.tree / "a/one").stat().st_mtime_ns
    (move.tree / "a/one").write_bytes(b"y" * 500)
    os.utime(move.tree / "a/one", ns=(before, before))
    move.mount()
    (move.tree / "a/new").touch()
    assert move.differing() == {"a/one": "contents"}


def test_contents_of_a_placeholder_are_compared_in_the_replica(move: Move) -> None:
    _make_placeholder(move, "a/one")
    _bring(move, "a/one", b"a/one" * 100)
    move.mount()
    assert move.differing() == {}
    _bring(move, "a/one", b"wrong" * 100)
    assert move.differing() == {"a/one": "contents"}


def test_what_the_container_changes_after_the_description_is_excused_and_what_was_wrong_is_not(move: Move) -> None:
    (move.tree / "b/one").chmod(0o600)
    move.mount()
    list_arrived(move.union)
    (move.tree / "a/one").write_bytes(b"new")
    (move.tree / "a/two").unlink()
    (move.tree / "top").rename(move.tree / "moved")
    assert move.differing() == {"b/one": "mode"}


def test_after_a_difference_everything_is_read_again(move: Move) -> None:
    """What was wrong only while it was read, as from a failing disk, must not hold the migration for ever."""
    _make_placeholder(move, "a/one")
    _bring(move, "a/one", b"wrong" * 100)
    move.mount()
    assert move.differing() == {"a/one": "contents"}
    _bring(move, "a/one", b"a/one" * 100)
    assert move.differing() == {}


def test_a_file_that_could_not_be_read_ahead_is_read_for_the_comparison(move: Move) -> None:
    _make_placeholder(move, "a/one")
    move.mount()
    list_arrived(move.union)
    assert move.differing() == {"a/one": "contents"}
    list_arrived(move.union)
    _bring(move, "a/one", b"a/one" * 100)
    assert move.differing() == {}


def test_a_source_that_digests_with_another_function_is_understood(move: Move) -> None:
    """Manifests held BLAKE2b digests once, and a host of another version may still write them."""

    def as_before(entry: Entry) -> Entry:
        if entry.kind != "f":
            return entry
        contents = (move.source / os.fsdecode(entry.path)).read_bytes()
        return msgspec.structs.replace(entry, digest=hashlib.blake2b(contents, digest_size=32).digest())

    write_manifest(move.manifest, map(as_before, walk(move.source)))
    before = (move.tree / "top").stat().st_mtime_ns
    (move.tree / "top").write_bytes(b"t0p" * 100)
    os.utime(move.tree / "top", ns=(before, before))
    move.mount()
    assert move.differing() == {"top": "contents"}


def _bring(move: Move, name: str, contents: bytes) -> None:
    """As the fill does."""
    file = move.union.replica / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(contents)


def _make_placeholder(move: Move, name: str) -> None:
    file = move.tree / name
    seen = file.stat()
    os.truncate(file, 0)
    os.truncate(file, seen.st_size)
    os.setxattr(file, METACOPY, b"")
    os.setxattr(file, REDIRECT, b"/" + name.encode())
    os.utime(file, ns=(seen.st_mtime_ns, seen.st_mtime_ns))


def test_for_the_way_back_only_what_the_container_changed_is_marked(move: Move, tmp_path: Path) -> None:
    """P12: moving back costs what was written, not what there is."""
    move.mount()
    (move.tree / "a/one").write_bytes(b"new")
    (move.tree / "b").rename(move.tree / "c")
    stale = {entry.path for entry in changed_entries(move.union, tmp_path / "kept") if entry.stale}
    assert stale == {b"a/one", b"c/one"}


def test_the_evidence_outlives_the_stage(move: Move, tmp_path: Path) -> None:
    move.mount()
    keep_evidence(move.union, tmp_path / "kept")
    move.union.fold()
    move.union.remove()
    (move.union.place / "a/two").write_bytes(b"new")
    stale = {entry.path for entry in changed_entries(move.union, tmp_path / "kept") if entry.stale}
    assert stale == {b"a/two"}


def test_what_the_fold_touched_is_told_from_what_the_container_wrote_by_the_sources_digests(
    move: Move, tmp_path: Path
) -> None:
    """P12: also after the end of the union a way back carries only what differs."""
    for name in ("a/one", "a/two"):
        _make_placeholder(move, name)
        _bring(move, name, name.encode() * 100)
    move.mount()
    keep_evidence(move.union, tmp_path / "kept")
    move.union.fold()
    move.union.remove()
    place = move.union.place
    (place / "a/two").write_bytes(b"A/TWO" * 100)
    (place / "b/one").write_bytes((place / "b/one").read_bytes())
    (place / "top").chmod(0o600)
    os.link(place / "a/deep/three", place / "also three")
    (place / "a/one").rename(place / "a/uno")
    (place / "a/one").write_bytes((place / "a/uno").read_bytes())
    entries = list(changed_entries(move.union, tmp_path / "kept", move.manifest))
    assert {entry.path for entry in entries if entry.stale} == {b"a/two", b"a/deep/three", b"also three", b"a/uno"}
    assert next(entry.mode for entry in entries if entry.path == b"top") == 0o600
    without = {entry.path for entry in changed_entries(move.union, tmp_path / "kept") if entry.stale}
    assert without >= {b"a/one", b"b/one", b"top"}
