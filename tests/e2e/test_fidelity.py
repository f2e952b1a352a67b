"""What a container sees after its move is what was there: whole trees of everything odd, held against the source.

The project's own manifest tool compares: path bytes, kinds, modes, owners, sizes, times, links, attributes, contents, and
allocation. The container changes its data until it is stopped, and then no more, so that every comparison is exact.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from events import schema
from hostd.manifest import Entry
from hostd.transport import STALL_TIMEOUT_SECONDS, STALLS
from labkit.waiting import wait_until
from tests.support.fleet import ON_A_UNION, Fleet, differences, told
from tests.support.trees import grow, grow_deep

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

MIB = 1024 * 1024
SPARSE_BYTES = 2 * 1024 * MIB + 12_345
"""Apparent; it holds a few pages. Its holes cross the link as zeros, so it costs time, but no space."""
SPARSE_SLACK_BLOCKS = 64
"""Of 512 bytes: where a file system begins a block is its own affair."""
LONG_FILES = 100_000
LONG_BYTES = int(2.5 * 1024) * MIB
LONG_SECONDS = 3600.0

ODDITIES: dict[str, Callable[[Path], object]] = {
    "attribute": lambda file: os.setxattr(file, "user.mark", b"x"),
    "link": lambda file: os.link(file, file.with_name("another name")),
    "hole": lambda file: os.truncate(file, 10 * MIB),
    "acl": lambda file: subprocess.run(["setfacl", "-m", "u:7:r", str(file)], check=True),
}
"""What makes a plain file one of which a simple copy has not all."""
SURVEYED = ("target.create_container:before_effect", "source_prepared")

BUSY = r"""
    [ -e /data/stopped ] && exec sleep 100000
    trap 'echo last > /data/stopped; exit 0' TERM
    cd /data/busy
    odd="$(printf -- '-x \n\377:,*')"
    n=0
    while :; do
        n=$((n + 1))
        echo $n >> log
        echo $n > "$odd.$((n % 7))"; mv "$odd.$((n % 7))" "./new $odd.$((n % 3))"
        dd if=/dev/urandom of=holes bs=4096 count=1 seek=$((n % 16 * 1024)) conv=notrunc 2>/dev/null
        [ $((n % 8)) = 0 ] && truncate -s $((n % 5 * 1000000 + 777)) shrinks
        head -c 300000 /dev/urandom > fresh.$((n % 4)); ln -f fresh.$((n % 4)) "linked.$((n % 2))"
        mv moves away && mkdir moves && mv away/* moves/ && rmdir away
        rm -rf kind; case $((n % 5)) in 0) mkdir kind;; 1) ln -s "$odd" kind;; 2) mkfifo kind;; 3) mknod kind c 1 7;; 4) : > kind;; esac
        rm -f ../small/$((n % 30))/$n; chown $((n % 9)):5 ../small/0/0; chmod $((n % 7))00 ../small/1/1
        sleep 0.02
    done
"""
"""Odd names, replaced, renamed, linked, truncated, written into holes, changed in kind; and a last word on its way out."""


def plant(tree: Path, *, files: int, large_bytes: int = 0) -> None:
    """Everything odd, two hundred directories below each other, ``files`` small files, and a large sparse one."""
    grow(tree / "grown", 77, entries=300, depth=200)
    for number in range(30):
        (tree / "small" / str(number)).mkdir(parents=True)
    contents = random.Random(7).randbytes(8192)
    for number in range(files):
        start = number % 4096
        (tree / "small" / str(number % 30) / str(number)).write_bytes(contents[start : start + number % 3001])
    with (tree / "sparse").open("wb") as file:
        for offset in (0, 700 * MIB + 1, SPARSE_BYTES - 5):
            file.seek(offset)
            file.write(b"data!")
    busy = tree / "busy"
    (busy / "moves" / "below").mkdir(parents=True)
    (busy / "moves" / "below" / "file").write_bytes(contents)
    with (busy / "holes").open("wb") as file:
        file.truncate(64 * MIB)
    if large_bytes:
        with (tree / "large").open("wb") as file:
            for _ in range(large_bytes // (4 * MIB)):
                file.write(os.urandom(4 * MIB))


def begin(fleet: Fleet, name: str, *, files: int, large_bytes: int = 0) -> Path:
    """A container over such a tree, which it goes on changing until it is stopped."""
    tree = fleet.volume("alpha", name)
    plant(tree, files=files, large_bytes=large_bytes)
    fleet.at_end(lambda: subprocess.run(["rm", "-rf", "--", str(tree / "grown")], check=True))
    fleet.run(name, command=["sh", "-c", BUSY], volumes={name: {"bind": "/data"}})
    wait_until((tree / "busy" / "log").exists, "the container does not begin", 20)
    return tree


def kept_on_source(fleet: Fleet, name: str, timeout_seconds: float = 300) -> list[Entry]:
    """The frozen source."""
    place = f"/var/lib/docker/volumes/{name}/_data"
    [kept] = fleet.describe("alpha", place, timeout_seconds=timeout_seconds)
    assert any(entry.path == b"stopped" for entry in kept), "the container wrote on its way out"
    assert max(entry.path.count(b"/") for entry in kept) >= 200
    return kept


def assert_sparse(kept: list[Entry], there: list[Entry]) -> None:
    """What takes no room on the source takes none on the target."""
    on_source = {entry.path: entry for entry in kept if entry.kind == "f" and entry.blocks * 512 < entry.size}
    assert b"sparse" in on_source
    for entry in there:
        if entry.path in on_source:
            # rsync makes a hole of every longer run of zeros, so it may well be less.
            assert entry.blocks <= on_source[entry.path].blocks + SPARSE_SLACK_BLOCKS, entry.path


def test_everything_odd_is_on_the_target_exactly_as_on_the_source_at_every_stage(fleet: Fleet) -> None:
    """P4, D13, D15, D16, D17, D18, D19: on the union, once released, and as a plain volume."""
    begin(fleet, "exact", files=3000)
    fleet.failpoints("hostd/beta", "target.fill_replica:before_effect=pause")
    fleet.request("exact-1", "exact", **ON_A_UNION)
    # A round whose rsync opens a FIFO that has just taken a file's place waits for it until it is given up, and tried again.
    fleet.wait_for("exact-1", "target_started", timeout_seconds=STALLS * STALL_TIMEOUT_SECONDS + 200)
    fleet.wait_running("beta", "exact")
    kept = kept_on_source(fleet, "exact")
    assert differences(kept, *fleet.describe_seen("beta", "exact", "/data", timeout_seconds=300)) == []
    claimed = next(event.data for event in fleet.events("exact-1") if isinstance(event.data, schema.SourceStopped))
    assert sum(dirty.stale_files for dirty in claimed.dirty) > 0, "something was read from the source"
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("exact-1", "completed", timeout_seconds=200)
    assert differences(kept, *fleet.describe_seen("beta", "exact", "/data", timeout_seconds=300)) == []
    fleet.control("exact-1", "finalise")
    fleet.wait_for("exact-1", "finalised", timeout_seconds=90)
    [plain] = fleet.describe("beta", "/var/lib/docker/volumes/exact/_data", timeout_seconds=300)
    assert differences(kept, plain) == []
    assert_sparse(kept, plain)
    fleet.assert_sound("exact-1")


@pytest.mark.parametrize(
    ("name", "odd", "pause", "after", "plain"),
    [
        *((f"surveyed-{odd}", (odd,), *SURVEYED, msgspec.UNSET) for odd in ODDITIES),
        ("armed", tuple(ODDITIES), "target.pull_round:before_effect", "sync_armed", ("/data",)),
    ],
)
def test_what_becomes_odd_in_a_plain_tree_travels_whenever_it_does(
    fleet: Fleet, name: str, odd: tuple[str, ...], pause: str, after: str, plain: tuple[str, ...] | msgspec.UnsetType
) -> None:
    """P4, D15, D16, D17: the first round of a tree without attributes asks for none; they come before it began, or after."""
    tree = fleet.volume("alpha", name)
    for file in ("plain", *ODDITIES):
        (tree / file).write_bytes(os.urandom(5000))
    fleet.sleeper(name, volumes={name: {"bind": "/data"}})
    fleet.failpoints("hostd/beta", f"{pause}=pause")
    fleet.request(f"{name}-1", name)
    fleet.wait_for(f"{name}-1", after)
    for kind in odd:
        ODDITIES[kind](tree / kind)
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=60)
    first = next(event.data for event in fleet.events(f"{name}-1") if isinstance(event.data, schema.SyncArmed))
    assert first.plain == plain
    place = f"/var/lib/docker/volumes/{name}/_data"
    [kept], [there] = fleet.describe("alpha", place), fleet.describe("beta", place)
    assert differences(kept, there) == []
    found = {entry.path for entry in there if entry.xattrs or entry.link_group or entry.blocks * 512 < entry.size}
    assert found - {b"another name"} == set(map(os.fsencode, odd))
    fleet.assert_sound(f"{name}-1")


def test_paths_that_no_union_could_carry_are_named_and_refused_before_anything_stops(fleet: Fleet) -> None:
    """D13, P14: longer than PATH_MAX, so that only a walk from directory to directory finds them."""
    tree = fleet.volume("alpha", "toodeep")
    grow_deep(tree / "chain", 90)
    fleet.at_end(lambda: subprocess.run(["rm", "-rf", "--", str(tree / "chain")], check=True))
    fleet.sleeper("toodeep", volumes={"toodeep": {"bind": "/data"}})
    began = fleet.present("alpha", "toodeep").attrs["State"]["StartedAt"]
    fleet.request("toodeep-1", "toodeep")
    events = fleet.wait_end("toodeep-1", "aborted")
    reasons = [event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered)]
    assert [reason.count("too long for a redirect") for reason in reasons] == [1], told(events)
    assert "source_stopped" not in [event.type for event in events]
    assert fleet.present("alpha", "toodeep").attrs["State"]["StartedAt"] == began
    for host in ("alpha", "beta"):
        fleet.assert_clean(host, "toodeep-1")


@pytest.mark.long
@pytest.mark.timeout(2 * LONG_SECONDS)
def test_a_hundred_thousand_files_and_one_of_gigabytes_move_under_a_container_that_writes(fleet: Fleet) -> None:
    """P4, D13, D16."""
    began = time.monotonic()
    begin(fleet, "vast", files=LONG_FILES, large_bytes=LONG_BYTES)
    print(f"planted in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    fleet.request("vast-1", "vast")
    fleet.wait_end("vast-1", "completed", timeout_seconds=LONG_SECONDS)
    print(f"completed in {time.monotonic() - began:.0f} s\n{told(fleet.events('vast-1'))}")
    kept = kept_on_source(fleet, "vast", LONG_SECONDS)
    seen = fleet.describe_seen("beta", "vast", "/data", timeout_seconds=LONG_SECONDS)
    assert differences(kept, *seen) == []
    fleet.control("vast-1", "finalise")
    fleet.wait_for("vast-1", "finalised", timeout_seconds=LONG_SECONDS)
    [plain] = fleet.describe("beta", "/var/lib/docker/volumes/vast/_data", timeout_seconds=LONG_SECONDS)
    assert differences(kept, plain) == []
    assert_sparse(kept, plain)
    sizes = sum(entry.size for entry in kept if entry.kind == "f")
    print(f"{len(kept)} entries, {sizes} bytes apparent, equal on the union and as a plain volume")
    fleet.assert_sound("vast-1")
