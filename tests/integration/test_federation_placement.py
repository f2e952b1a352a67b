"""Applying a dirty manifest: exact, idempotent, and never outside of the tree."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from events.errors import PermanentError, RefusedError
from hostd.manifest import Entry, observe
from hostd.placement import METACOPY, OPAQUE, REDIRECT, Applied, apply, obstacles, prune, still_placeholder
from tests.support.trees import grow, grow_deep
from tests.support.unions import Changes, Snapshot, differences, dirty, snapshot

pytestmark = pytest.mark.root

CRASHED = 77


class Bench:
    """A source, a copy of it as the rounds would leave it, and where old versions go."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.source, self.upper = base / "source", base / "upper"
        self.basis, self.spare = base / "basis", base / "spare"

    def copied(self) -> Snapshot:
        """Make the copy; returns the source's description at that time."""
        subprocess.run(["cp", "-a", "--", str(self.source), str(self.upper)], check=True)
        return snapshot(self.source)

    def apply(self, entries: list[Entry], *, everything: bool = False) -> Applied:
        return apply(self.upper, self.basis, entries, everything=everything, spare=self.spare)

    def differences(self) -> list[str]:
        """With the overlay's marks and the contents of placeholders left out: those are tested elsewhere."""
        held = {entry.path for entry in self.placeholders()}
        plain = {
            path: msgspec.structs.replace(entry, digest=b"") if path in held else entry
            for path, entry in snapshot(self.source).items()
        }
        twin = self.base / "twin"
        subprocess.run(["cp", "-a", "--", str(self.upper), str(twin)], check=True)
        try:
            for path in [b"", *snapshot(twin)]:
                place = os.path.join(os.fsencode(twin), path)
                for name in os.listxattr(place, follow_symlinks=False):
                    if name.startswith("trusted.overlay."):
                        os.removexattr(place, name, follow_symlinks=False)
            return differences(plain, twin)
        finally:
            shutil.rmtree(os.fsencode(twin))

    def placeholders(self) -> list[Entry]:
        root = os.fsencode(self.upper)
        return [
            entry
            for path, entry in snapshot(self.upper).items()
            if "trusted.overlay.metacopy" in os.listxattr(os.path.join(root, path), follow_symlinks=False)
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    base = Path(tempfile.mkdtemp(prefix="cargo-p-", dir="/tmp"))
    try:
        yield Bench(base)
    finally:
        subprocess.run(["rm", "-rf", "--", str(base)], check=True)


def marks(file: Path) -> dict[str, bytes]:
    names = [name for name in os.listxattr(file) if name.startswith("trusted.overlay.")]
    return {name: os.getxattr(file, name) for name in names}


def test_a_stale_file_becomes_a_placeholder_with_everything_but_contents(bench: Bench) -> None:
    bench.source.mkdir()
    file = bench.source / "db"
    file.write_bytes(b"old")
    before = bench.copied()
    file.write_bytes(b"the new contents")
    file.chmod(0o4750)
    os.chown(file, 5, 6)
    os.chmod(file, 0o4750)
    os.setxattr(file, "user.a", b"b")
    subprocess.run(["setcap", "cap_net_raw+ep", file], check=True)
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    applied = bench.apply(dirty(before, snapshot(bench.source)))
    placed = bench.upper / "db"
    assert bench.differences() == []
    assert marks(placed) == {METACOPY.decode(): b"", REDIRECT.decode(): b"/db"}
    assert placed.stat().st_size == 16
    assert placed.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (bench.basis / "db").read_bytes() == b"old"
    assert [holder.path for holder in applied.placeholders] == [b"db"]
    assert applied.stale_bytes == 16


def test_contents_that_are_given_and_find_no_room_become_placeholders_which_need_none(bench: Bench) -> None:
    """D5: a disk that somebody else has filled costs no outage; the fill waits for room."""
    bench.source.mkdir()
    before = bench.copied()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(bench.base)], check=True)
    try:
        for place in (bench.source, bench.upper):
            place.mkdir()
        contents = {b"fits": b"a" * 100_000, b"is too large": b"b" * 3_000_000, b"comes after": b"c" * 100_000}
        entries = [
            Entry(path=path, kind="f", mode=0o600, size=len(data), stale=True)
            for path, data in sorted(contents.items())
        ]
        root = next(iter(before.values()))
        applied = apply(
            bench.upper, bench.basis, [root, *entries], spare=bench.spare, contents=lambda _wanted: contents
        )
        assert (applied.written, sorted(h.path for h in applied.placeholders)) == (2, [b"is too large"])
        for path, data in contents.items():
            placed = bench.upper / os.fsdecode(path)
            assert placed.stat().st_size == len(data)
            assert bool(marks(placed)) == (path == b"is too large")
            assert bool(marks(placed)) or placed.read_bytes() == data
    finally:
        subprocess.run(["umount", str(bench.base)], check=True)


