"""A container's writable layer without Docker: a real overlay that changes, the looks at it, and the copy of it."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from events.errors import PermanentError, RefusedError, TransientError
from events.schema import Mount
from hostd import mounts
from hostd.effects.pull_round import listed_names
from hostd.effects.track_changes import changed, whole
from hostd.federation import Union, fold_placeholders
from hostd.layer import ROOTFS, carried, layer_entry
from hostd.layer_tracker import LayerTracker
from hostd.manifest import Entry, compare, decode_manifest, walk, write_manifest
from hostd.openfiles import OpenFile
from hostd.placement import METACOPY, OPAQUE, apply
from hostd.rootfs import require_unused, unmount_left
from tests.support.unions import Link, unmount_below

pytestmark = pytest.mark.root

ORIGIN = b"trusted.overlay.origin"
ROUNDS = 3


class Overlay:
    """An image and the writable layer of one container over it, mounted or not."""

    def __init__(self, base: Path, image: Path) -> None:
        self.image, self.upper, self.work, self.merged = image, base / "upper", base / "work", base / "merged"
        for directory in (self.upper, self.work, self.merged):
            directory.mkdir(parents=True)

    def mount(self) -> None:
        options = f"lowerdir={self.image},upperdir={self.upper},workdir={self.work},index=off"
        mounts.mount("overlay", "a-container", self.merged, options)

    def unmount(self) -> None:
        mounts.unmount(self.merged)

    @property
    def layer(self) -> Mount:
        return Mount(kind="rootfs", name="", destination="/", tree=str(self.upper))


class Bench:
    """The source's container and the target's, and the way between them."""

    def __init__(self, link: Link) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="layer-", dir=link.directory))
        self.link = link
        image = self.base / "image"
        for number in range(12):
            directory = image / f"d{number % 3}" / f"e{number % 2}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"f{number}").write_bytes(b"image %d" % number * 300)
        self.source, self.target = (Overlay(self.base / name, image) for name in ("source", "target"))
        self.union = Union(self.base / "stage", self.target.upper, layer=True)
        self.tracker = LayerTracker(self.source.upper)

    def pull(self, files_from: list[bytes] | None = None) -> None:
        self.link.transport.rsync_pull(
            self.link.sshd.peer, str(self.source.upper), self.union.upper_tree, temp_dir=self.union.incoming,
            files_from=files_from, live=True, reread=files_from is not None, layer=True,
        )  # fmt: skip

    def cut_over(self, entries: list[Entry], *, everything: bool = False) -> None:
        stale = [entry.path for entry in entries if entry.kind == "f" and entry.stale]
        if stale:
            self.union.prune(entries)
            self.pull([entry.path for entry in entries if entry.kind != "f" or entry.stale])
        plain = [_fresh(entry) if entry.kind == "f" else entry for entry in entries]
        self.union.apply(plain, everything=everything)
        self.union.place_plain()

    def differences(self) -> list[str]:
        """Of the layers as they lie there, and of what two containers see on them."""
        found = [
            difference.words for difference in compare(_layer(self.source), _layer(self.target)) if difference.path
        ]
        for overlay in (self.source, self.target):
            if not mounts.is_mounted(overlay.merged):
                overlay.mount()
        seen = (list(walk(overlay.merged, digest=True)) for overlay in (self.source, self.target))
        return found + [difference.words for difference in compare(*seen) if difference.path]


def _fresh(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, stale=False)


def _layer(overlay: Overlay) -> Iterator[Entry]:
    return map(layer_entry, walk(overlay.upper, digest=True))


@pytest.fixture
def bench(link: Link) -> Iterator[Bench]:
    made = Bench(link)
    try:
        yield made
    finally:
        made.tracker.stop()
        unmount_below(made.base)
        shutil.rmtree(made.base)


def misbehave(root: Path, rng: random.Random, steps: int) -> None:
    """What a container may do to its root: write, link, rename, delete, replace directories, change metadata."""

    def paths(kind: Callable[[Path], bool]) -> list[Path]:
        return sorted(path for path in root.rglob("*") if not path.is_symlink() and kind(path))

    for number in range(steps):
        files, directories = paths(Path.is_file), [root, *paths(Path.is_dir)]
        place = rng.choice(directories) / f"n{rng.randrange(10)}"
        match rng.randrange(9):
            case 0 | 1 if not place.is_dir():
                place.write_bytes(rng.randbytes(rng.randrange(3000)))
            case 2 if files:
                with rng.choice(files).open("ab") as file:
                    file.write(b"more")
            case 3 if files:
                rng.choice(files).unlink()
            case 4 if len(directories) > 3:
                chosen = rng.choice(directories[1:])
                shutil.rmtree(chosen)
                if rng.random() < 0.6:
                    chosen.mkdir()
                    (chosen / "again").write_bytes(b"%d" % number)
            case 5 if not place.exists():
                place.mkdir()
            case 6 if files and not place.exists():
                os.link(rng.choice(files), place)
            case 7 if files and not place.is_dir():
                rng.choice(files).rename(place)
            case 8 if files:
                chosen = rng.choice(files)
                chosen.chmod(rng.choice((0o4755, 0o600, 0o644)))
                os.chown(chosen, rng.randrange(5), 7)
                os.setxattr(chosen, "user.number", b"%d" % number)
                os.utime(chosen, ns=(number, number * 10**9 + 1))


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 40))])
def test_a_layer_under_change_arrives_as_it_was_when_the_container_stopped(bench: Bench, seed: int) -> None:
    """P14: contents, whiteouts, opaque directories, links, attributes, whatever happened between which looks."""
    rng = random.Random(seed)
    bench.source.mount()
    misbehave(bench.source.merged, rng, 40)
    bench.union.create()
    bench.tracker.start()
    bench.tracker.arm(1)
    bench.tracker.copy_takes(everything=True)
    misbehave(bench.source.merged, rng, 6)
    bench.pull()
    for number in range(2, ROUNDS + 2):
        misbehave(bench.source.merged, rng, 12)
        seen = bench.tracker.arm(number)
        misbehave(bench.source.merged, rng, 4)  # between the look and the list
        entries = changed(bench.source.layer, seen, {})
        everything = rng.random() < 0.2  # another tree's tracker has lost something
        bench.tracker.copy_takes(everything=everything)
        misbehave(bench.source.merged, rng, 6)  # while the round is under way
        if everything:
            bench.pull()
            continue
        bench.union.prune(entries)
        bench.pull(listed_names(entries, layer=True))
    misbehave(bench.source.merged, rng, 8)
    bench.source.unmount()
    entries = changed(bench.source.layer, bench.tracker.drain(), {})
    manifest = bench.base / "manifest"
    write_manifest(manifest, entries)
    bench.cut_over(list(decode_manifest(manifest.read_bytes())))
    assert bench.differences() == []


def test_the_stop_lists_what_changed_since_the_last_round_and_not_all_that_lies_beside_it(bench: Bench) -> None:
    """What lies in busy directories is named in a round, while the container still runs."""
    bench.source.mount()
    place = bench.source.merged / "many"
    place.mkdir()
    for number in range(300):
        (place / f"n{number}").write_bytes(b"x")
    bench.union.create()
    bench.tracker.start()
    bench.tracker.arm(1)
    (place / "came").write_bytes(b"x")
    bench.pull()
    (place / "came").unlink()
    entries = changed(bench.source.layer, bench.tracker.arm(2), {})
    bench.tracker.copy_takes(everything=False)
    assert len([entry for entry in entries if entry.path.startswith(b"many/n")]) == 300
    bench.union.prune(entries)
    bench.pull(listed_names(entries, layer=True))
    (place / "n1").write_bytes(b"yy")
    (place / "n2").unlink()
    (place / "late").write_bytes(b"x")
    bench.source.unmount()
    entries = changed(bench.source.layer, bench.tracker.drain(), {})
    assert {entry.path for entry in entries} == {b"", b"many", b"many/n1", b"many/n2", b"many/late"}
    bench.cut_over(entries)
    assert bench.differences() == []


def test_what_is_not_known_to_be_clean_is_listed_completely_and_arrives_too(bench: Bench) -> None:
    bench.source.mount()
    misbehave(bench.source.merged, random.Random(99), 60)
    bench.source.unmount()
    bench.union.create()
    bench.pull()
    bench.cut_over(whole(bench.source.layer), everything=True)
    assert bench.differences() == []


def test_going_back_makes_the_source_s_layer_what_the_target_s_is(bench: Bench) -> None:
    """Deletions of what the image has, and of what the source had, included."""
    for overlay, seed in ((bench.source, 1), (bench.target, 2)):
        overlay.mount()
        misbehave(overlay.merged, random.Random(seed), 60)
        overlay.unmount()
    stage = bench.base / "back"
    stage.mkdir()
    entries = whole(bench.target.layer)
    subprocess.run(["rsync", "-aHAX", f"{bench.target.upper}/", f"{stage}/contents"], check=True)
    for _ in range(2):  # a crash in the middle is mended by doing it again
        apply(bench.source.upper, stage / "basis", entries, everything=True, spare=stage / "spare", layer=True)
        fold_placeholders(bench.source.upper, stage / "contents", stage, layer=True)
    assert bench.differences() == []


def test_a_write_through_a_mapping_that_moves_no_time_counts_as_a_change(bench: Bench) -> None:
    bench.source.mount()
    (bench.source.merged / "mapped").write_bytes(b"x" * mmap.PAGESIZE)
    bench.tracker.start()
    key = (1, 2)  # an overlay's device and inode number are not the layer's
    held = {key: OpenFile(ctime_ns=-1, mapped_writable_shared=True, place=b"/mapped")}
    for generation, files in ((1, {}), (2, held)):
        bench.tracker.arm(generation, files)
    bench.tracker._seen = {
        path: look._replace(ctime_ns=_ctime(bench, path)) for path, look in bench.tracker._seen.items()
    }
    assert b"mapped" in bench.tracker.drain().marks, "mapped when the generation began"
    assert b"mapped" in bench.tracker.drain(held).marks


def _ctime(bench: Bench, path: bytes) -> int:
    return os.lstat(os.fsencode(bench.source.upper) + b"/" + path).st_ctime_ns


def test_a_layer_in_use_is_neither_replaced_nor_taken_away(bench: Bench) -> None:
    bench.union.create()
    bench.target.mount()
    with pytest.raises(TransientError, match="still mounted"):
        require_unused(bench.target.upper)
    with pytest.raises(TransientError, match="still mounted"):
        bench.union.place_plain()
    bench.target.unmount()
    bench.union.place_plain()
    (bench.target.upper / "written").write_text("by the container")
    bench.target.mount()
    with pytest.raises(TransientError, match="still mounted"):
        bench.union.take_out()
    with bench.target.merged.joinpath("written").open(), pytest.raises(TransientError, match="still in use by pid"):
        unmount_left(bench.target.upper)
    unmount_left(bench.target.upper)  # as of a container whose start Docker has forgotten
    assert not mounts.is_mounted(bench.target.merged)
    unmount_left(bench.target.upper)


def test_what_a_container_wrote_goes_on_in_the_next_one(bench: Bench) -> None:
    """F7: a start that failed ends with another container."""
    bench.union.create()
    (bench.union.upper_tree / "arrived").write_text("x")
    bench.union.place_plain()
    (bench.target.upper / "written").write_text("by the first one")
    for _ in range(2):
        bench.union.take_out()
    assert bench.union.layer_root() == bench.union.upper_tree
    second = Overlay(bench.base / "second", bench.source.image)
    union = Union(bench.union.stage, second.upper, layer=True)
    union.place_plain()
    assert (second.upper / "written").read_text() == "by the first one"
    assert union.layer_root() == second.upper
    shutil.rmtree(second.upper)  # somebody removes that container
    assert union.layer_root() is None
    third = Overlay(bench.base / "third", bench.source.image)
    union = Union(bench.union.stage, third.upper, layer=True)
    union.create()
    with pytest.raises(PermanentError, match="by hand"):  # a container without its layer must not start
        union.place_plain()
    assert not os.listdir(third.upper)


def test_a_layer_that_got_the_inode_of_a_removed_one_is_not_taken_for_it(disk: tuple[Path, Path]) -> None:
    """F7: a file system gives the number of what is removed to what is made next."""
    place, _ = disk
    first = Overlay(place / "first", place / "image")
    union = Union(place / "stage", first.upper, layer=True)
    union.create()
    (union.upper_tree / "arrived").write_text("x")
    union.place_plain()
    assert union.layer_root() == first.upper
    number = first.upper.stat().st_ino
    shutil.rmtree(first.upper)
    made = []
    while not made or made[-1].stat().st_ino != number:
        made.append(place / f"{len(made)}")
        made[-1].mkdir()
        assert len(made) < 1000, "this file system does not do that"
    union = Union(union.stage, made[-1], layer=True)
    assert union.layer_root() is None
    with pytest.raises(PermanentError, match="by hand"):
        union.place_plain()
    assert not os.listdir(made[-1])


def test_marks_of_another_kernel_do_not_travel_and_contents_in_the_image_are_refused(bench: Bench) -> None:
    """P14."""
    for name in ("plain", "elsewhere"):
        (bench.source.upper / name).write_bytes(b"x")
    (bench.source.upper / "hides").mkdir()
    os.setxattr(bench.source.upper / "plain", ORIGIN, b"a handle")
    os.setxattr(bench.source.upper / "hides", OPAQUE, b"y")
    found = {entry.path: dict(entry.xattrs) for entry in whole(bench.source.layer)}
    assert found[b"plain"] == {}
    assert found[b"hides"] == {OPAQUE: b"y"}
    os.setxattr(bench.source.upper / "elsewhere", METACOPY, b"")
    with pytest.raises(PermanentError, match="elsewhere has its contents in the image"):
        whole(bench.source.layer)
    with pytest.raises(RefusedError, match="overlay"):
        apply(bench.target.upper, bench.base / "basis", [Entry(path=b"d", kind="d", xattrs=((OPAQUE, b"y"),))])
    data = Mount(kind="volume", name="v", destination="/v", tree=str(bench.source.upper))
    assert data.kind != ROOTFS
    assert ORIGIN in {name for entry in carried(data, walk(bench.source.upper)) for name, _ in entry.xattrs}
