"""A source and a target on one machine, for tests of the union: trees, changes to them, and what became dirty.

The dirty list is made by comparing two descriptions of the source, not by the tracker, so that what is tested
here stands on its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from events.errors import TransientError
from hostd import mounts
from hostd.federation import Union
from hostd.manifest import Entry, compare, order_key, walk
from hostd.transport import Transport
from tests.support.sshd import Sshd
from tests.support.trees import access_list

Snapshot = dict[bytes, Entry]
DEADLINE_SECONDS = 20.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fail when it does not within the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def unmount_below(directory: Path) -> None:
    """Unmount everything there, from the top down; the server of a lower layer lets go of the layer's own a moment later."""

    def all_gone() -> bool:
        with contextlib.suppress(TransientError):
            for record in reversed(mounts.mounts_below(directory)):
                mounts.unmount(record.point)
        return not mounts.mounts_below(directory)

    wait_for(all_gone)


class Link:
    """An sshd as the source, and the target's transport to it."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cargo-u-", dir="/tmp"))
        self.sshd = Sshd(self.directory / "sshd").start()
        self.transport = Transport(self.directory / "run")

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        """End everything, whatever state a failed test left it in."""
        with contextlib.suppress(Exception):
            self.sshd.thaw()
        unmount_below(self.directory)
        self.transport.close()
        self.sshd.stop()
        subprocess.run(["rm", "-rf", "--", str(self.directory)], check=True)


class Stand:
    """One mount: the source's tree, and the union of the target."""

    def __init__(self, link: Link, name: str = "") -> None:
        self.link = link
        self.base = Path(tempfile.mkdtemp(prefix="stand-", dir=link.directory)) / name
        self.base.mkdir(exist_ok=True)
        self.source = self.base / "source"
        self.volume = self.base / "volume"
        self.volume.mkdir()
        self.union = Union(self.volume / "cargo", self.volume / "_data")

    @property
    def place(self) -> Path:
        """Where the container would look."""
        return self.union.place

    def begin(self, make: Callable[[Path], object]) -> Snapshot:
        """Create the union, make the source's tree, and bring it over. Returns the source's description."""
        make(self.source)
        self.union.create()
        self.pull()
        return snapshot(self.source)

    def pull(self) -> None:
        """A whole round."""
        self.link.transport.rsync_pull(
            self.link.sshd.peer, str(self.source), self.union.upper_tree, temp_dir=self.union.incoming, live=True
        )

    def cut_over(self, before: Snapshot) -> list[Entry]:
        """Apply what changed since ``before``, and mount. Returns the manifest."""
        entries = dirty(before, snapshot(self.source))
        self.union.attach_remote(self.link.transport, self.link.sshd.peer, str(self.source))
        self.union.apply(entries)
        self.mount()
        return entries

    def mount(self) -> None:
        """The target's mounts, as at the start of the container."""
        self.union.attach_remote(self.link.transport, self.link.sshd.peer, str(self.source))
        self.union.mount_lower()
        self.union.mount_merged()

    def fill(self, limit: int = 10**9) -> int:
        """Bring at most ``limit`` of the missing contents. Returns how many are brought."""
        holders = self.union.remaining()[:limit]
        wanted = [holder.path for holder in holders]
        if wanted:
            self.link.transport.rsync_pull(
                self.link.sshd.peer,
                str(self.source),
                self.union.replica,
                temp_dir=self.union.incoming,
                partial_dir=self.union.partial,
                files_from=wanted,
                reread=True,
                basis=self.union.basis,
            )
            self.union.admit(holders, on_disk=True)
        else:
            self.union.let_go_of_server()
        return len(wanted)

    def finish(self) -> None:
        """Take the union down, fold it, and remove the stage."""
        self.union.unmount_all()
        self.union.fold()
        self.union.remove()

    def close(self) -> None:
        """Unmount, whatever happened."""
        unmount_below(self.base)


def snapshot(tree: Path) -> Snapshot:
    """Everything in a tree, contents included."""
    return {entry.path: entry for entry in walk(tree, digest=True, workers=1)}


def differences(expected: Path | Snapshot, actual: Path, *, but: frozenset[str] = frozenset()) -> list[str]:
    """In words, what two trees disagree on, except for the aspects named in ``but``."""
    left = snapshot(expected) if isinstance(expected, Path) else expected
    entries = sorted(left.values(), key=lambda entry: order_key(entry.path))
    found = compare(entries, walk(actual, digest=True, workers=1))
    return [difference.words for difference in found if difference.what not in but]


def overlay_marks(tree: Path) -> list[bytes]:
    """Paths that carry marks of the overlay's own."""
    found = []
    for directory, directories, files in os.walk(os.fsencode(tree)):
        for path in [directory, *(os.path.join(directory, name) for name in directories + files)]:
            names = os.listxattr(path, follow_symlinks=False)
            if any(name.startswith("trusted.overlay.") for name in names):
                found.append(path)
    return found