@pytest.mark.parametrize("seed", range(20))
def test_applied_once_or_twice_the_tree_is_exact(bench: Bench, seed: int) -> None:
    """P7: repetition is harmless; a placeholder never ends up among the old versions."""
    grow(bench.source, seed, entries=20, depth=5)
    before = bench.copied()
    Changes(seed, bench.source).make(30)
    entries = dirty(before, snapshot(bench.source))
    once = bench.apply(entries)
    assert bench.differences() == []
    twice = bench.apply(entries)
    assert bench.differences() == []
    assert {h.path for h in once.placeholders} == {h.path for h in twice.placeholders}
    for directory, _, files in os.walk(os.fsencode(bench.basis)):
        for name in files:
            assert b"trusted.overlay.metacopy" not in map(os.fsencode, os.listxattr(os.path.join(directory, name)))
    assert os.listdir(bench.spare) == []


@pytest.mark.parametrize("seed", range(8))
def test_killed_anywhere_in_the_middle_it_is_mended_by_applying_again(bench: Bench, seed: int) -> None:
    """A4, D24, P7: the process ends at a random system call that changes something."""
    grow(bench.source, seed, entries=10, depth=3)
    before = bench.copied()
    Changes(seed, bench.source).make(25)
    entries = dirty(before, snapshot(bench.source))
    pristine = bench.base / "pristine"
    subprocess.run(["cp", "-a", "--", str(bench.upper), str(pristine)], check=True)
    chance = random.Random(seed)
    last = 300
    for _ in range(6):
        shutil.rmtree(os.fsencode(bench.upper))
        subprocess.run(["cp", "-a", "--", str(pristine), str(bench.upper)], check=True)
        if not crashes_after(chance.randrange(last), lambda: bench.apply(entries)):
            last //= 2
        applied = bench.apply(entries)
        assert bench.differences() == []
        assert sorted(h.path for h in applied.placeholders) == sorted(_first_names(bench.placeholders()))


def _first_names(entries: list[Entry]) -> list[bytes]:
    first: dict[object, bytes] = {}
    for entry in entries:
        first.setdefault(entry.link_group or entry.path, entry.path)
    return list(first.values())


def crashes_after(calls: int, work: Callable[[], object]) -> bool:
    """Run in a child that dies without any clean-up before its n-th change; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = calls

        def fatal(name: str) -> None:
            real = getattr(os, name)

            def call(*positional: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*positional, **named)

            setattr(os, name, call)

        for name in ("rename", "link", "unlink", "mkdir", "rmdir", "symlink", "mknod", "setxattr", "chown", "utime"):
            fatal(name)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_names_of_one_stale_file_stay_one_file(bench: Bench) -> None:
    """D15: one placeholder under all names; a name that left the group keeps what it had."""
    bench.source.mkdir()
    (bench.source / "a").write_bytes(b"shared")
    for name in ("b", "c", "leaves"):
        os.link(bench.source / "a", bench.source / name)
    before = bench.copied()
    (bench.source / "leaves").unlink()
    (bench.source / "leaves").write_bytes(b"shared")
    (bench.source / "b").write_bytes(b"changed through one name")
    bench.apply(dirty(before, snapshot(bench.source)))
    assert bench.differences() == []
    inodes = {(bench.upper / name).stat().st_ino for name in ("a", "b", "c")}
    assert len(inodes) == 1
    assert marks(bench.upper / "c")[REDIRECT.decode()] == b"/a"
    assert (bench.upper / "leaves").stat().st_ino not in inodes


def test_of_several_names_the_contents_come_under_the_one_that_is_stale(bench: Bench) -> None:
    """D15: going back, a directory that was renamed is new here, and the file's other name in another one is not."""
    for name in ("a", "c"):
        (bench.source / name).mkdir(parents=True)
    (bench.source / "a" / "one").write_bytes(b"one file")
    (bench.source / "c" / "two").hardlink_to(bench.source / "a" / "one")
    bench.copied()
    (bench.upper / "c").rename(bench.upper / "b")
    entries = [
        msgspec.structs.replace(entry, stale=path == b"c/two", digest=b"")
        for path, entry in snapshot(bench.source).items()
    ]
    applied = bench.apply(entries, everything=True)
    assert [holder.path for holder in applied.placeholders] == [b"c/two"]
    assert bench.differences() == []


