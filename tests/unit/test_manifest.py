"""Manifests: looking at odd trees, storing what was seen, refusing damage, telling trees apart."""

import hashlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.errors import PermanentError
from hostd import tree_walk
from hostd.beneath import certainly_bare
from hostd.entry import BLAKE3_FRAME, plain
from hostd.manifest import (
    MAX_RECORD_BYTES,
    Difference,
    Entry,
    compare,
    decode_manifest,
    escape,
    observe,
    observe_all,
    order_key,
    read_manifest,
    tree_digest,
    unsupported,
    usage,
    walk,
    write_manifest,
)
from tests.support.trees import LONG_AGO_NS, ODD_NAMES, Grown, felled, grow, grow_deep

# --- made-up entries ---------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=255).filter(lambda n: not set(n) & {0, 0x2F} and n not in (b".", b".."))
paths = st.one_of(
    st.just(b""), st.lists(st.one_of(names, st.sampled_from(ODD_NAMES)), min_size=1, max_size=5).map(b"/".join)
)
ids = st.integers(0, 2**32 - 1)
xattrs = st.lists(
    st.tuples(names.map(lambda n: b"user." + n[:250].replace(b"\0", b"")), st.binary(max_size=300)), max_size=3
).map(lambda pairs: tuple(sorted(dict(pairs).items())))


@st.composite
def made_up_entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from("dflcbps-"))
    return Entry(
        path=draw(paths),
        kind=kind,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(ids),
        gid=draw(ids),
        size=draw(st.integers(0, 2**63 - 1)),
        mtime_ns=draw(st.integers(-(2**63), 2**63 - 1)),
        rdev=draw(st.integers(0, 2**64 - 1)),
        link_target=draw(names) if kind == "l" else b"",
        xattrs=draw(xattrs),
        link_group=draw(st.integers(0, 2**64 - 1)),
        stale=draw(st.booleans()),
        blocks=draw(st.integers(0, 2**60)),
        digest=draw(st.sampled_from((b"", b"\xff" * 32))),
    )


def file(path: bytes, **changes: object) -> Entry:
    return msgspec.structs.replace(Entry(path=path, kind="f", mode=0o644, size=3, mtime_ns=10), **changes)


def stored(folder: Path, entries: list[Entry]) -> bytes:
    target = folder / "stored"
    write_manifest(target, entries)
    return target.read_bytes()


def record(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "big") + raw


def sealed(*entries: object) -> bytes:
    """A manifest whose frame is right, whatever its records hold: what a hostile host would send."""
    body = record(msgspec.msgpack.encode(("cargo-manifest", 1)))
    body += b"".join(record(msgspec.msgpack.encode(entry)) for entry in entries)
    digest = hashlib.blake2b(body, digest_size=32).digest()
    return body + record(b"") + record(msgspec.msgpack.encode((len(entries), digest)))


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[Grown]:
    with felled(tmp_path / "tree") as tree:
        yield grow(tree, seed=1)


# --- storing and reading -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(made_up_entries(), max_size=8))
def test_any_entries_come_back_as_they_were(tmp_path: Path, entries: list[Entry]) -> None:
    """D19: paths are bytes from end to end."""
    raw = stored(tmp_path, entries)
    assert list(read_manifest(tmp_path / "stored")) == entries
    assert list(decode_manifest(raw)) == entries


