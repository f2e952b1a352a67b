"""Dirty sets made by hand: what the manifest says of each, whatever the tracker would have seen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import hostd.dirty
from events.errors import PermanentError
from hostd.dirty import DirtySet, dirty_manifest, everything
from hostd.entry import Entry
from hostd.hardlinks import CLOSED, CONTENT, FOLDER, METADATA, NAME, LinkIndex
from hostd.openfiles import FileKey, OpenFile
from tests.support.copy_model import check_form

LONG_AGO_NS = 0


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``a/b/file``, ``a/empty``, ``top``."""
    made = tmp_path / "tree"
    (made / "a/b").mkdir(parents=True)
    (made / "a/b/file").write_bytes(b"data")
    (made / "a/empty").write_bytes(b"")
    (made / "top").write_bytes(b"data")
    return made


def shown(tree: Path, dirty: DirtySet, open_files: dict[FileKey, OpenFile] | None = None) -> list[str]:
    """Each entry as ``kind path``, with ``!`` when stale."""
    manifest = dirty_manifest(tree, dirty, open_files or {})
    check_form(manifest)
    return [f"{entry.kind} {entry.path.decode()}{'!' if entry.stale else ''}".strip() for entry in manifest]


def marked(**marks: int) -> DirtySet:
    return DirtySet(1, {name.replace("__", "/").encode(): flags for name, flags in marks.items()})


def open_file(file: Path, *, mapped: bool = False, ctime_ns: int | None = None) -> dict[FileKey, OpenFile]:
    status = file.stat()
    ctime_ns = status.st_ctime_ns if ctime_ns is None else ctime_ns
    return {(status.st_dev, status.st_ino): OpenFile(ctime_ns, mapped)}


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        (marked(), []),
        (marked(top=CONTENT), ["d", "f top!"]),
        (marked(top=METADATA), ["d", "f top"]),
        (marked(top=METADATA | CONTENT), ["d", "f top!"]),
        (marked(top=NAME), ["d", "f top!"]),
        (marked(a=METADATA), ["d", "d a"]),
        (marked(a=NAME | FOLDER), ["d", "d a!", "d a/b!", "f a/b/file!", "f a/empty"]),
        (marked(a__empty=CONTENT), ["d", "d a", "f a/empty"]),
        (marked(a__b__file=CONTENT), ["d", "d a", "d a/b", "f a/b/file!"]),
        (marked(gone=NAME), ["d", "- gone"]),
        (marked(gone=NAME, gone__below=CONTENT), ["d", "- gone"]),
        (marked(gone__below=CONTENT), ["d", "- gone"]),
        (marked(top__below=NAME), ["d", "f top!"]),
        (marked(a=NAME, a__gone=NAME), ["d", "d a!", "d a/b!", "f a/b/file!", "f a/empty", "- a/gone"]),
        (marked(**{"": METADATA}), ["d"]),
    ],
)
def test_marks_become_entries(tree: Path, dirty: DirtySet, expected: list[str]) -> None:
    assert shown(tree, dirty) == expected


def test_a_mark_below_a_symlink_never_leads_out_of_the_tree(tree: Path) -> None:
    """D19: the directory may have become a link since."""
    outside = tree.with_name("outside")
    outside.mkdir()
    (outside / "file").write_bytes(b"not of the tree")
    shutil.rmtree(tree / "a/b")
    (tree / "a/b").symlink_to(outside)
    assert shown(tree, marked(a__b__file=CONTENT)) == ["d", "d a", "l a/b"]


def test_an_untrusted_set_gives_the_whole_tree(tree: Path) -> None:
    """D12: unknown means everything."""
    lost = DirtySet(1, trusted=False, why="overflow")
    assert shown(tree, lost) == ["d", "d a", "d a/b", "f a/b/file!", "f a/empty", "f top!"]
    assert dirty_manifest(tree, lost) == list(everything(tree))