def test_changing_one_of_two_files_that_were_one_does_not_change_the_other(bench: Bench) -> None:
    """The copy still ties names together that the source has parted without changing contents."""
    bench.source.mkdir()
    (bench.source / "a").write_bytes(b"same")
    os.link(bench.source / "a", bench.source / "b")
    bench.copied()
    (bench.source / "b").unlink()
    (bench.source / "b").write_bytes(b"same")
    (bench.source / "b").chmod(0o600)
    (bench.source / "a").chmod(0o644)
    entries = [observe(bench.source, path) for path in (b"", b"a", b"b")]
    bench.apply(entries)
    assert bench.differences() == []


def test_a_directory_that_was_replaced_loses_what_the_manifest_does_not_list(bench: Bench) -> None:
    """A directory that is listed as stale is listed in full."""
    for path in ("d/keep", "d/sub/gone", "other/stays"):
        file = bench.source / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)
    bench.copied()
    shutil.rmtree(bench.source / "d" / "sub")
    entries = [
        observe(bench.source, b""),
        msgspec.structs.replace(observe(bench.source, b"d"), stale=True),
        observe(bench.source, b"d/keep"),
    ]
    pruned = bench.base / "pruned"
    subprocess.run(["cp", "-a", "--", str(bench.upper), str(pruned)], check=True)
    assert prune(pruned, bench.spare, entries) == 1
    assert not (pruned / "d" / "sub").exists()
    assert (pruned / "other" / "stays").exists()
    bench.apply(entries)
    assert bench.differences() == []


def test_when_everything_is_listed_whatever_is_not_goes(bench: Bench) -> None:
    grow(bench.source, 5, entries=10, depth=3)
    bench.copied()
    Changes(5, bench.source).make(40)
    entries = [
        msgspec.structs.replace(entry, stale=entry.kind == "f" and entry.size > 0, digest=b"")
        for entry in snapshot(bench.source).values()
    ]
    bench.apply(entries, everything=True)
    assert bench.differences() == []


def test_a_symlink_in_the_copy_never_leads_out_of_the_tree(bench: Bench) -> None:
    """P15: what is said to lie below a symlink is refused, and nothing outside is touched."""
    outside = bench.base / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    bench.source.mkdir()
    bench.upper.mkdir()
    (bench.upper / "trap").symlink_to(outside)
    root = observe(bench.source, b"")
    for entry in (
        Entry(path=b"trap/file", kind="-"),
        Entry(path=b"trap/file", kind="f", mode=0o777, size=3, stale=True),
        Entry(path=b"trap/new", kind="d", mode=0o777),
        Entry(path=b"trap/link", kind="l", mode=0o777, link_target=b"x"),
    ):
        with contextlib.suppress(PermanentError):
            bench.apply([root, entry])
        assert [path.name for path in outside.iterdir()] == ["file"]
        assert (outside / "file").read_text() == "precious"
        assert stat.S_IMODE((outside / "file").stat().st_mode) != 0o777


@pytest.mark.parametrize("path", [b"../x", b"a/../../x", b"/etc/x", b"a//b", b".", b"a\0b"])
def test_a_path_that_leads_out_of_the_tree_is_refused(bench: Bench, path: bytes) -> None:
    """P15: whoever wrote the manifest."""
    bench.upper.mkdir()
    with pytest.raises(PermanentError, match="out of the tree"):
        bench.apply([Entry(path=path, kind="f", size=1, stale=True)])
    assert os.listdir(bench.upper) == []


