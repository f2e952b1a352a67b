"""Odd trees: everything a data mount may hold, made from a seed, so that a failure can be repeated.

``grow`` plants one of every oddity and then random entries. Paths are bytes throughout. Run as root it also
makes device nodes, foreign owners, capabilities and ``trusted.*`` attributes.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ODD_NAMES = (
    b"plain",
    b"with space",
    b"trailing space ",
    b"line\nbreak",
    b"\n",
    b"tab\tand\rreturn",
    b"-rf",
    b"--delete",
    b"\xff\xfe not utf-8 \x80",
    b"\xc3\x28",
    b"colon:comma,equals=",
    b"back\\slash",
    b"octal\\012",
    b"quote'double\"`$(id)",
    b"glob*[a-z]?{b,c}",
    b"#comment",
    b"~home",
    b"...",
    b"..hidden",
    b".hidden",
    b"%2e%2e",
    b"\x01\x1b[31mred\x7f",
    "grün-é-日本-🚢".encode(),
    "e\u0301 decomposed, \u202e turned".encode(),
    b"n" * 255,
    b"\xf0" * 255,
    b"CASE",
    b"case",
    b"lost+found",
)
"""No NUL, no slash; each may be the name of a file, a directory or a link's target."""
SORTING_NAMES = (b"sort", b"sort!", b"sort-", b"sort.b", b"sort0", b"sorta")
"""``sort`` becomes a directory with children: a sort by whole paths would put ``sort!`` between them."""
LONG_AGO_NS = -86_400_000_000_001
"""A time before 1970, with nanoseconds."""


@dataclass
class Grown:
    """What was planted, as relative paths by oddity."""

    tree: bytes
    directories: list[bytes] = field(default_factory=lambda: [b""])
    files: list[bytes] = field(default_factory=list)
    odd: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))

    def place(self, path: bytes) -> bytes:
        """The absolute path of a relative one."""
        return os.path.join(self.tree, path) if path else self.tree

    @property
    def paths(self) -> list[bytes]:
        """Everything planted, the root included; in no order."""
        rest = [p for kind in ("symlink", "fifo", "socket", "device") for p in self.odd[kind]]
        return [*self.directories, *self.files, *rest]


def grow(tree: Path | bytes, seed: int, *, entries: int = 60, depth: int = 30) -> Grown:
    """Make the directory ``tree`` (it must not exist) and fill it: all oddities, then ``entries`` more.

    ``depth`` is that of one chain of directories. Equal seeds give equal trees, owners and times included.
    """
    random_numbers = random.Random(seed)
    grown = Grown(os.fsencode(tree))
    os.mkdir(grown.tree)
    _plant_names(grown, random_numbers)
    _plant_kinds(grown, random_numbers)
    _plant_files(grown, random_numbers)
    chain = b""
    for level in range(depth):
        chain = _directory(grown, os.path.join(chain, b"deep%d" % level))
    _file(grown, os.path.join(chain, b"at the bottom"), b"deep")
    _plant_more(grown, random_numbers, entries)
    _plant_attributes(grown, random_numbers)
    _settle_metadata(grown, random_numbers)
    return grown


def _directory(grown: Grown, path: bytes) -> bytes:
    os.mkdir(grown.place(path))
    grown.directories.append(path)
    return path


def _file(grown: Grown, path: bytes, contents: bytes) -> bytes:
    with open(grown.place(path), "xb") as stream:
        stream.write(contents)
    grown.files.append(path)
    return path


def _plant_names(grown: Grown, random_numbers: random.Random) -> None:
    files, directories = _directory(grown, b"names"), _directory(grown, b"dirs")
    for name in ODD_NAMES:
        _file(grown, os.path.join(files, name), random_numbers.randbytes(random_numbers.randrange(2000)))
        inner = _directory(grown, os.path.join(directories, name))
        if random_numbers.random() < 0.5:
            _file(grown, os.path.join(inner, name), name)
        else:
            grown.odd["empty directory"].append(inner)
    _directory(grown, SORTING_NAMES[0])
    for name in SORTING_NAMES[1:]:
        _file(grown, name, name)
        _file(grown, os.path.join(SORTING_NAMES[0], name), name)


def _plant_kinds(grown: Grown, random_numbers: random.Random) -> None:
    where = _directory(grown, b"kinds")
    for target in (b"../names/plain", b"nowhere at all", b"/etc/passwd", b"..", b"loop", b"\xff\n", b"t" * 4000):
        path = os.path.join(where, b"loop" if target == b"loop" else b"link%d" % len(grown.odd["symlink"]))
        os.symlink(target, grown.place(path))
        grown.odd["symlink"].append(path)
    os.mkfifo(grown.place(os.path.join(where, b"pipe")))
    grown.odd["fifo"].append(os.path.join(where, b"pipe"))
    if os.geteuid() == 0:
        for name, kind, number in (
            (b"character", 0o020640, os.makedev(1, 3)),
            (b"block", 0o060600, os.makedev(7, 250)),
            (b"large numbers", 0o020600, os.makedev(511, 70000)),
        ):
            path = os.path.join(where, name)
            os.mknod(grown.place(path), kind, number)
            grown.odd["device"].append(path)
        path = os.path.join(where, b"socket")
        os.mknod(grown.place(path), 0o140755)
        grown.odd["socket"].append(path)


