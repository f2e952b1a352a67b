"""The data path without Docker, at random: real tracker, real rsync rounds during full work, the stop, the real union.

What the union shows is held against the source as it was at the stop: at the mount, and once all contents are here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from events.errors import TransientError
from hostd.dirty import DirtySet, dirty_manifest
from hostd.effects.pull_round import listed_names
from hostd.manifest import Entry
from hostd.openfiles import writable_files
from hostd.tracker import Tracker
from hostd.turn import MAX_ATTEMPTS_BEFORE_CLAIM
from labkit.waiting import wait_until
from tests.support.unions import Link, Stand, differences
from tests.support.workload import Workload

pytestmark = pytest.mark.root

PROJECT = Path(__file__).parents[2]
FIRST_SEED = int(os.environ.get("CARGO_MIGRATION_FIRST_SEED", "1000"))
LONG_SEEDS = int(os.environ.get("CARGO_MIGRATION_SEEDS", "320"))
"""Both, so that the complete run can be made in pieces."""
ROUNDS = 3
STALL_SECONDS = 20
"""rsync's sender hangs in a FIFO that took a file's place while it looked. docs/limits.md says what follows."""


@pytest.mark.parametrize("seed", range(6))
def test_what_the_target_shows_is_what_the_source_had_at_the_stop(link: Link, seed: int) -> None:
    """P4, D11, D12, D15, D16: while a workload creates, renames, links, truncates, maps, punches and deletes."""
    migrate(link, seed)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_what_the_target_shows_is_what_the_source_had_at_the_stop_over_many_seeds(link: Link) -> None:
    """P4, D11, D12, D15, D16."""
    stale = sum(migrate(link, seed) for seed in range(FIRST_SEED, FIRST_SEED + LONG_SEEDS))
    assert stale > LONG_SEEDS, "the stop came in the middle of the work"


def migrate(link: Link, seed: int) -> int:
    """One mount's way, but for its end. Returns how many files had their contents on the source at the mount."""
    stand = Stand(link)
    stand.source.mkdir()
    stand.union.create()
    Workload(stand.source, seed).populate()
    tracker = Tracker(stand.source)
    tracker.start()
    worker = begin_work(stand.source, seed + 1)
    try:
        tracker.arm(1, writable_files(worker.pid))
        insist(lambda: pull(stand))
        for number in range(2, ROUNDS + 1):
            open_files = writable_files(worker.pid)
            entries = listed(stand, tracker.arm(number, open_files), open_files)
            insist(lambda entries=entries: pull(stand, entries))
        open_files = writable_files(worker.pid)
        end_work(worker)
        entries = listed(stand, tracker.drain(), open_files)
        stand.union.attach_remote(link.transport, link.sshd.peer, str(stand.source))
        stand.union.apply(entries)
        stand.mount()
        stale = len(stand.union.fill_list())
        wrong = differences(stand.source, stand.place)
        assert not wrong, f"seed {seed}, at the mount: {wrong}"
        while stand.fill():
            pass
        stand.union.detach_remote()
        wrong = differences(stand.source, stand.place)
        assert not wrong, f"seed {seed}, at the end of the fill: {wrong}"
        wait_until(lambda: taken_down(stand), "the union stays in use", 20)
    finally:
        end_work(worker)
        tracker.stop()
        stand.close()
    subprocess.run(["rm", "-rf", "--", str(stand.base)], check=True)
    return stale


def taken_down(stand: Stand) -> bool:
    """Whatever on this machine makes a mount namespace in this moment holds a copy of the mounts for as long as it sets up."""
    try:
        stand.union.unmount_all()
    except TransientError:
        return False
    return True


def insist(pull: Callable[[], None]) -> None:
    """As the agent does with a step that fails for a cause that may pass."""
    for attempt in range(1, MAX_ATTEMPTS_BEFORE_CLAIM + 1):
        try:
            pull()
        except TransientError:
            if attempt == MAX_ATTEMPTS_BEFORE_CLAIM:
                raise
        else:
            return


def listed(stand: Stand, seen: DirtySet, open_files: dict[object, object]) -> list[Entry]:
    assert seen.trusted, seen.why
    return list(dirty_manifest(stand.source, seen, open_files))


def pull(stand: Stand, entries: list[Entry] | None = None) -> None:
    """A round, as ``pull_round`` does it: of everything, or of what the source lists."""
    listed_only: dict[str, Any] = {}
    if entries is not None:
        if not entries:
            return
        stand.union.prune(entries)
        listed_only = {"files_from": listed_names(entries, layer=False), "reread": True}
    stand.link.transport.rsync_pull(
        stand.link.sshd.peer,
        str(stand.source),
        stand.union.upper_tree,
        temp_dir=stand.union.incoming,
        live=True,
        timeout_seconds=STALL_SECONDS,
        **listed_only,
    )


def begin_work(tree: Path, seed: int) -> subprocess.Popen[bytes]:
    before = tree.lstat().st_mtime_ns, sorted(os.listdir(tree))
    command = [sys.executable, "-m", "tests.support.workload", str(tree), str(seed)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=PROJECT)
    wait_until(lambda: (tree.lstat().st_mtime_ns, sorted(os.listdir(tree))) != before, "nothing changes", 60)
    return worker


def end_work(worker: subprocess.Popen[bytes]) -> None:
    if worker.stdin is not None and not worker.stdin.closed:
        worker.stdin.close()
    assert worker.wait(60) == 0