def test_the_whole_tree_is_never_said_to_be_gone(bench: Bench) -> None:
    """D22."""
    bench.upper.mkdir()
    (bench.upper / "data").write_text("data")
    with pytest.raises(PermanentError, match="whole tree"):
        bench.apply([Entry(path=b"", kind="-")])
    assert (bench.upper / "data").exists()


def test_what_a_union_cannot_show_is_refused_before_anything_changes(bench: Bench) -> None:
    """P14: overlay marks, the device 0:0, and paths too long for an attribute."""
    bench.upper.mkdir()
    (bench.upper / "stays").write_text("x")
    bad = [
        Entry(path=b"marked", kind="f", xattrs=((b"trusted.overlay.opaque", b"y"),)),
        Entry(path=b"whiteout", kind="c", rdev=0),
        Entry(path=b"/".join([b"d" * 200] * 12), kind="f", size=1, stale=True),
    ]
    with pytest.raises(RefusedError) as refused:
        bench.apply([*bad, Entry(path=b"stays", kind="-")])
    assert len(refused.value.reasons) == 3
    assert (bench.upper / "stays").exists()
    assert obstacles([Entry(path=b"fine", kind="f", size=1)]) == []


def test_what_lies_deeper_than_any_path_can_name_is_removed_with_its_top(bench: Bench) -> None:
    """D13."""
    bench.source.mkdir()
    bench.upper.mkdir()
    grow_deep(bench.upper / "deep", 1500)
    bench.apply([observe(bench.source, b""), Entry(path=b"deep", kind="-")])
    assert bench.differences() == []


def test_a_single_file_takes_metadata_only(bench: Bench) -> None:
    bench.source.write_text("contents")
    bench.upper.write_text("contents")
    bench.source.chmod(0o600)
    os.utime(bench.source, ns=(1, 2))
    bench.apply([observe(bench.source, b"")])
    assert differences(bench.source, bench.upper) == []
    bench.source.write_text("longer contents")
    with pytest.raises(PermanentError, match="pulled again"):
        bench.apply([observe(bench.source, b"")])


def test_a_placeholder_is_found_again_wherever_it_went_until_it_is_none(bench: Bench) -> None:
    bench.source.mkdir()
    (bench.source / "f").write_text("contents")
    bench.upper.mkdir()
    entries = [observe(bench.source, b""), msgspec.structs.replace(observe(bench.source, b"f"), stale=True)]
    [holder] = bench.apply(entries).placeholders
    mount = os.open(bench.base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert holder.handle
        (bench.upper / "f").rename(bench.upper / "elsewhere")
        assert still_placeholder(mount, holder)
        os.removexattr(bench.upper / "elsewhere", METACOPY)
        assert not still_placeholder(mount, holder)
        os.setxattr(bench.upper / "elsewhere", METACOPY, b"")
        (bench.upper / "elsewhere").unlink()
        assert not still_placeholder(mount, holder)
    finally:
        os.close(mount)


def test_the_mark_that_keeps_directories_local_survives(bench: Bench) -> None:
    bench.source.mkdir()
    bench.upper.mkdir()
    os.setxattr(bench.upper, OPAQUE, b"y")
    bench.apply([observe(bench.source, b"")])
    assert os.getxattr(bench.upper, OPAQUE) == b"y"


def test_a_removal_stops_at_a_mount_point(bench: Bench) -> None:
    """Data behind a mount is never deleted, also when it is a bind of the very same file system."""
    bench.source.mkdir()
    (bench.upper / "d" / "inner" / "mnt").mkdir(parents=True)
    outside = bench.base / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    subprocess.run(["mount", "--bind", str(outside), str(bench.upper / "d" / "inner" / "mnt")], check=True)
    try:
        with pytest.raises(PermanentError):
            bench.apply([observe(bench.source, b""), Entry(path=b"d", kind="-")])
        assert (outside / "precious").read_text() == "x"
    finally:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(bench.base) in line:
                subprocess.run(["umount", line.split()[4]], check=True)
    assert (outside / "precious").read_text() == "x"