def test_the_reference_describes_the_file_exactly(tmp_path: Path) -> None:
    reference = write_manifest(tmp_path / "m", [file(b"a")])
    raw = (tmp_path / "m").read_bytes()
    assert reference.path == str(tmp_path / "m")
    assert (reference.size_bytes, reference.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o600


def test_a_manifest_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    def breaking() -> Iterator[Entry]:
        yield file(b"new")
        raise PermanentError("the tree broke off")

    write_manifest(tmp_path / "m", [file(b"old")])
    with pytest.raises(PermanentError, match="broke off"):
        write_manifest(tmp_path / "m", breaking())
    assert [entry.path for entry in read_manifest(tmp_path / "m")] == [b"old"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="absent/m cannot be written: No such file"):
        write_manifest(tmp_path / "absent" / "m", [])
    with pytest.raises(PermanentError, match="absent cannot be read: No such file"):
        list(read_manifest(tmp_path / "absent"))


HOSTILE_PATHS = (
    b"/etc/passwd", b"..", b"../x", b"a/../b", b"a/..", b".", b"./a", b"a/./b", b"a/.", b"a//b", b"a/", b"/",
    b"a\0b", b"n" * 256, b"a/" + b"n" * 256 + b"/b",
)  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_path_that_leads_out_of_the_tree_is_never_believed(tmp_path: Path, path: bytes) -> None:
    """P15: values from other hosts are untrusted."""
    with pytest.raises(PermanentError, match="its path"):
        list(decode_manifest(sealed(file(path))))
    with pytest.raises(PermanentError, match="its path"):
        write_manifest(tmp_path / "m", [file(path)])
    with pytest.raises(PermanentError, match="its path"):
        observe(tmp_path, path)
    with pytest.raises(PermanentError, match="its path"):
        list(walk(tmp_path, start=path))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "x"}, {"kind": ""}, {"kind": "df"}, {"kind": "f\n"}, {"mode": -1}, {"mode": 0o10000},
        {"uid": -1}, {"uid": 2**32}, {"gid": -1}, {"size": -1}, {"size": 2**63}, {"mtime_ns": 2**63},
        {"rdev": -1}, {"blocks": -1}, {"link_group": -1}, {"digest": b"short"}, {"link_target": b"of a file"},
        {"kind": "l", "link_target": b""}, {"kind": "l", "link_target": b"a\0"},
        {"kind": "l", "link_target": b"t" * 4096}, {"xattrs": ((b"", b""),)}, {"xattrs": ((b"user.\0", b""),)},
        {"xattrs": ((b"u" * 256, b""),)}, {"xattrs": ((b"trusted.overlay.redirect", b"/../../etc"),)},
    ],
    ids=repr,
)  # fmt: skip
def test_a_record_that_no_honest_host_writes_is_refused(changes: dict[str, object]) -> None:
    assert len(list(decode_manifest(sealed(file(b"a"))))) == 1
    with pytest.raises(PermanentError, match="is damaged or was not made by Cargo"):
        list(decode_manifest(sealed(file(b"a", **changes))))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff",
        record(b""),
        record(msgspec.msgpack.encode(("cargo-manifest", 2))),
        record(msgspec.msgpack.encode(("something else", 1))),
        sealed(file(b"a"))[:-1],
        sealed(file(b"a")) + b"x",
        sealed(("a path that is text", "f")),
        sealed((b"a", "f", "not a mode")),
        sealed((b"a", "f", *[0] * 20)),
        sealed({"path": b"a"}),
        record(b"\x91" * 100_000),
    ],
    ids=range(13),
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(PermanentError, match="is damaged or was not made by Cargo"):
        list(decode_manifest(raw))


def test_a_record_without_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=f"over the limit of {MAX_RECORD_BYTES}"):
        list(decode_manifest((MAX_RECORD_BYTES + 1).to_bytes(4, "big")))
    long = file(b"a", xattrs=tuple((b"user.%d" % n, bytes(60_000)) for n in range(20)))
    with pytest.raises(PermanentError, match=f"over the limit of {MAX_RECORD_BYTES}"):
        write_manifest(tmp_path / "m", [long])


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """A manifest cut between two records would otherwise look like a smaller tree."""
    raw = stored(tmp_path, [file(b"a"), file(b"b"), file(b"c")])
    for length in range(len(raw)):
        with pytest.raises(PermanentError):
            list(decode_manifest(raw[:length]))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """D23: what was damaged on a disk or a wire is never obeyed."""
    raw = stored(tmp_path, [file(b"a", xattrs=((b"user.x", b"y"),)), file(b"b/c", digest=b"d" * 32)])
    for position in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(PermanentError):
            list(decode_manifest(bytes(damaged)))


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=300), framed=st.booleans())
def test_no_bytes_at_all_make_the_reader_crash(raw: bytes, framed: bool) -> None:
    header = record(msgspec.msgpack.encode(("cargo-manifest", 1)))
    with pytest.raises(PermanentError):
        list(decode_manifest(header + record(raw) if framed else raw))


# --- looking at trees --------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("seed", range(4))
def test_a_walk_lists_everything_once_parents_first_in_sorted_order(tmp_path: Path, seed: int) -> None:
    """D13 D19: long and odd names, deep trees."""
    with felled(tmp_path / "tree") as tree:
        grown = grow(tree, seed)
        for digest in (False, True):
            found = [entry.path for entry in walk(tree, digest=digest)]
            by_components = sorted(grown.paths, key=lambda path: path.split(b"/") if path else [])
            assert found == by_components == sorted(grown.paths, key=order_key)


