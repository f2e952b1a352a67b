"""A tree that is laid out with placeholders before the stop, and only brought up to date in the stop window."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from hostd.dirty import dirty_manifest, everything
from hostd.federation import Union
from hostd.manifest import Entry, compare, walk
from hostd.tracker import Tracker
from tests.support.workload import Workload

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SEEDS = 40


def bring(tree: Path, to: Path, paths: list[bytes], listing: Path) -> None:
    """rsync of these paths, as the transport does it."""
    listing.write_bytes(b"".join(b"./" + path + b"\0" for path in paths))
    command = ["rsync", "-aHAXS", "--numeric-ids", "--from0", f"--files-from={listing}", "--no-r", "--dirs"]
    subprocess.run([*command, "--ignore-times", "--", f"{tree}/", f"{to}/"], check=True, capture_output=True)


def laid_out(tree: Path, union: Union) -> list[Entry]:
    """The round without contents; returns what it was told."""
    entries = list(everything(tree))
    linked = [entry.path for entry in entries if entry.kind == "f" and entry.link_group and entry.size]
    bring(tree, union.upper_tree, linked, union.stage.parent / "list")
    union.apply(
        [msgspec.structs.replace(e, stale=False) if e.kind == "f" and e.link_group else e for e in entries],
        everything=True,
    )
    return entries


def filled_and_folded(tree: Path, union: Union) -> list[str]:
    """Every remaining file is fetched and folded in; returns how the result differs from the source."""
    bring(tree, union.replica, union.fill_list(), union.stage.parent / "list")
    assert union.fill_list() == []
    union.fold()
    return [d.words for d in compare(walk(tree, digest=True, workers=1), walk(union.place, digest=True, workers=1))]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_changes_after_the_layout_the_stop_window_makes_it_exact(tmp_path: Path, seed: int) -> None:
    """Invariant 4: deletions, renames, new names and types meet placeholders that lie there already."""
    tree = tmp_path / "tree"
    tree.mkdir()
    workload = Workload(tree, seed)
    workload.populate(40)
    union = Union(tmp_path / "stage", tmp_path / "place")
    union.create()
    tracker = Tracker(tree)
    tracker.start()
    try:
        tracker.arm(1)
        laid_out(tree, union)
        workload.settled()
        workload.done.clear()
        for _ in range(1 + seed % 12):
            workload.step()
        seen = tracker.drain()
        assert seen.trusted, seen.why
        manifest = dirty_manifest(tree, seen)
    finally:
        tracker.stop()
    union.apply(manifest)
    union.apply(manifest)  # as after a crash in the middle
    story = "\n".join(workload.done)
    needed = {holder.path: holder.size for holder in union.remaining()}
    for path, size in needed.items():
        found = (tree / Path(*[part.decode(errors="surrogateescape") for part in path.split(b"/")])).lstat()
        assert found.st_size == size, f"seed {seed}: {path!r}\n{story}"
    assert filled_and_folded(tree, union) == [], f"seed {seed}\n{story}"


def test_the_stop_window_does_not_look_at_what_did_not_change(tmp_path: Path) -> None:
    """Cut-over cost: a thousand placeholders stay as they lie, each the same inode as before."""
    tree = tmp_path / "tree"
    (tree / "many").mkdir(parents=True)
    for number in range(1000):
        (tree / "many" / str(number)).write_bytes(b"x" * (number + 1))
    union = Union(tmp_path / "stage", tmp_path / "place")
    union.create()
    laid_out(tree, union)
    before = {file.name: file.lstat().st_ino for file in (union.upper_tree / "many").iterdir()}
    (tree / "many" / "7").write_bytes(b"changed")
    (tree / "many" / "8").unlink()
    listed = {entry.path: entry for entry in everything(tree)}
    changed = [
        listed[b""],
        msgspec.structs.replace(listed[b"many"], stale=False),
        listed[b"many/7"],
        Entry(b"many/8", "-", 0, 0, 0, 0, 0),
    ]
    union.apply(changed)
    after = {file.name: file.lstat().st_ino for file in (union.upper_tree / "many").iterdir()}
    assert {name for name in before if before[name] != after.get(name)} == {"7", "8"}
    assert len(union.remaining()) == 999
    assert len(union.remaining(first_only=True)) == 1
    assert filled_and_folded(tree, union) == []
