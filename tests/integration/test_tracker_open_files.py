"""What events cannot tell: files that are mapped, written silently, or merely held open until the end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hostd.dirty
from hostd.openfiles import FileKey, OpenFile, writable_files
from hostd.tracker import Tracker, dirty_manifest
from tests.support.file_holder import Holder

pytestmark = pytest.mark.root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    made.mkdir()
    return made


@pytest.fixture
def file(tree: Path) -> Path:
    made = tree / "database"
    made.write_bytes(b"x" * 4096)
    settle()
    return made


@pytest.fixture
def tracker(tree: Path, file: Path) -> Iterator[Tracker]:
    tracker = Tracker(tree)
    tracker.start()
    yield tracker
    tracker.stop()


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as holder:
        yield holder


def settle() -> None:
    """Let a moment pass: a file that changed within the clock's tick cannot be told from one that still changes."""
    time.sleep(0.03)


def key_of(file: Path) -> FileKey:
    return file.stat().st_dev, file.stat().st_ino


def stop_and_list(tracker: Tracker, holder: Holder) -> list[bytes]:
    """As the source does: look, stop the container, drain. The files whose contents are to be carried."""
    open_files = writable_files(holder.pid)
    holder.end()
    return stale(tracker, open_files)


def stale(tracker: Tracker, open_files: dict[FileKey, OpenFile]) -> list[bytes]:
    manifest = dirty_manifest(tracker.tree, tracker.drain(), open_files)
    return [entry.path for entry in manifest if entry.stale]


def test_a_file_merely_held_open_is_clean(tree: Path, file: Path, tracker: Tracker, holder: Holder) -> None:
    """D12: its only event comes when the process ends, and a whole database must not be carried for that."""
    holder("open", file)
    tracker.arm(1, writable_files(holder.pid))
    open_files = writable_files(holder.pid)
    holder.end()
    assert tracker.drain().marks
    assert dirty_manifest(tree, tracker.drain(), open_files) == []


def test_a_file_opened_during_the_generation_and_not_written_is_clean(
    file: Path, tracker: Tracker, holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostd.dirty, "_SCAN_NS", 0)
    tracker.arm(1)
    holder("open", file)
    assert stop_and_list(tracker, holder) == []


def test_a_file_that_was_not_seen_open_before_it_was_closed_is_stale(
    file: Path, tracker: Tracker, holder: Holder
) -> None:
    """D12: it may have been mapped and written to."""
    tracker.arm(1, writable_files(holder.pid))
    holder("open", file)
    holder.end()
    assert stale(tracker, {}) == [b"database"]


def test_a_write_is_stale_although_the_file_was_seen_open(file: Path, tracker: Tracker, holder: Holder) -> None:
    holder("open", file)
    tracker.arm(1, writable_files(holder.pid))
    holder("write", file, "new")
    settle()
    assert stop_and_list(tracker, holder) == [b"database"]


def test_a_write_through_a_mapping_is_stale_although_no_event_tells(
    file: Path, tracker: Tracker, holder: Holder
) -> None:
    """D12: inotify does not see it; the descriptor is closed long since."""
    holder("open", file)
    holder("map", file)
    holder("close", file)
    holder("poke", file, "before")
    settle()
    tracker.arm(1, writable_files(holder.pid))
    holder("poke", file, "after")
    assert tracker.drain().marks == {}
    assert stop_and_list(tracker, holder) == [b"database"]


def test_what_was_mapped_as_the_generation_began_is_stale_though_unmapped_at_its_end(
    file: Path, tracker: Tracker, holder: Holder
) -> None:
    """D12: a page that was dirty already is written again without any trace, not even in the times."""
    holder("open", file)
    holder("map", file)
    holder("poke", file, "before")
    settle()
    tracker.arm(1, writable_files(holder.pid))
    holder("poke", file, "after")
    holder("unmap", file)
    assert tracker.drain().marks == {}
    assert stop_and_list(tracker, holder) == [b"database"]


def test_what_was_mapped_between_the_looks_is_stale(file: Path, tracker: Tracker, holder: Holder) -> None:
    """D12: at both looks it was merely open; only its ctime tells."""
    holder("open", file)
    tracker.arm(1, writable_files(holder.pid))
    holder("map", file)
    holder("poke", file, "once")
    holder("unmap", file)
    settle()
    assert tracker.drain().marks == {}
    assert stop_and_list(tracker, holder) == [b"database"]