@given(left=paths, right=paths)
def test_the_order_is_that_of_the_components(left: bytes, right: bytes) -> None:
    def components(path: bytes) -> list[bytes]:
        return path.split(b"/") if path else []

    assert (order_key(left) < order_key(right)) == (components(left) < components(right))


@pytest.mark.root
def test_an_entry_tells_all_that_lstat_and_the_xattrs_tell(grown: Grown) -> None:
    """D15 D16 D17 D18: hard links, sparse files, attributes, devices and pipes are all in the description."""
    entries = {entry.path: entry for entry in walk(grown.tree, digest=True)}
    for path, entry in entries.items():
        place, status = grown.place(path), os.lstat(grown.place(path))
        assert (entry.mode, entry.uid, entry.gid) == (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        assert entry.mtime_ns == status.st_mtime_ns
        carried = {os.fsencode(n): os.getxattr(place, n, follow_symlinks=False)
                   for n in os.listxattr(place, follow_symlinks=False)}  # fmt: skip
        assert dict(entry.xattrs) == carried
        assert bool(entry.link_group) == (status.st_nlink > 1 and entry.kind != "d")
        if entry.kind == "f":
            contents = Path(os.fsdecode(place)).read_bytes()
            assert (entry.size, entry.blocks) == (len(contents), status.st_blocks)
            assert entry.digest == BLAKE3_FRAME + blake3(contents).digest()
        elif entry.kind == "l":
            assert entry.link_target == os.readlink(place)
        elif entry.kind in "cb":
            assert entry.rdev == status.st_rdev != 0
        assert observe(grown.tree, path) == msgspec.structs.replace(entry, digest=b"")
    assert {entry.kind for entry in entries.values()} == set("dflcbps")
    assert LONG_AGO_NS in {entry.mtime_ns for entry in entries.values()}
    groups = {entries[path].link_group for path in grown.odd["hard link"][:3]}
    assert len(groups) == 1
    assert 0 not in groups
    for path in grown.odd["acl"]:
        assert b"system.posix_acl_access" in dict(entries[path].xattrs)
    for path in grown.odd["capability"]:
        assert b"security.capability" in dict(entries[path].xattrs)
    assert all(entries[path].blocks * 512 < entries[path].size for path in grown.odd["sparse"])


@pytest.mark.root
def test_a_kernel_that_does_not_tell_at_once_whether_there_are_attributes_shows_the_same(
    grown: Grown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D17: Linux before 6.13."""
    quick = list(walk(grown.tree))
    monkeypatch.setattr(tree_walk, "certainly_bare", lambda *_: False)
    assert list(walk(grown.tree)) == quick
    assert any(entry.xattrs for entry in quick) and not all(entry.xattrs for entry in quick)


def test_plain_is_what_a_simple_copy_has_all_of() -> None:
    """D15 D16 D17."""
    file = Entry(path=b"a", kind="f", size=5000, blocks=16)
    assert plain(file) and plain(Entry(path=b"d", kind="d", blocks=0)) and plain(Entry(path=b"e", kind="f"))
    for odd in ({"blocks": 8}, {"link_group": 7}, {"xattrs": ((b"user.mark", b"x"),)}):
        assert not plain(msgspec.structs.replace(file, **odd))  # type: ignore[arg-type]


def test_a_name_is_called_bare_only_if_it_is(tmp_path: Path) -> None:
    """D17: where the kernel does not know the question, nothing is."""
    for name in ("bare", "marked"):
        (tmp_path / name).touch()
    os.setxattr(tmp_path / "marked", "user.mark", b"x")
    (tmp_path / "link").symlink_to("marked")
    at = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = {name: certainly_bare(at, name) for name in (b"bare", b"marked", b"link", b"absent")}
    finally:
        os.close(at)
    assert not found[b"marked"] and not found[b"absent"]
    assert found[b"link"] == found[b"bare"], "the link itself is asked, not what it leads to"


@pytest.mark.root
def test_looking_leaves_access_times_as_they_were(grown: Grown) -> None:
    """P3: the source is untouched."""
    place = grown.place(b"files/large")
    os.utime(place, ns=(1, 10**18))
    list(walk(grown.tree, digest=True))
    assert os.stat(place).st_atime_ns == 1


@pytest.mark.parametrize("digest", [False, True])
def test_a_tree_may_be_a_single_file(tmp_path: Path, digest: bool) -> None:
    (tmp_path / "file").write_bytes(b"contents")
    (entry,) = walk(tmp_path / "file", digest=digest)
    assert (entry.path, entry.kind, entry.size) == (b"", "f", 8)
    assert entry.digest == (BLAKE3_FRAME + blake3(b"contents").digest() if digest else b"")
    assert observe(tmp_path / "file", b"") == msgspec.structs.replace(entry, digest=b"")
    assert usage(tmp_path / "file") == (8, 1, 1)
    with pytest.raises(FileNotFoundError):
        observe(tmp_path / "file", b"below")


@pytest.mark.parametrize("look", [lambda t: list(walk(t)), lambda t: list(walk(t, digest=True)), usage,
                                  lambda t: observe(t, b""), lambda t: observe(t, b"a")])  # fmt: skip
def test_a_missing_tree_is_never_an_empty_one(tmp_path: Path, look: Callable[[Path], object]) -> None:
    """D22: the whole source mount is missing."""
    with pytest.raises(PermanentError, match="cannot be opened: No such file"):
        look(tmp_path / "absent")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermanentError, match="is a symbolic link"):
        look(tmp_path / "link")


def test_no_symlink_is_followed_on_the_way(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "secret").write_text("outside")
    (tree / "way out").symlink_to("..")
    assert observe(tree, b"way out").kind == "l"
    with pytest.raises(FileNotFoundError):
        observe(tree, b"way out/secret")
    assert [entry.path for entry in walk(tree)] == [b"", b"way out"]
    assert list(walk(tree, start=b"way out/secret")) == []


def test_what_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    asked = [b"", b"absent", b"absent/below", b"d", b"d/absent", b"d/file", b"d/file/below"]
    found = {entry.path: entry.kind for entry in observe_all(tmp_path, asked)}
    assert found == {
        b"": "d", b"absent": "-", b"absent/below": "-", b"d": "d", b"d/absent": "-", b"d/file": "f",
        b"d/file/below": "-",
    }  # fmt: skip
    with pytest.raises(FileNotFoundError):
        observe(tmp_path, b"d/absent")


def test_a_walk_may_start_inside(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b.c").touch()
    assert [entry.path for entry in walk(tmp_path, start=b"a/b")] == [b"a/b", b"a/b/c"]
    assert [entry.path for entry in walk(tmp_path, start=b"a/b.c", digest=True)] == [b"a/b.c"]
    assert list(walk(tmp_path, start=b"absent/at all")) == []


@pytest.mark.parametrize("digest", [False, True])
def test_what_vanishes_or_changes_its_kind_during_a_walk_does_no_harm(tmp_path: Path, digest: bool) -> None:
    """D11: the container keeps running while its data is looked at."""
    for name in "abcdef":
        (tmp_path / name).mkdir()
        for number in range(300):
            (tmp_path / name / f"{number:03}").touch()
    seen = []
    for entry in walk(tmp_path, digest=digest):
        seen.append(entry.path)
        if entry.path == b"a":
            subprocess.run(["rm", "-rf", "--", tmp_path / "e", tmp_path / "f"], check=True)
            (tmp_path / "f").symlink_to("a")
    assert seen == sorted(seen, key=order_key)
    assert len([path for path in seen if path and path[:1] in b"abcd"]) == 4 * 301
    if not digest:  # with digests the scan is some batches ahead, and may have been everywhere by then
        assert seen[-1] == b"f"
        assert b"e" not in seen


@pytest.mark.parametrize("digest", [False, True])
def test_a_tree_deeper_than_any_path_may_be_long_is_walked_with_few_descriptors(tmp_path: Path, digest: bool) -> None:
    """D13: deep trees, long paths."""
    with felled(tmp_path / "tree") as tree:
        bottom = grow_deep(tree, depth=300)
        assert len(bottom) > 4 * 4096
        open_before = len(os.listdir("/proc/self/fd"))
        most, last = 0, b""
        for entry in walk(tree, digest=digest):
            most, last = max(most, len(os.listdir("/proc/self/fd"))), entry.path
        assert last == bottom
        assert most - open_before < 100
        assert len(os.listdir("/proc/self/fd")) == open_before
        assert observe(tree, bottom).kind == "f"
        assert usage(tree) == (0, 1, 302)


def test_a_walk_that_is_given_up_leaves_no_descriptor_open(tmp_path: Path) -> None:
    for number in range(9):  # large enough that some still wait for a thread when the walk is given up
        with open(tmp_path / str(number), "wb") as stream:
            stream.truncate(64 * 1024 * 1024)
    open_before = len(os.listdir("/proc/self/fd"))
    for digest in (False, True):
        entries = iter(walk(tmp_path, digest=digest))
        next(entries)
        next(entries)
        entries.close()  # type: ignore[attr-defined]
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_deep_tree_that_is_moved_away_during_a_walk_ends_it(tmp_path: Path) -> None:
    """D11: on the way back up, directories that had been closed are not there to be opened again."""
    deepest = tmp_path / "top"
    for _ in range(150):
        deepest = deepest / "d"
    deepest.mkdir(parents=True)
    for folder in [deepest, *list(deepest.parents)[:150]]:
        (folder / "z").touch()
    (tmp_path / "zz").touch()
    seen = []
    for entry in walk(tmp_path):
        seen.append(entry.path)
        if entry.path.endswith(b"d/z") and (tmp_path / "top").exists():
            (tmp_path / "top").rename(tmp_path / "elsewhere")
    assert seen[-1] == b"zz"
    assert seen == sorted(seen, key=order_key)


@pytest.mark.root
@pytest.mark.parametrize("mount", [["-t", "tmpfs", "none"], ["--bind", "{tree}/a"]], ids=["tmpfs", "bind"])
def test_a_mount_point_is_listed_but_not_entered(tmp_path: Path, mount: list[str]) -> None:
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "point").mkdir()
    (tree / "z").touch()
    subprocess.run(["mount", *[word.format(tree=tree) for word in mount], str(tree / "point")], check=True)
    try:
        (tree / "point" / "behind").touch()
        listed = [entry.path for entry in walk(tree)]
        assert [path for path in listed if path.startswith(b"point")] == [b"point"]
        assert listed[-1] == b"z"
        with pytest.raises(FileNotFoundError):
            observe(tree, b"point/behind")
        assert b"behind" in {entry.path for entry in walk(tree / "point")}
    finally:
        subprocess.run(["umount", str(tree / "point")], check=True)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: permission errors are found early, and say where."""
    (tmp_path / "a\n").touch()

    def refuse(*_: object, **__: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listxattr", refuse)
    monkeypatch.setattr(tree_walk, "certainly_bare", lambda *_: False)
    for look in (
        lambda: list(walk(tmp_path, start=b"a\n")),
        lambda: list(walk(tmp_path, start=b"a\n", digest=True)),
        lambda: observe(tmp_path, b"a\n"),
    ):
        with pytest.raises(PermanentError, match=r"a\\x0a in .* cannot be examined: Permission denied"):
            look()


def test_usage_counts_several_names_of_a_file_once(tmp_path: Path) -> None:
    """D15 D16: space is told by apparent size, because a copy may lose the holes."""
    (tmp_path / "d").mkdir()
    with open(tmp_path / "sparse", "wb") as stream:
        stream.truncate(1_000_000)
    (tmp_path / "a").write_bytes(b"12345")
    os.link(tmp_path / "a", tmp_path / "d" / "b")
    (tmp_path / "l").symlink_to("a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    assert usage(tmp_path) == (1_000_005, 2, 6)


def test_many_small_files_are_all_found_and_digested(tmp_path: Path) -> None:
    """D13: very many files. Their number costs time, not memory or descriptors."""
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            os.close(os.open(tmp_path / str(folder) / str(number), os.O_CREAT | os.O_WRONLY, 0o600))
    assert sum(1 for _ in walk(tmp_path)) == 20_021
    assert sum(bool(entry.digest) for entry in walk(tmp_path, digest=True, workers=3)) == 20_000


# --- telling trees apart -----------------------------------------------------------------------


@pytest.mark.root
def test_equal_trees_have_no_difference_and_one_digest(tmp_path: Path) -> None:
    """P4: the manifest is the same on both sides, whatever the inode numbers and the allocation are."""
    with felled(tmp_path / "one") as one, felled(tmp_path / "other") as other:
        grow(one, seed=5)
        grown = grow(other, seed=5)
        path = grown.odd["sparse"][0]
        status = os.stat(grown.place(path))
        with open(grown.place(path), "r+b") as stream:
            stream.write(bytes(status.st_size))
        os.utime(grown.place(path), ns=(0, status.st_mtime_ns))
        expected, actual = list(walk(one, digest=True)), list(walk(other, digest=True))
        assert expected != actual
        assert list(compare(expected, actual)) == []
        assert tree_digest(expected) == tree_digest(actual)


def spoil_contents(place: bytes) -> None:
    status = os.stat(place)
    with open(place, "r+b") as stream:
        stream.write(b"\xa5")
    os.utime(place, ns=(0, status.st_mtime_ns))


def put_time_back(of: bytes, change: Callable[[], None]) -> None:
    """Do ``change`` without its showing in the time of the directory ``of``."""
    status = os.lstat(of)
    change()
    os.utime(of, ns=(0, status.st_mtime_ns))


PLANTED: dict[str, tuple[bytes, Callable[[bytes], None]]] = {
    "contents": (b"files/large", spoil_contents),
    "size": (b"files/hole only", lambda place: put_time_back(place, lambda: os.truncate(place, 3_000_001))),
    "mode": (b"names/colon:comma,equals=", lambda place: os.chmod(place, 0o421)),
    "uid": (b"kinds/link1", lambda place: os.lchown(place, 4242, -1)),
    "gid": (b"kinds/pipe", lambda place: os.lchown(place, -1, 4242)),
    "mtime": (b"deep0/deep1/deep2", lambda place: os.utime(place, ns=(0, os.lstat(place).st_mtime_ns + 1))),
    "xattrs": (b"names/\n", lambda place: os.setxattr(place, b"user.new", b"")),
    "missing": (b"names/-rf", lambda place: put_time_back(os.path.dirname(place), lambda: os.unlink(place))),
    "unexpected": (b"names/zzz", lambda place: put_time_back(os.path.dirname(place), lambda: os.mkdir(place))),
}


@pytest.mark.root
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_found_and_named(tmp_path: Path, what: str) -> None:
    """P4 P19: each thing that could be lost on the way is looked at."""
    path, plant = PLANTED[what]
    with felled(tmp_path / "tree") as tree:
        grown = grow(tree, seed=3)
        before = list(walk(tree, digest=True))
        plant(grown.place(path))
        after = list(walk(tree, digest=True))
        found = list(compare(before, after))
        assert (path, what) in {(difference.path, difference.what) for difference in found}
        # A hard-linked file shows the change under all its names; nothing else may show any.
        inodes = {os.lstat(grown.place(d.path)).st_ino for d in found if d.what != "missing"}
        assert len(inodes) <= 1
        assert all(escape(d.path) in d.words for d in found)
        assert tree_digest(before) != tree_digest(after)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("kind", {"kind": "p"}),
        ("mode", {"mode": 0o4644}),
        ("uid", {"uid": 7}),
        ("gid", {"gid": 7}),
        ("size", {"size": 4}),
        ("mtime", {"mtime_ns": 11}),
        ("xattrs", {"xattrs": ((b"user.a", b"2"),)}),
        ("contents", {"digest": b"2" * 32}),
    ],
)
def test_each_attribute_is_compared(what: str, changes: dict[str, object]) -> None:
    left = file(b"a/\xff", digest=b"1" * 32)
    right = file(b"a/\xff", **{"digest": b"1" * 32, **changes})
    (difference,) = compare([left], [right])
    assert difference == Difference(b"a/\xff", what, left, right)
    assert "a/\\xff" in difference.words
    assert tree_digest([left]) != tree_digest([right])


def test_link_targets_and_device_numbers_are_compared() -> None:
    links = [Entry(path=b"l", kind="l", link_target=target) for target in (b"x", b"\n")]
    (difference,) = compare(links[:1], links[1:])
    assert difference.words == "the link target of l is \\x0a, expected x"
    devices = [Entry(path=b"c", kind="c", rdev=os.makedev(1, minor)) for minor in (3, 5)]
    (difference,) = compare(devices[:1], devices[1:])
    assert difference.words == "the device of c is 1:5, expected 1:3"


def test_what_is_gone_equals_what_was_never_listed() -> None:
    gone, there = Entry(path=b"a", kind="-"), file(b"a")
    assert list(compare([gone], [])) == list(compare([], [gone])) == list(compare([gone], [gone])) == []
    assert [d.what for d in compare([gone], [there])] == ["unexpected"]
    assert [d.what for d in compare([there], [gone])] == ["missing"]


def test_contents_are_compared_only_where_both_digests_are_known() -> None:
    assert list(compare([file(b"a", digest=b"1" * 32)], [file(b"a")])) == []


def linked(**groups: int) -> list[Entry]:
    return [file(name.encode(), link_group=group) for name, group in sorted(groups.items())]


@pytest.mark.parametrize(
    ("expected", "actual", "differing"),
    [
        ({"a": 1, "b": 1, "c": 2, "d": 2}, {"a": 9, "b": 9, "c": 8, "d": 8}, []),
        ({"a": 1, "b": 1, "c": 2, "d": 2}, {"a": 1, "b": 2, "c": 1, "d": 2}, ["b", "c", "d"]),
        ({"a": 1, "b": 1}, {"a": 0, "b": 0}, ["b"]),
        ({"a": 0, "b": 0}, {"a": 1, "b": 1}, ["b"]),
        ({"a": 1, "b": 1}, {"a": 1, "b": 2}, ["b"]),
        ({"a": 1}, {"a": 0}, []),
        ({"a": 1, "b": 1, "c": 1}, {"b": 5, "c": 5}, []),
    ],
)
def test_hard_links_are_compared_by_what_they_tie_together(
    expected: dict[str, int], actual: dict[str, int], differing: list[str]
) -> None:
    """D15: a link outside of the tree, or another inode number, is no difference."""
    found = list(compare(linked(**expected), linked(**actual)))
    assert [d.path.decode() for d in found if d.what == "hard links"] == differing
    if set(expected) == set(actual):
        assert (tree_digest(linked(**expected)) == tree_digest(linked(**actual))) == (not differing)


@settings(max_examples=100, deadline=None)
@given(
    left=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3)),
    right=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3)),
)
def test_the_hard_link_partition_is_exact(left: dict[str, int], right: dict[str, int]) -> None:
    common = sorted(left.keys() & right.keys())

    def pairs(groups: dict[str, int]) -> set[tuple[str, str]]:
        return {(a, b) for a in common for b in common if a < b and groups[a] and groups[a] == groups[b]}

    found = any(d.what == "hard links" for d in compare(linked(**left), linked(**right)))
    assert found == (pairs(left) != pairs(right))


