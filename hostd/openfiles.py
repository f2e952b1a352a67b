"""Which files the container's processes can write to without inotify telling.

A shared mapping is written without any event; so is a file written by Linux's native asynchronous I/O. Both need
a descriptor or a mapping, and those are to be seen in ``/proc`` while the processes live. What this module must
never do: open a file of the container, or fail because a process ended while it looked.

Flow: the source looks right before it begins a tracking generation and right before the stop; ``hostd/dirty.py``
compares the two.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_RECENT_NS = 20_000_000
"""Before Linux 6.13 a ctime only moves with the timer tick, 1 to 10 ms: a write in the same tick is not to be seen."""
_ATTEMPTS = 3
"""At reading a process's mappings while it changes them."""
_DELETED = b" (deleted)"
_OCTAL = re.compile(rb"\\([0-7]{3})")
FileKey = tuple[int, int]
"""``st_dev`` and ``st_ino``: containers see other paths than the host does, but the same files."""


class OpenFile(NamedTuple):
    """A regular file that some process of the container can write to."""

    ctime_ns: int
    """When the file or its metadata last changed; -1 when that was too recent to be compared with later."""
    mapped_writable_shared: bool
    place: bytes = b""
    """Path within its file system (not within any mount), empty if unknown or deleted."""


class Mount(NamedTuple):
    """A line of mountinfo."""

    root: bytes
    """What of the file system is mounted."""
    point: bytes
    type: bytes
    """As the kernel names the file system: ``ext4``."""


def writable_files(init_pid: int) -> dict[FileKey, OpenFile]:
    """Regular files open for writing, or mapped shared and writable, by the processes of a container.

    That is: every process in the PID or mount namespace of ``init_pid``, and all its descendants. Empty when
    that process has ended. Needs root; raises OSError only if ``/proc`` itself cannot be read.
    """
    found: dict[FileKey, OpenFile] = {}
    mounts: dict[bytes, dict[int, Mount]] = {}
    for pid in _processes(init_pid):
        try:
            namespace = os.readlink(b"/proc/%d/ns/mnt" % pid)
            if namespace not in mounts:
                mounts[namespace] = mounts_of(pid)
            seen = [*_descriptors(pid), *_mappings(pid)]
        except OSError:
            continue  # it ended
        for one in seen:
            known = found.get(one.key)
            recent = abs(time.time_ns() - one.ctime_ns) < _RECENT_NS
            place = _place(one.link, mounts[namespace].get(one.mount_id))
            found[one.key] = OpenFile(
                ctime_ns=-1 if recent else one.ctime_ns,
                mapped_writable_shared=one.mapped or (known is not None and known.mapped_writable_shared),
                place=place or (known.place if known else b""),
            )
    return found


def mounts_of(pid: int | str) -> dict[int, Mount]:
    """The mounts that a process sees, by mount id. Raises OSError."""
    mounts = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        kind = fields[fields.index(b"-", 6) + 1]
        mounts[int(fields[0])] = Mount(_unescape(fields[3]), _unescape(fields[4]), kind)
    return mounts


def place_of(descriptor: int) -> tuple[bytes, bytes]:
    """Path within its file system, and that file system's type, of an open descriptor. Raises OSError."""
    mount = mounts_of("self").get(_mount_id(b"/proc/self/fdinfo/%d" % descriptor))
    link = os.readlink(b"/proc/self/fd/%d" % descriptor)
    return _place(link, mount), mount.type if mount else b""


def _unescape(field: bytes) -> bytes:
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), field)


def _place(link: bytes, mount: Mount | None) -> bytes:
    point = mount.point.rstrip(b"/") if mount else b""
    if mount is None or not (link + b"/").startswith(point + b"/"):
        return b""
    return mount.root.rstrip(b"/") + link[len(point) :] or b"/"


# --- processes ---------------------------------------------------------------------------------


def _processes(init_pid: int) -> Iterator[int]:
    try:
        wanted = _namespaces(init_pid)
    except OSError:
        return
    yield init_pid
    parents: dict[int, int] = {}
    inside = {init_pid}
    for name in os.listdir("/proc"):
        if not name.isdigit() or (pid := int(name)) == init_pid:
            continue
        try:
            if not wanted.isdisjoint(_namespaces(pid)):
                inside.add(pid)
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            continue
    for pid in parents:
        line = []
        at = pid
        while at not in inside and at in parents and at not in line:
            line.append(at)
            at = parents[at]
        if at in inside:
            inside.update(line)
            yield pid


def _namespaces(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/pid"), os.readlink(f"/proc/{pid}/ns/mnt")}


class _Seen(NamedTuple):
    key: FileKey
    ctime_ns: int
    mapped: bool
    link: bytes = b""
    """What the link in /proc says: a path in the process's own mount namespace."""
    mount_id: int = -1


def _descriptors(pid: int) -> Iterator[_Seen]:
    """Raises OSError when the process has ended."""
    folder = b"/proc/%d/fd" % pid
    for name in os.listdir(folder):
        link = os.path.join(folder, name)
        try:
            # The link's own permission bits say how the file was opened.
            if not os.lstat(link).st_mode & stat.S_IWUSR:
                continue
            status = os.stat(link)
            if stat.S_ISREG(status.st_mode):
                mount_id = _mount_id(b"/proc/%d/fdinfo/%s" % (pid, name))
                yield _Seen(_key(status), status.st_ctime_ns, False, _link(link), mount_id)
        except OSError:
            continue  # closed meanwhile


def _mappings(pid: int) -> Iterator[_Seen]:
    """Raises OSError when the process has ended."""
    done: set[tuple[bytes, ...]] = set()
    for attempt in range(_ATTEMPTS):
        missed = False
        for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
            span, permissions, _, device, inode, *_ = line.split(maxsplit=5)
            mapping = (device, inode, permissions)
            if not permissions.endswith(b"s") or inode == b"0" or mapping in done:
                continue
            try:
                seen = _mapping(pid, span, permissions)
            except OSError:
                if attempt < _ATTEMPTS - 1:
                    missed = True  # gone, or split or joined with its neighbour: that is seen next time
                    continue
                major, _, minor = device.partition(b":")
                seen = _Seen((os.makedev(int(major, 16), int(minor, 16)), int(inode)), -1, True)
            done.add(mapping)
            if seen is not None:
                yield seen
        if not missed:
            return


def _mapping(pid: int, span: bytes, permissions: bytes) -> _Seen | None:
    link = b"/proc/%d/map_files/%s" % (pid, _plain(span))
    # A mapping that is read-only now can be made writable if the file was opened for writing.
    if b"w" not in permissions and not os.lstat(link).st_mode & stat.S_IWUSR:
        return None
    handle = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return None
        mount_id = _mount_id(b"/proc/self/fdinfo/%d" % handle)
        return _Seen(_key(status), status.st_ctime_ns, True, _link(link), mount_id)
    finally:
        os.close(handle)


def _key(status: os.stat_result) -> FileKey:
    return status.st_dev, status.st_ino


def _plain(span: bytes) -> bytes:
    """``maps`` pads addresses with zeros, ``map_files`` does not."""
    low, _, high = span.partition(b"-")
    return b"%x-%x" % (int(low, 16), int(high, 16))


def _link(link: bytes) -> bytes:
    text = os.readlink(link)
    return b"" if text.endswith(_DELETED) else text


def _mount_id(info: bytes) -> int:
    with open(info, "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    return -1