def dirty(before: Snapshot, after: Snapshot) -> list[Entry]:
    """The manifest of what changed from one description to the other."""
    names_before, names_after = _partition(before), _partition(after)
    listed: Snapshot = {}
    for path, entry in after.items():
        old = before.get(path)
        same_links = names_before.get(path) == names_after.get(path)
        if old is not None and same_links and _plain(old) == _plain(entry):
            continue
        contents = old is None or old.kind != entry.kind or old.digest != entry.digest
        stale = entry.kind == "f" and entry.size > 0 and contents
        listed[path] = msgspec.structs.replace(entry, stale=stale, digest=b"")
    for path in list(listed):
        for name in names_after[path]:
            listed.setdefault(name, msgspec.structs.replace(after[name], digest=b""))
    for path, entry in listed.items():
        if any(listed[name].stale for name in names_after[path]):
            listed[path] = msgspec.structs.replace(entry, stale=True)
    for path in before.keys() - after.keys():
        above = os.path.dirname(path)
        if above in after and after[above].kind == "d":
            listed[path] = Entry(path=path, kind="-")
    for path in list(listed):
        above = path
        while above:
            above = os.path.dirname(above)
            listed.setdefault(above, msgspec.structs.replace(after[above], digest=b""))
    return sorted(listed.values(), key=lambda entry: order_key(entry.path))


def _plain(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, link_group=0, blocks=0)


def _partition(tree: Snapshot) -> dict[bytes, frozenset[bytes]]:
    groups: dict[int, set[bytes]] = defaultdict(set)
    for entry in tree.values():
        if entry.link_group:
            groups[entry.link_group].add(entry.path)
    return {path: frozenset(groups[e.link_group]) if e.link_group else frozenset({path}) for path, e in tree.items()}


# --- changes ---------------------------------------------------------------------------------------


