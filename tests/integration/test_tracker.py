"""The tracker against real file systems: whatever changes, its manifests list enough to make a copy exact again."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from events.errors import PermanentError
from hostd.manifest import Entry
from hostd.openfiles import writable_files
from hostd.tracker import DirtySet, Queue, Tracker, dirty_manifest, everything
from tests.support.copy_model import CopyModel, check_form
from tests.support.workload import Workload

pytestmark = pytest.mark.root

PROJECT = Path(__file__).parents[2]
DEADLINE_SECONDS = 20.0


class LateQueue(Queue):
    """Hands out nothing until it is opened: a tracker that is far behind the events."""

    gate_open = True

    def take(self) -> bytes:
        if self.gate_open:
            return super().take()
        time.sleep(0.001)
        return b""


class Queues:
    """Makes the queues of one tracker, and remembers them."""

    def __init__(self) -> None:
        self.made: list[LateQueue] = []

    def __call__(self) -> LateQueue:
        self.made.append(LateQueue(False, True))
        return self.made[-1]

    @contextlib.contextmanager
    def held_back(self, really: bool = True) -> Iterator[None]:
        for queue in self.made:
            queue.gate_open = not really
        yield
        for queue in self.made:
            queue.gate_open = True


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    made.mkdir()
    return made


@contextlib.contextmanager
def tracking(tree: Path, open_queue: Callable[[], Queue] | None = None) -> Iterator[Tracker]:
    tracker = Tracker(tree, open_queue=open_queue) if open_queue else Tracker(tree)
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.stop()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.002)


def listing(tree: Path, tracker: Tracker) -> dict[bytes, Entry]:
    manifest = dirty_manifest(tree, tracker.drain())
    check_form(manifest)
    return {entry.path: entry for entry in manifest}


def stale_files(listed: dict[bytes, Entry]) -> set[bytes]:
    return {path for path, entry in listed.items() if entry.kind == "f" and entry.stale}


# --- the oracle --------------------------------------------------------------------------------


def quiet_story(tree: Path, seed: int, *, late: bool) -> None:
    """Three generations; in each the tree is copied while quiet, then worked on, then the list is applied."""
    workload = Workload(tree, seed)
    workload.populate()
    queues = Queues()
    with tracking(tree, queues) as tracker:
        for generation in (1, 2, 3):
            tracker.arm(generation)
            copy = CopyModel(tree)
            workload.settled()
            workload.done.clear()
            with queues.held_back(late):
                for _ in range(1 + seed % 12):
                    workload.step()
            seen = tracker.drain()
            assert seen.trusted, seen.why
            manifest = dirty_manifest(tree, seen)
            check_form(manifest)
            copy.apply(manifest)
            story = "\n".join(workload.done)
            wrong = copy.differences()
            assert not wrong, f"seed {seed}, generation {generation}, late {late}: {wrong}\n{story}"


def busy_story(tree: Path, seed: int, *, late: bool = False) -> None:
    """The real thing: rounds of copying while another process works at full speed, a stop, the last list."""
    Workload(tree, seed).populate()
    queues = Queues()
    with tracking(tree, queues) as tracker, working(tree, seed + 1) as worker:
        tracker.arm(1, writable_files(worker.pid))
        copy = CopyModel(tree)
        for round_number in (2, 3, 4):
            with queues.held_back(late):
                time.sleep(0.01 * (seed % 4))
            open_files = writable_files(worker.pid)
            seen = tracker.arm(round_number, open_files)
            assert seen.trusted, seen.why
            manifest = dirty_manifest(tree, seen, open_files)
            check_form(manifest)
            copy.apply(manifest)
        open_files = writable_files(worker.pid)
        stop(worker)
        seen = tracker.drain()
        assert seen.trusted, seen.why
        manifest = dirty_manifest(tree, seen, open_files)
        check_form(manifest)
        copy.apply(manifest)
        wrong = copy.differences()
        assert not wrong, f"seed {seed}, late {late}: {wrong}"


@contextlib.contextmanager
def working(tree: Path, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    before = tree.lstat().st_mtime_ns, sorted(os.listdir(tree))
    command = [sys.executable, "-m", "tests.support.workload", str(tree), str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=PROJECT) as worker:
        try:
            until(lambda: (tree.lstat().st_mtime_ns, sorted(os.listdir(tree))) != before, "the first change")
            yield worker
        finally:
            stop(worker)


def stop(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("block", range(8))
def test_a_copy_that_obeys_the_manifest_equals_the_tree(tmp_path: Path, block: int, late: bool) -> None:
    """D12: random work on small trees, with a tracker that follows closely or sees it all only at the end."""
    for seed in range(block * 12, block * 12 + 12):
        tree = tmp_path / str(seed)
        tree.mkdir()
        quiet_story(tree, seed, late=late)


@pytest.mark.parametrize("seed", range(12))
def test_a_copy_made_in_rounds_during_full_work_equals_the_tree_after_the_stop(tree: Path, seed: int) -> None:
    """D12, D11: generations begin while a process creates, renames and removes as fast as it can."""
    busy_story(tree, seed, late=seed % 3 == 0)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_copy_that_obeys_the_manifest_equals_the_tree_over_many_seeds(tmp_path: Path) -> None:
    """D12: as above, thousands of times."""
    for seed in range(1000, 4000):
        tree = tmp_path / str(seed)
        tree.mkdir()
        quiet_story(tree, seed, late=bool(seed % 2))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_copy_made_in_rounds_during_full_work_equals_the_tree_over_many_seeds(tmp_path: Path) -> None:
    """D12, D11: as above, hundreds of times."""
    for seed in range(1000, 1400):
        tree = tmp_path / str(seed)
        tree.mkdir()
        busy_story(tree, seed, late=bool(seed % 2))


# --- what may be listed ------------------------------------------------------------------------


def test_nothing_is_listed_when_nothing_changed(tree: Path) -> None:
    (tree / "folder").mkdir()
    (tree / "folder/file").write_bytes(b"as it was")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "folder/file").read_bytes()
        assert listing(tree, tracker) == {}


def test_the_list_follows_the_change_and_not_the_tree(tree: Path) -> None:
    """D13: an entry for what changed, one for each directory above it."""
    for number in range(300):
        (tree / f"folder{number}").mkdir()
        (tree / f"folder{number}/file").write_bytes(b"as it was")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "folder7/file").write_bytes(b"changed")
        listed = listing(tree, tracker)
    assert list(listed) == [b"", b"folder7", b"folder7/file"]
    assert stale_files(listed) == {b"folder7/file"}


def test_a_change_of_metadata_does_not_make_contents_stale(tree: Path) -> None:
    (tree / "file").write_bytes(b"large")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "file").chmod(0o600)
        os.setxattr(tree / "file", "user.note", b"1")
        os.utime(tree / "file", ns=(1, 2))
        listed = listing(tree, tracker)
    assert (listed[b"file"].mode, listed[b"file"].mtime_ns, listed[b"file"].stale) == (0o600, 2, False)


def test_each_generation_lists_its_own_changes(tree: Path) -> None:
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "first").write_bytes(b"1")
        before = tracker.arm(2)
        (tree / "second").write_bytes(b"2")
        assert before.generation == 1
        assert b"first" in before.marks
        assert b"second" not in before.marks
        assert stale_files(listing(tree, tracker)) == {b"second"}


def test_draining_does_not_end_the_generation(tree: Path) -> None:
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "first").write_bytes(b"1")
        first = tracker.drain()
        (tree / "second").write_bytes(b"2")
        assert stale_files(listing(tree, tracker)) == {b"first", b"second"}
        assert b"second" not in first.marks


def test_a_directory_that_took_the_place_of_another_is_listed_as_complete(tree: Path) -> None:
    """D12: no event names what went away with the old one, so a copy must drop whatever is not listed."""
    for folder, name in (("here", "old"), ("there", "new")):
        (tree / folder).mkdir()
        (tree / folder / name).write_bytes(b"data")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "here").rename(tree / "gone")
        (tree / "there").rename(tree / "here")
        listed = listing(tree, tracker)
    assert listed[b"here"].stale
    assert [path for path in listed if path.startswith(b"here/")] == [b"here/new"]
    assert listed[b"there"].kind == "-"


def test_directories_filled_at_once_are_listed_with_all_that_is_in_them(tree: Path) -> None:
    """D12: a directory can be filled before its watch is there."""
    queues = Queues()
    with tracking(tree, queues) as tracker:
        tracker.arm(1)
        with queues.held_back():
            (tree / "a/b/c").mkdir(parents=True)
            (tree / "a/b/c/file").write_bytes(b"data")
        assert stale_files(listing(tree, tracker)) == {b"a/b/c/file"}
        (tree / "a/b/c/late").write_bytes(b"data")
        assert b"a/b/c/late" in stale_files(listing(tree, tracker))


def test_a_moved_directory_is_watched_at_its_new_place(tree: Path) -> None:
    (tree / "old/inner").mkdir(parents=True)
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "old").rename(tree / "new")
        tracker.arm(2)
        (tree / "new/inner/file").write_bytes(b"data")
        assert stale_files(listing(tree, tracker)) == {b"new/inner/file"}


def test_a_directory_moved_out_of_the_tree_and_back_is_watched_again(tree: Path) -> None:
    (tree / "folder/inner").mkdir(parents=True)
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "folder").rename(tree.parent / "outside")
        tracker.arm(2)
        (tree.parent / "outside/inner/file").write_bytes(b"not of the tree")
        assert listing(tree, tracker) == {}
        (tree.parent / "outside").rename(tree / "folder")
        tracker.arm(3)
        (tree / "folder/inner/other").write_bytes(b"data")
        assert stale_files(listing(tree, tracker)) == {b"folder/inner/other"}


def test_symlinks_are_not_followed(tree: Path) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    (tree / "link").symlink_to(outside)
    with tracking(tree) as tracker:
        tracker.arm(1)
        (outside / "file").write_bytes(b"not of the tree")
        assert listing(tree, tracker) == {}
        (tree / "other").symlink_to(outside)
        listed = listing(tree, tracker)
    assert [(path, entry.kind) for path, entry in listed.items()] == [(b"", "d"), (b"other", "l")]


def test_mount_points_are_not_crossed(tree: Path) -> None:
    (tree / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree / "mounted"], check=True)
    try:
        with tracking(tree) as tracker:
            tracker.arm(1)
            (tree / "mounted/file").write_bytes(b"not of the tree")
            assert listing(tree, tracker) == {}
    finally:
        subprocess.run(["umount", tree / "mounted"], check=True)


def test_names_of_any_bytes_and_paths_of_any_length_are_tracked(tree: Path) -> None:
    """D13, D19: twenty names of 255 bytes make a path longer than the kernel takes at once."""
    odd = b"\xff\n- \\*" + b"x" * 248
    at = os.open(tree, os.O_RDONLY)
    with tracking(tree) as tracker:
        tracker.arm(1)
        for _ in range(20):
            os.mkdir(odd, dir_fd=at)
            below = os.open(odd, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        tracker.arm(2)
        os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        os.close(at)
        listed = listing(tree, tracker)
        assert list(listed)[-1] == b"/".join([odd] * 20 + [b"file"])
    subprocess.run(["rm", "-rf", "--", tree], check=True)


# --- hard links --------------------------------------------------------------------------------


def test_a_write_through_one_name_makes_every_name_stale(tree: Path) -> None:
    """D15: the event tells one name only."""
    (tree / "a").mkdir()
    (tree / "a/one").write_bytes(b"data")
    os.link(tree / "a/one", tree / "two")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "two").write_bytes(b"other")
        listed = listing(tree, tracker)
    assert stale_files(listed) == {b"a/one", b"two"}
    assert listed[b"a/one"].link_group == listed[b"two"].link_group != 0


def test_a_new_name_brings_the_old_one_into_the_list(tree: Path) -> None:
    """D15: else the copy would have two files for one."""
    (tree / "a").mkdir()
    (tree / "a/one").write_bytes(b"data")
    with tracking(tree) as tracker:
        tracker.arm(1)
        os.link(tree / "a/one", tree / "two")
        listed = listing(tree, tracker)
        assert listed[b"a/one"].link_group == listed[b"two"].link_group != 0
        tracker.arm(2)
        (tree / "a/one").chmod(0o600)
        listed = listing(tree, tracker)
    assert {path for path, entry in listed.items() if entry.mode == 0o600} == {b"a/one", b"two"}
    assert not stale_files(listed)


@pytest.mark.parametrize("known", [True, False])
def test_a_write_through_a_name_that_is_gone_makes_the_remaining_name_stale(tree: Path, known: bool) -> None:
    """D15: the name that the event told leads nowhere any more."""
    (tree / "one").write_bytes(b"data")
    if known:
        os.link(tree / "one", tree / "two")
    with tracking(tree) as tracker:
        tracker.arm(1)
        if not known:
            os.link(tree / "one", tree / "two")
            # One look at the new name while it is there is all that the tracker needs.
            until(lambda: b"two" in tracker.drain().linked, "the new name is noticed")
        (tree / "two").write_bytes(b"other")
        (tree / "two").unlink()
        assert stale_files(listing(tree, tracker)) == {b"one"}


def test_names_made_before_the_first_generation_are_known_in_it(tree: Path) -> None:
    """D15: nobody lists what changed between the start and the first generation, but it is learned."""
    (tree / "one").write_bytes(b"data")
    with tracking(tree) as tracker:
        os.link(tree / "one", tree / "two")
        tracker.arm(1)
        (tree / "two").write_bytes(b"other")
        (tree / "two").unlink()
        assert stale_files(listing(tree, tracker)) == {b"one"}


def test_losing_a_name_does_not_make_the_others_stale(tree: Path) -> None:
    """D15: or removing an old backup made of hard links would carry all the others again."""
    (tree / "one").write_bytes(b"data")
    os.link(tree / "one", tree / "two")
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "two").unlink()
        listed = listing(tree, tracker)
    assert listed[b"two"].kind == "-"
    assert not stale_files(listed)


# --- trust -------------------------------------------------------------------------------------


def test_an_overflow_of_the_queue_costs_the_trust_until_the_next_generation(tree: Path) -> None:
    """D12: a real one; the kernel drops events beyond fs.inotify.max_queued_events."""
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (tree / "folder").mkdir()
    queues = Queues()
    with tracking(tree, queues) as tracker:
        tracker.arm(1)
        with queues.held_back(), open(tree / "a", "wb", 0) as one, open(tree / "b", "wb", 0) as other:
            for _ in range(events // 2 + 10):
                one.write(b"1")
                other.write(b"2")
            (tree / "folder/unseen").write_bytes(b"the event of this one was dropped")
        until(lambda: not tracker.trusted, "the overflow is noticed")
        assert "overflow" in tracker.why
        seen = tracker.drain()
        assert not seen.trusted
        assert dirty_manifest(tree, seen) == list(everything(tree))
        assert not tracker.arm(2).trusted
        assert (tracker.trusted, tracker.why) == (True, "")
        (tree / "folder/seen").write_bytes(b"data")
        assert stale_files(listing(tree, tracker)) == {b"folder/seen"}


class LimitedQueue(Queue):
    """Has few watches left."""

    left = 2

    def add_watch(self, path: bytes, mask: int) -> int:
        if LimitedQueue.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        LimitedQueue.left -= 1
        return int(super().add_watch(path, mask))


def test_the_watch_limit_costs_the_trust_until_it_is_raised(tree: Path) -> None:
    """D12: starting does not fail, but nothing is vouched for."""
    for name in "abc":
        (tree / name).mkdir()
    LimitedQueue.left = 2
    with tracking(tree, lambda: LimitedQueue(False, True)) as tracker:
        assert not tracker.trusted
        assert "fs.inotify.max_user_watches" in tracker.why
        assert not tracker.arm(1).trusted
        assert not tracker.trusted
        LimitedQueue.left = 100
        assert not tracker.arm(2).trusted
        assert tracker.trusted
        (tree / "c/file").write_bytes(b"data")
        assert stale_files(listing(tree, tracker)) == {b"c/file"}


def test_reaching_the_watch_limit_later_costs_the_trust(tree: Path) -> None:
    """D12: by directories that the container makes while it is tracked."""
    LimitedQueue.left = 2
    with tracking(tree, lambda: LimitedQueue(False, True)) as tracker:
        tracker.arm(1)
        assert tracker.trusted
        (tree / "a/b/c").mkdir(parents=True)
        assert not tracker.drain().trusted
        assert not tracker.trusted


def test_a_lack_of_inotify_instances_costs_the_trust(tree: Path) -> None:
    """D12: fs.inotify.max_user_instances."""

    def none_left() -> Queue:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with tracking(tree, none_left) as tracker:
        assert not tracker.trusted
        assert "max_user_instances" in tracker.why


def replace_tree(tree: Path) -> None:
    tree.rename(tree.with_name("moved"))
    tree.mkdir()


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("moved", lambda tree: tree.rename(tree.with_name("moved"))),
        ("replaced", replace_tree),
        ("removed", lambda tree: tree.rmdir()),
        ("covered", lambda tree: subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree], check=True)),
    ],
)
def test_a_tree_that_is_no_longer_there_is_not_vouched_for(
    tree: Path, what: str, act: Callable[[Path], object]
) -> None:
    """D12, D22: what happens in another place, or below a mount, is not what the container sees."""
    with tracking(tree) as tracker:
        tracker.arm(1)
        act(tree)
        try:
            seen = tracker.drain()
            assert not seen.trusted
            assert seen.why
        finally:
            if what == "covered":
                subprocess.run(["umount", tree], check=True)


def test_a_tree_that_is_unmounted_is_not_vouched_for(tree: Path) -> None:
    """D22: its watches end with it."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tree], check=True)
    with tracking(tree) as tracker:
        tracker.arm(1)
        (tree / "file").write_bytes(b"data")
        subprocess.run(["umount", "--lazy", tree], check=True)
        assert not tracker.drain().trusted