def _plant_files(grown: Grown, random_numbers: random.Random) -> None:
    where = _directory(grown, b"files")
    _file(grown, os.path.join(where, b"empty"), b"")
    _file(grown, os.path.join(where, b"zeros"), bytes(100_000))
    _file(grown, os.path.join(where, b"large"), random_numbers.randbytes(700_001))
    for name, size, data_at in (
        (b"hole only", 3_000_000, ()),
        (b"hole, data, hole", 5_000_000, (1_048_576,)),
        (b"data, hole, data", 4_000_001, (0, 4_000_000)),
    ):
        path = _file(grown, os.path.join(where, name), b"")
        with open(grown.place(path), "r+b") as stream:
            stream.truncate(size)
            for offset in data_at:
                stream.seek(offset)
                stream.write(b"x")
        grown.odd["sparse"].append(path)
    other = _directory(grown, b"elsewhere")
    for number in range(3):
        first = _file(grown, os.path.join(where, b"linked%d" % number), b"several names %d" % number)
        group = [first]
        for path in (os.path.join(other, b"a%d" % number), os.path.join(b"names", b"z%d" % number)):
            os.link(grown.place(first), grown.place(path))
            grown.files.append(path)
            group.append(path)
        grown.odd["hard link"] += group
    pipe = os.path.join(other, b"second name of the pipe")
    os.link(grown.place(b"kinds/pipe"), grown.place(pipe))
    grown.odd["fifo"].append(pipe)


def _plant_more(grown: Grown, random_numbers: random.Random, entries: int) -> None:
    for number in range(entries):
        path = os.path.join(random_numbers.choice(grown.directories), _random_name(random_numbers, number))
        match random_numbers.randrange(8):
            case 0 | 1:
                _directory(grown, path)
            case 2:
                os.symlink(_random_name(random_numbers, number), grown.place(path))
                grown.odd["symlink"].append(path)
            case 3 if grown.files:
                os.link(grown.place(random_numbers.choice(grown.files)), grown.place(path))
                grown.files.append(path)
            case _:
                _file(grown, path, random_numbers.randbytes(random_numbers.choice((0, 1, 511, 4096, 20_000))))


def _random_name(random_numbers: random.Random, number: int) -> bytes:
    """Any bytes but NUL and slash; the number keeps the names of one directory apart."""
    drawn = random_numbers.randbytes(random_numbers.choice((1, 3, 8, 60)))
    return drawn.replace(b"\0", b"\n").replace(b"/", b"-") + b"%d" % number


def _plant_attributes(grown: Grown, random_numbers: random.Random) -> None:
    for path in random_numbers.sample(grown.files, 8) + random_numbers.sample(grown.directories, 4):
        os.setxattr(grown.place(path), b"user.\xff odd\nname", random_numbers.randbytes(40))
        os.setxattr(grown.place(path), b"user.empty", b"")
        grown.odd["xattr"].append(path)
    for path in random_numbers.sample(grown.files, 4):
        os.setxattr(grown.place(path), b"system.posix_acl_access", access_list(12345))
        grown.odd["acl"].append(path)
    for path in random_numbers.sample(grown.directories, 2):
        os.setxattr(grown.place(path), b"system.posix_acl_default", access_list(54321))
        grown.odd["default acl"].append(path)
    if os.geteuid() == 0:
        path = grown.odd["symlink"][0]
        os.setxattr(grown.place(path), b"trusted.on_a_link", b"1", follow_symlinks=False)
        grown.odd["xattr"].append(path)


def access_list(uid: int) -> bytes:
    """A POSIX ACL as the kernel stores it (linux/posix_acl_xattr.h): one named user beside the usual."""
    nobody = 0xFFFFFFFF
    rows = ((0x01, 6, nobody), (0x02, 5, uid), (0x04, 4, nobody), (0x10, 5, nobody), (0x20, 0, nobody))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


def _settle_metadata(grown: Grown, random_numbers: random.Random) -> None:
    """Owners, modes, capabilities and times; deepest first, because each change moves the parent's time."""
    root = os.geteuid() == 0
    links = set(grown.odd["symlink"])
    for path in sorted(grown.paths, key=lambda path: path.count(b"/"), reverse=True):
        place = grown.place(path)
        if root:
            owner, group = random_numbers.choice((0, 1, 999, 70_000, 2**31)), random_numbers.choice((0, 5, 65534))
            os.chown(place, owner, group, follow_symlinks=False)
        if path not in links and path not in grown.odd["acl"]:
            modes = (0o755, 0o700, 0o1777, 0o2750) if path in grown.directories else (0o644, 0o600, 0o4755, 0o000)
            os.chmod(place, random_numbers.choice(modes) if root else 0o700)
    if root:
        for path in random_numbers.sample(grown.files, 2):
            # VFS_CAP_REVISION_2, effective, cap_net_bind_service; a change of owner would have removed it.
            capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
            os.setxattr(grown.place(path), b"security.capability", capability)
            grown.odd["capability"].append(path)
    for path in sorted(grown.paths, key=lambda path: path.count(b"/") + bool(path), reverse=True):
        when = LONG_AGO_NS if random_numbers.random() < 0.05 else random_numbers.randrange(2 * 10**18)
        os.utime(grown.place(path), ns=(when, when), follow_symlinks=False)


def grow_deep(tree: Path | bytes, depth: int, name: bytes = b"d" * 60) -> bytes:
    """A chain of ``depth`` directories, however long its path gets, with a file at its end; that one's path.

    No single system call takes such a path whole, and ``shutil.rmtree`` gives up on it: see ``felled``.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(tree)
    here = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open(b"bottom", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here))
    os.close(here)
    return b"/".join([name] * depth + [b"bottom"])


@contextlib.contextmanager
def felled(tree: Path) -> Iterator[Path]:
    """Remove ``tree`` afterwards, whatever it has become."""
    try:
        yield tree
    finally:
        subprocess.run(["rm", "-rf", "--", str(tree)], check=True)