class Changes:
    """Random changes, the same to each of several equal trees, as a service or a person would make them."""

    def __init__(self, seed: int, *trees: Path, times: bool = False) -> None:
        self.random = random.Random(seed)
        self.trees = [os.fsencode(tree) for tree in trees]
        self.times = times
        self.touched: set[bytes] = set()

    def make(self, count: int) -> None:
        """Make so many changes."""
        kinds = (
            [self._write, self._append, self._replace, self._silently, self._truncate] * 2
            + [self._remove, self._remove_subtree, self._rename, self._rename_directory, self._rename_over]
            + [self._mkdir, self._create, self._symlink, self._link, self._unlink_one, self._change_kind]
            + [self._chmod, self._chown, self._attribute, self._acl, self._empty, self._sparse]
        )
        for number in range(count):
            self.random.choice(kinds)(number)

    def _all(self, path: bytes) -> Iterator[bytes]:
        for tree in self.trees:
            yield os.path.join(tree, path) if path else tree

    def _paths(self, test: Callable[[int], bool]) -> list[bytes]:
        found = []
        root = self.trees[0]
        for directory, directories, files in os.walk(root):
            for name in sorted(directories) + sorted(files):
                path = os.path.join(directory, name)
                if test(os.lstat(path).st_mode):
                    found.append(path[len(root) + 1 :])
        return sorted(found)

    def _file(self) -> bytes | None:
        found = self._paths(stat.S_ISREG)
        return self.random.choice(found) if found else None

    def _directory(self) -> bytes:
        return self.random.choice([b"", *self._paths(stat.S_ISDIR)])

    def _new(self, number: int) -> bytes:
        name = self.random.randbytes(4).replace(b"\0", b"\n").replace(b"/", b"-") + b"+%d" % number
        parent = self._directory()
        return os.path.join(parent, name) if parent else name

    def _write(self, number: int) -> None:
        path, data = self._file(), self.random.randbytes(self.random.choice((1, 300, 5000)))
        if path is None:
            return
        offset = self.random.randrange(2000)
        for place in self._all(path):
            with open(place, "r+b") as stream:
                stream.seek(offset)
                stream.write(data)

    def _append(self, number: int) -> None:
        path = self._file()
        for place in self._all(path) if path is not None else ():
            with open(place, "ab") as stream:
                stream.write(b"appended %d" % number)

    def _replace(self, number: int) -> None:
        path, data = self._file(), self.random.randbytes(900)
        for place in self._all(path) if path is not None else ():
            new = os.path.join(os.path.dirname(place), b"replacing")
            with open(new, "wb") as stream:
                stream.write(data)
            os.rename(new, place)

    def _silently(self, number: int) -> None:
        """Other contents under the same size and time, as a write through a mapping may leave them."""
        path = self._file()
        for place in self._all(path) if path is not None else ():
            seen = os.stat(place)
            if seen.st_size:
                with open(place, "r+b") as stream:
                    stream.write(b"\x55")
                os.utime(place, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    def _truncate(self, number: int) -> None:
        path = self._file()
        for place in self._all(path) if path is not None else ():
            os.truncate(place, os.stat(place).st_size // 2)

    def _empty(self, number: int) -> None:
        path = self._file()
        for place in self._all(path) if path is not None else ():
            os.truncate(place, 0)

    def _sparse(self, number: int) -> None:
        path = self._new(number)
        for place in self._all(path):
            with open(place, "wb") as stream:
                stream.truncate(300_000)
                stream.seek(200_000)
                stream.write(b"island")

    def _remove(self, number: int) -> None:
        found = self._paths(lambda mode: not stat.S_ISDIR(mode))
        if found:
            path = self.random.choice(found)
            for place in self._all(path):
                os.unlink(place)

    def _remove_subtree(self, number: int) -> None:
        found = self._paths(stat.S_ISDIR)
        if found and self.random.random() < 0.4:
            path = self.random.choice(found)
            for place in self._all(path):
                shutil.rmtree(place)

    def _rename(self, number: int) -> None:
        found = self._paths(lambda mode: not stat.S_ISDIR(mode))
        if found:
            path, to = self.random.choice(found), self._new(number)
            for place, new in zip(self._all(path), self._all(to), strict=True):
                os.rename(place, new)

    def _rename_over(self, number: int) -> None:
        found = self._paths(stat.S_ISREG)
        if len(found) > 1:
            path, to = self.random.sample(found, 2)
            for place, new in zip(self._all(path), self._all(to), strict=True):
                os.rename(place, new)

    def _rename_directory(self, number: int) -> None:
        found = self._paths(stat.S_ISDIR)
        if found:
            path, to = self.random.choice(found), self._new(number)
            if not (to + b"/").startswith(path + b"/"):
                for place, new in zip(self._all(path), self._all(to), strict=True):
                    os.rename(place, new)

    def _mkdir(self, number: int) -> None:
        path = self._new(number)
        for place in self._all(path):
            os.mkdir(place, 0o750)

    def _create(self, number: int) -> None:
        path, data = self._new(number), self.random.randbytes(self.random.choice((0, 10, 4096, 70_000)))
        for place in self._all(path):
            with open(place, "xb") as stream:
                stream.write(data)

    def _symlink(self, number: int) -> None:
        path = self._new(number)
        for place in self._all(path):
            os.symlink(b"../to %d" % number, place)

    def _link(self, number: int) -> None:
        path, to = self._file(), self._new(number)
        for place, new in zip(self._all(path), self._all(to), strict=True) if path is not None else ():
            os.link(place, new)

    def _unlink_one(self, number: int) -> None:
        root = self.trees[0]
        found = [p for p in self._paths(stat.S_ISREG) if os.lstat(os.path.join(root, p)).st_nlink > 1]
        if found:
            path = self.random.choice(found)
            for place in self._all(path):
                os.unlink(place)

    def _change_kind(self, number: int) -> None:
        found = self._paths(lambda mode: True)
        if not found:
            return
        path, kind = self.random.choice(found), self.random.choice("fdlp")
        for place in self._all(path):
            if stat.S_ISDIR(os.lstat(place).st_mode):
                shutil.rmtree(place)
            else:
                os.unlink(place)
            if kind == "f":
                with open(place, "xb") as stream:
                    stream.write(b"now a file")
            elif kind == "d":
                os.mkdir(place)
            elif kind == "l":
                os.symlink(b"now a link", place)
            else:
                os.mkfifo(place)

    def _chmod(self, number: int) -> None:
        found = self._paths(lambda mode: not stat.S_ISLNK(mode))
        path, mode = self.random.choice([b"", *found]), self.random.choice((0o700, 0o4755, 0o2640, 0o000))
        for place in self._all(path):
            os.chmod(place, mode)

    def _chown(self, number: int) -> None:
        path, owner = self.random.choice([b"", *self._paths(lambda mode: True)]), self.random.choice((0, 7, 70_000))
        for place in self._all(path):
            os.chown(place, owner, owner + 1, follow_symlinks=False)

    def _attribute(self, number: int) -> None:
        found = self._paths(lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode))
        path, value = self.random.choice([b"", *found]), self.random.randbytes(20)
        for place in self._all(path):
            if "user.changing" in os.listxattr(place) and value[0] < 128:
                os.removexattr(place, b"user.changing")
            else:
                os.setxattr(place, b"user.changing", value)

    def _acl(self, number: int) -> None:
        found = self._paths(lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode))
        path = self.random.choice([b"", *found])
        kind = b"system.posix_acl_default" if path in self._paths(stat.S_ISDIR) else b"system.posix_acl_access"
        for place in self._all(path):
            os.setxattr(place, kind, access_list(100 + number))