# --- beginning and end -------------------------------------------------------------------------


def test_a_missing_tree_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="cannot be opened"):
        Tracker(tmp_path / "missing").start()


def test_stopping_twice_or_before_the_start_is_harmless(tree: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    tracker = Tracker(tree)
    tracker.stop()
    tracker.start()
    tracker.stop()
    tracker.stop()
    assert not tracker.trusted
    assert not tracker.drain().trusted
    assert not tracker.arm(1).trusted
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_tree_that_is_a_file_always_counts_as_changed(tmp_path: Path) -> None:
    """A bind mount of one file: it is small, and its directory is not the container's."""
    file = tmp_path / "settings.ini"
    file.write_bytes(b"data")
    with tracking(file) as tracker:
        before = tracker.arm(1)
        assert before.trusted
        for seen in (before, tracker.drain()):
            (entry,) = dirty_manifest(file, seen)
            assert (entry.path, entry.kind, entry.size, entry.stale) == (b"", "f", 4, True)


def test_a_set_made_by_hand_of_an_untrusted_tracker_lists_everything(tree: Path) -> None:
    (tree / "file").write_bytes(b"data")
    manifest = dirty_manifest(tree, DirtySet(1, trusted=False, why="a reason"))
    assert [(entry.path, entry.stale) for entry in manifest] == [(b"", False), (b"file", True)]