def test_a_native_asynchronous_write_is_stale_in_the_generation_it_was_made_in(
    tree: Path, file: Path, tracker: Tracker, holder: Holder
) -> None:
    """D12: io_submit makes no event, and the file stays open for many generations, as databases do."""
    holder("open", file)
    tracker.arm(1, writable_files(holder.pid))
    holder("submit", file, "first")
    settle()
    open_files = writable_files(holder.pid)
    before = tracker.arm(2, open_files)
    assert before.marks == {}
    assert [entry.path for entry in dirty_manifest(tree, before, open_files) if entry.stale] == [b"database"]
    assert stale(tracker, writable_files(holder.pid)) == []
    holder("submit", file, "second")
    settle()
    assert stop_and_list(tracker, holder) == [b"database"]


def test_a_mapped_file_is_found_under_the_name_it_got_right_before_the_generation(
    tree: Path, file: Path, tracker: Tracker, holder: Holder
) -> None:
    """D12: the look came before the renaming, the generation after it."""
    holder("open", file)
    holder("map", file)
    seen = writable_files(holder.pid)
    file.rename(tree / "renamed")
    settle()
    tracker.arm(1, seen)
    holder("poke", file, "data")
    holder("unmap", file)
    assert stale(tracker, {}) == [b"renamed"]


def test_every_name_of_a_mapped_file_is_stale(tree: Path, file: Path, tracker: Tracker, holder: Holder) -> None:
    """D12, D15."""
    os.link(file, tree / "other")
    settle()
    holder("open", file)
    holder("map", file)
    tracker.arm(1, writable_files(holder.pid))
    tracker.arm(2, writable_files(holder.pid))
    assert stop_and_list(tracker, holder) == [b"database", b"other"]


def test_a_file_is_known_under_whatever_path_the_container_sees(
    tree: Path, tmp_path: Path, file: Path, tracker: Tracker
) -> None:
    """D12: another mount namespace, another mount point; and what is outside of the tree is no business of it."""
    inside = tmp_path / "inside \n container"
    inside.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"x" * 4096)
    settle()
    mount = f'mount --make-rprivate / && mount --bind "{tree}" "$0" && exec "$@"'
    with Holder("unshare", "--mount", "sh", "-c", mount, str(inside)) as holder:
        # The holder splits its orders at blanks, so it is given a way around the name.
        at = Path(f"/proc/{holder.pid}/root")
        link = tmp_path / "link"
        link.symlink_to(inside)
        for path in (link / "database", elsewhere):
            holder("open", path)
            holder("map", path)
            holder("close", path)
        assert (at / "proc").exists()
        seen = writable_files(holder.pid)
        assert seen[key_of(file)].mapped_writable_shared
        assert seen[key_of(file)].place.endswith(b"/tree/database")
        tracker.arm(1, seen)
        holder("poke", link / "database", "data")
        assert stop_and_list(tracker, holder) == [b"database"]


def test_on_a_file_system_that_does_not_keep_time_of_mappings_an_open_file_is_stale(tree: Path) -> None:
    """D12: on tmpfs a write through a mapping leaves the ctime as it was."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree], check=True)
    try:
        (tree / "database").write_bytes(b"x" * 4096)
        settle()
        tracker = Tracker(tree)
        tracker.start()
        with Holder() as holder:
            holder("open", tree / "database")
            tracker.arm(1, writable_files(holder.pid))
            holder("map", tree / "database")
            holder("poke", tree / "database", "data")
            holder("unmap", tree / "database")
            assert stop_and_list(tracker, holder) == [b"database"]
        tracker.stop()
    finally:
        subprocess.run(["umount", tree], check=True)


# --- looking -----------------------------------------------------------------------------------


def test_only_what_can_be_written_is_found(tree: Path, file: Path, holder: Holder) -> None:
    read = tree / "read"
    read.write_bytes(b"x" * 4096)
    holder("open", file)
    holder("look", read)
    holder("map_to_read", read)
    found = writable_files(holder.pid)
    assert key_of(read) not in found
    assert found[key_of(file)] == OpenFile(file.stat().st_ctime_ns, False, found[key_of(file)].place)


def test_a_mapping_that_could_be_made_writable_counts_as_one(file: Path, holder: Holder) -> None:
    """D12: mprotect makes no event."""
    holder("open", file)
    holder("map_to_read", file)
    holder("close", file)
    assert writable_files(holder.pid)[key_of(file)].mapped_writable_shared


def test_a_file_that_changed_a_moment_ago_has_no_time_to_compare_with(file: Path, holder: Holder) -> None:
    holder("open", file)
    holder("write", file, "now")
    assert writable_files(holder.pid)[key_of(file)].ctime_ns in {-1, file.stat().st_ctime_ns}
    os.utime(file, ns=(1, 1))
    assert writable_files(holder.pid)[key_of(file)].ctime_ns == -1


def test_processes_that_ended_are_no_error(holder: Holder) -> None:
    holder.end()
    assert writable_files(holder.pid) == {}