def test_what_vanishes_while_it_is_listed_is_no_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: during the rounds the container works on."""
    real: Callable[..., None] = LinkIndex.settle

    def settle_then_remove(index: LinkIndex, *arguments: object) -> None:
        real(index, *arguments)
        shutil.rmtree(tree / "a")

    monkeypatch.setattr(LinkIndex, "settle", settle_then_remove)
    assert shown(tree, marked(a__b__file=CONTENT, a__empty=METADATA, top=CONTENT)) == ["d", "- a", "f top!"]


def test_a_tree_that_vanished_is_an_error_and_not_an_empty_manifest(tree: Path) -> None:
    """D22."""
    shutil.rmtree(tree)
    with pytest.raises(PermanentError):
        dirty_manifest(tree, marked(top=CONTENT))


def test_every_name_of_a_known_file_is_listed_with_the_one_that_is_marked(tree: Path) -> None:
    """D15."""
    os.link(tree / "top", tree / "a/b/other")
    dirty = marked(top=CONTENT)
    dirty.links.note(b"top", (tree / "top").stat())
    dirty.links.note(b"a/b/other", (tree / "top").stat())
    assert shown(tree, dirty) == ["d", "d a", "d a/b", "f a/b/other!", "f top!"]


def test_names_that_no_longer_lead_to_the_file_are_not_believed(tree: Path) -> None:
    """D15: the index is a hint, the inode is the truth."""
    os.link(tree / "top", tree / "other")
    dirty = marked(top=METADATA)
    dirty.links.note(b"a/b/file", (tree / "top").stat())
    assert shown(tree, dirty) == ["d", "f other", "f top"]


# --- closings and open files -------------------------------------------------------------------


def closed_top(tree: Path, monkeypatch: pytest.MonkeyPatch) -> DirtySet:
    """``top`` was open all along, and its closing is the only event."""
    monkeypatch.setattr(hostd.dirty, "_SCAN_NS", 0)
    dirty = marked(top=CLOSED)
    dirty.opened = open_file(tree / "top")
    return dirty


def test_a_closing_explained_by_the_stop_is_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D12."""
    dirty = closed_top(tree, monkeypatch)
    assert shown(tree, dirty, open_file(tree / "top")) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda dirty, seen: seen.clear(),
        lambda dirty, seen: seen.update({key: OpenFile(file.ctime_ns, True) for key, file in seen.items()}),
        lambda dirty, seen: seen.update({key: OpenFile(1, False) for key in seen}),
        lambda dirty, seen: seen.update({key: OpenFile(-1, False) for key in seen}),
        lambda dirty, seen: setattr(dirty, "opened", {key: OpenFile(1, False) for key in seen}),
        lambda dirty, seen: setattr(dirty, "opened", {key: OpenFile(-1, False) for key in seen}),
        lambda dirty, seen: setattr(dirty, "file_system", b"tmpfs"),
        lambda dirty, seen: setattr(dirty, "file_system", b"fuse.sshfs"),
        lambda dirty, seen: dirty.__dict__.update(opened={}, began_ns=LONG_AGO_NS),
    ],
    ids=["not seen open", "mapped", "changed since the look", "too recent at the look", "changed in between",
         "too recent at the beginning", "tmpfs", "fuse", "opened later, and changed"],
)  # fmt: skip
def test_any_doubt_about_a_closing_makes_the_file_stale(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[DirtySet, dict[FileKey, OpenFile]], object],
) -> None:
    """D12: unknown means dirty."""
    dirty = closed_top(tree, monkeypatch)
    seen = open_file(tree / "top")
    spoil(dirty, seen)
    assert shown(tree, dirty, seen) == ["d", "f top!"]


def test_a_closing_does_not_hide_another_mark(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = closed_top(tree, monkeypatch)
    dirty.mark(b"top", METADATA)
    assert shown(tree, dirty, open_file(tree / "top")) == ["d", "f top"]
    dirty.mark(b"top", CONTENT)
    assert shown(tree, dirty, open_file(tree / "top")) == ["d", "f top!"]


def test_a_snapshot_keeps_what_it_had(tree: Path) -> None:
    dirty = marked(top=CONTENT)
    before = dirty.snapshot()
    dirty.mark(b"a", METADATA)
    assert before.marks == {b"top": CONTENT}


def test_everything_is_stale_but_what_is_empty(tree: Path) -> None:
    listed: dict[bytes, Entry] = {entry.path: entry for entry in everything(tree)}
    assert {path for path, entry in listed.items() if entry.stale} == {b"a/b/file", b"top"}