@pytest.mark.parametrize("paths_in_order", [(b"b", b"a"), (b"a", b"a"), (b"a.b", b"a/x")])
def test_descriptions_out_of_order_are_not_compared(paths_in_order: tuple[bytes, ...]) -> None:
    wrong = [file(path) for path in paths_in_order]
    for one, other in ((wrong, []), ([], wrong)):
        with pytest.raises(PermanentError, match="not in order"):
            list(compare(one, other))


def test_the_digest_leaves_out_what_means_nothing_elsewhere() -> None:
    plain = [file(b"a", link_group=4), file(b"b", link_group=4)]
    same = [file(b"a", link_group=7, blocks=8, stale=True), file(b"b", link_group=7)]
    assert tree_digest(plain) == tree_digest(same) != tree_digest(plain[:1])
    assert len(tree_digest([])) == 64


# --- for people --------------------------------------------------------------------------------


@given(path=paths, other=paths)
def test_an_escaped_path_is_printable_and_unambiguous(path: bytes, other: bytes) -> None:
    assert escape(path).isprintable()
    if path != other:
        assert escape(path) != escape(other)


def test_plain_names_stay_readable() -> None:
    assert escape("grün/日本 x".encode()) == "grün/日本 x"
    assert escape(b"a\n\\\xff") == "a\\x0a\\\\\\xff"
    assert escape(b"") == "."


@pytest.mark.root
def test_what_cannot_be_carried_is_told_by_name(grown: Grown) -> None:
    """P14 D17: nothing is dropped silently."""
    assert list(unsupported(walk(grown.tree))) == []
    place = grown.place(b"names/line\nbreak")
    os.setxattr(place, b"trusted.overlay.redirect", b"/elsewhere")
    os.mknod(grown.place(b"whiteout"), 0o020600, os.makedev(0, 0))
    other = file(b"n", xattrs=((b"system.nfs4_acl", b""),))
    told = [*unsupported(walk(grown.tree)), *unsupported([other])]
    assert len(told) == 3
    assert told[0].startswith("names/line\\x0abreak carries trusted.overlay.redirect")
    assert told[1].startswith("whiteout is a character device 0:0")
    assert told[2].startswith("n carries system.nfs4_acl")
