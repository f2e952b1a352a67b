"""The whole way of one mount, at random: bring, change, apply, mount, work, fill, detach, fold.

At each stage the container's view is held against a plain copy to which the same was done.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostd import local_reads, mounts
from tests.support.trees import grow
from tests.support.unions import Changes, Link, Stand, differences, overlay_marks

pytestmark = pytest.mark.root

SEEDS = int(os.environ.get("CARGO_UNION_SEEDS", "24"))
FIRST_SEED = int(os.environ.get("CARGO_UNION_FIRST_SEED", "0"))
PER_TEST = 6
BLURRED = frozenset({"mtime"})
"""What two equal changes to two trees cannot have in common."""


@pytest.mark.parametrize("start", range(FIRST_SEED, FIRST_SEED + SEEDS, PER_TEST))
def test_what_is_seen_is_what_was_there_through_the_whole_life_of_a_union(
    link: Link, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P4, D15, D16, D17, D18, D19: exact at the cut-over, and a container's work has its ordinary effect.

    Every third as on a kernel that cannot read by itself what has arrived.
    """
    for seed in range(start, min(start + PER_TEST, FIRST_SEED + SEEDS)):
        stand = Stand(link)
        try:
            with monkeypatch.context() as patch:
                if seed % 3 == 0:
                    patch.setattr(local_reads, "possible", lambda *_: False)
                live_through(stand, seed, reads_by_itself=seed % 3 != 0)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            stand.close()


def live_through(stand: Stand, seed: int, *, reads_by_itself: bool) -> None:
    before = stand.begin(lambda tree: grow(tree, seed, entries=20, depth=6))
    Changes(seed, stand.source).make(25)
    stand.cut_over(before)
    record = mounts.mount_at(stand.place)
    assert record is not None
    assert local_reads.LocalReads.used_by(record.options) == reads_by_itself
    assert differences(stand.source, stand.place) == []

    oracle = stand.base / "oracle"
    subprocess.run(["cp", "-a", "--", str(stand.source), str(oracle)], check=True)
    assert differences(stand.source, oracle) == []
    work = Changes(seed + 1, oracle, stand.place)
    work.make(12)
    assert differences(oracle, stand.place, but=BLURRED) == []

    while stand.fill(limit=7):
        work.make(3)
    assert differences(oracle, stand.place, but=BLURRED) == []
    untouched = Path(os.path.join(stand.base, "gone"))
    stand.source.rename(untouched)  # nothing may refer to the source any more
    stand.union.detach_remote()
    work.make(6)
    assert differences(oracle, stand.place, but=BLURRED) == []

    seen = {entry: (stand.place / os.fsdecode(entry)).lstat().st_mtime_ns for entry in _some_paths(stand.place)}
    stand.finish()
    assert differences(oracle, stand.place, but=BLURRED) == []
    assert {entry: (stand.place / os.fsdecode(entry)).lstat().st_mtime_ns for entry in seen} == seen
    assert overlay_marks(stand.place) == []
    assert os.listdir(stand.volume) == ["_data"]


def _some_paths(tree: Path) -> list[bytes]:
    root = os.fsencode(tree)
    found = [b""]
    for directory, directories, files in os.walk(root):
        found += [os.path.join(directory, name)[len(root) + 1 :] for name in directories + files]
    return found
