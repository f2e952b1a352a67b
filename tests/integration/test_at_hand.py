"""The little that is stale at the stop, read through the open view: all of it, some, or nothing, and exact each time."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from hostd import mounts
from hostd.at_hand import read_at_hand
from hostd.manifest import Entry
from tests.support.trees import grow
from tests.support.unions import Changes, Link, Stand, differences, dirty, overlay_marks, snapshot

pytestmark = pytest.mark.root

LONG = 60.0


class Giver:
    """Gives what the view gives, but for what it ``keeps`` back."""

    def __init__(self, stand: Stand, keeps: Callable[[], bool] = lambda: False, seconds: float = LONG) -> None:
        self._stand, self._keeps, self._seconds = stand, keeps, seconds
        self.kept: list[bytes] = []
        self.given: Mapping[bytes, bytes] = {}

    def __call__(self, wanted: list[tuple[bytes, int]]) -> Mapping[bytes, bytes]:
        asked = [job for job in wanted if not self._keeps()]
        self.kept = [path for path, _ in wanted if path not in dict(asked)]
        self.given = read_at_hand(self._stand.union.stage, asked, time.monotonic() + self._seconds)
        return self.given


def changed(stand: Stand, seed: int) -> list[Entry]:
    """A tree that was brought, and what has changed in it since. The view is open."""
    before = stand.begin(lambda tree: grow(tree, seed, entries=20, depth=6))
    Changes(seed, stand.source).make(25)
    stand.union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(stand.source))
    return dirty(before, snapshot(stand.source))


@pytest.mark.parametrize("seed", range(6))
def test_a_tree_of_which_everything_was_at_hand_is_plain_and_equal_to_the_source(link: Link, seed: int) -> None:
    """P4, D15, D16: no union, and nothing of what was opened for one stays."""
    stand = Stand(link)
    try:
        entries = changed(stand, seed)
        assert stand.union.apply(entries, contents=Giver(stand)).placeholders == []
        assert stand.union.fill_list() == []
        stand.union.place_plain(untouched=True)
        assert differences(stand.source, stand.place) == []
        assert overlay_marks(stand.place) == []
        assert stand.union.state().remote, "the outage does not wait until it is taken down"
        for _ in range(2):
            stand.union.put_away()
        assert mounts.mounts_below(stand.union.stage) == []
        stand.union.remove()
        assert os.listdir(stand.volume) == ["_data"]
    finally:
        stand.close()


@pytest.mark.parametrize("seed", range(6, 18))
def test_what_was_not_at_hand_is_read_through_the_union(link: Link, seed: int) -> None:
    """P4: some contents are given, the others are placeholders; also when it is done again after a crash."""
    stand = Stand(link)
    chance = random.Random(seed)
    try:
        entries = changed(stand, seed)
        for _ in range(2):
            giver = Giver(stand, lambda: chance.random() < 0.5)
            stand.union.apply(entries, contents=giver)
        assert giver.given
        assert sorted(stand.union.fill_list()) == sorted(giver.kept)
        stand.mount()
        assert differences(stand.source, stand.place) == []
        while stand.fill():
            pass
        stand.union.detach_remote()
        assert differences(stand.source, stand.place) == []
        stand.finish()
        assert differences(stand.source, stand.place) == []
    finally:
        stand.close()


def test_a_view_that_does_not_answer_gives_nothing_and_holds_nothing_up(stand: Stand) -> None:
    """D14: the container starts on the union, whose readers wait."""
    entries = changed(stand, 3)
    [sshfs] = mounts.processes_with_argument(os.fsencode(stand.union.remote), program=b"sshfs")
    os.kill(sshfs, signal.SIGSTOP)
    try:
        giver = Giver(stand, seconds=0.2)
        stand.union.apply(entries, contents=giver)
        assert not giver.given
    finally:
        os.kill(sshfs, signal.SIGCONT)
    stand.mount()
    assert differences(stand.source, stand.place) == []
    stand.union.unmount_all()


def test_nothing_is_at_hand_without_a_view(stand: Stand) -> None:
    """D14: it has broken, or been taken away: what lies at its place is this host's own empty directory."""
    stand.begin(lambda tree: grow(tree, 4, entries=5))
    (stand.union.remote / "file").write_bytes(b"of this host")
    assert read_at_hand(stand.union.stage, [(b"file", 12)], time.monotonic() + LONG) == {}


def test_what_is_not_the_file_that_was_announced_is_not_taken(stand: Stand) -> None:
    """S8: another size, a symlink, a FIFO, a directory, a way out of the tree, nothing; the rest comes all the same."""
    stand.begin(lambda tree: tree.mkdir())
    source = stand.source
    (source / "good").write_bytes(b"good")
    (source / "longer").write_bytes(b"longer than said")
    (source / "shorter").write_bytes(b"s")
    (source / "link").symlink_to("good")
    (source / "out").symlink_to("/etc")
    (source / "directory").mkdir()
    os.mkfifo(source / "pipe")
    stand.union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(source))
    names = [b"longer", b"shorter", b"link", b"out/os-release", b"directory", b"pipe", b"gone"]
    size = len(Path("/etc/os-release").read_bytes())
    wanted = [(name, size if name.startswith(b"out") else 4) for name in names]
    found = read_at_hand(stand.union.stage, [*wanted, (b"good", 4)], time.monotonic() + LONG)
    assert found == {b"good": b"good"}
    stand.union.unmount_all()


def test_a_hole_stays_a_hole(stand: Stand) -> None:
    """D15: a sparse file takes no more room than it did."""
    before = stand.begin(lambda tree: tree.mkdir())
    with (stand.source / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(4 * 1024 * 1024)
        file.write(b"end")
    stand.union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(stand.source))
    entries = dirty(before, snapshot(stand.source))
    stand.union.apply(entries, contents=Giver(stand))
    stand.union.place_plain(untouched=True)
    assert differences(stand.source, stand.place) == []
    assert (stand.place / "sparse").stat().st_blocks * 512 <= 64 * 1024
    stand.union.put_away()
