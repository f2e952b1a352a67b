"""The kernel's side of a file system in user space: the few messages of ``/dev/fuse`` that a read-only tree needs.

Sizes and numbers are those of ``include/uapi/linux/fuse.h``, a stable interface; what is not listed here is
answered with ENOSYS, which the kernel remembers and asks no more. Spoken directly, because an answer may come minutes
after its question, from another thread: libfuse's loop keeps a thread for each open question, and with the version
of Debian 12 and its high-level calls at most ten.

What it must never do: answer a question twice, or take a failed answer (the asker was killed) for an error.

Stands below ``hostd/lower.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum

MAJOR = 7
MINOR = 31
"""The oldest protocol that has all that is used here (Linux 5.4); a newer kernel adapts."""
BUFFER_BYTES = 64 * 1024
"""Nothing is ever written through this, so no question is longer; the kernel insists on 8 KiB."""
MAX_PAGES = 256
BACKGROUND_REQUESTS = 4096
"""Read-ahead that may be under way. With the default of 12, a few readers that wait would stop everybody's."""
FOREVER_SECONDS = 7 * 24 * 3600

_ASYNC_READ = 1 << 0
_NO_OPEN_SUPPORT = 1 << 17
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_NO_OPENDIR_SUPPORT = 1 << 24
_WANTED = _ASYNC_READ | _NO_OPEN_SUPPORT | _PARALLEL_DIROPS | _MAX_PAGES | _NO_OPENDIR_SUPPORT

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_IN = struct.Struct("=IIQQIIII")
_OUT = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("=QQQ24x12xIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_ATTRIBUTES_OUT = struct.Struct("=QII")
_READ_IN = struct.Struct("=QQI")
_DIRENT = struct.Struct("=QQII")
_STATFS = struct.Struct("=QQQQQIII28x")
_libc = ctypes.CDLL(None, use_errno=True)


class Opcode(IntEnum):
    """What the kernel asks."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READ = 15
    STATFS = 17
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""An interrupt only says that somebody lost patience; the answer to the question itself is still due."""


@dataclass(frozen=True)
class Question:
    """One message of the kernel's. ``number`` names it in the answer, ``node`` is the file that it is about."""

    number: int
    opcode: int
    node: int
    body: bytes
    raw: bytes = b""
    """The whole message."""


class Connection:
    """One mounted file system. Safe to use from many threads, and in every process that has its descriptor."""

    def __init__(self, device: int) -> None:
        """``device`` is a descriptor of ``/dev/fuse`` on which a file system is mounted."""
        self._device = device

    @classmethod
    def mount(cls, source: str, kind: str, mountpoint: bytes) -> Connection:
        """Mount one, read-only, for every user. Raises OSError."""
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        if _libc.mount(source.encode(), mountpoint, f"fuse.{kind}".encode(), flags, options) != 0:
            code = ctypes.get_errno()
            os.close(device)
            raise OSError(code, os.strerror(code))
        return cls(device)

    def ask(self, buffer: memoryview) -> Question | None:
        """The next question, which stays in ``buffer``; None when the file system has been unmounted. Blocks."""
        while True:
            try:
                os.readv(self._device, [buffer])
            except OSError as error:
                if error.errno in {errno.ENODEV, errno.ECONNABORTED}:
                    return None
                if error.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:
                    continue  # the asker was gone before its question was read
                raise
            return question_in(buffer)

    def answer(self, question: Question, *pieces: bytes) -> None:
        """Give what was asked for."""
        length = _OUT.size + sum(map(len, pieces))
        self._write([_OUT.pack(length, 0, question.number), *pieces])

    def fail(self, question: Question, code: int) -> None:
        """Answer with an error number."""
        self._write([_OUT.pack(_OUT.size, -code, question.number)])

    def _write(self, pieces: list[bytes]) -> None:
        # ENOENT: nobody waits for this answer any more. ENODEV: unmounted meanwhile.
        with contextlib.suppress(FileNotFoundError, ConnectionAbortedError):
            try:
                os.writev(self._device, pieces)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise


def length_of(message: memoryview) -> int:
    """Of the question in a piece of memory; 0 when there is none."""
    return int.from_bytes(message[0:4], sys.byteorder)


def question_in(message: memoryview) -> Question:
    """The question that begins a piece of memory."""
    raw = bytes(message[: length_of(message)])
    _, opcode, number, node, *_ = _IN.unpack_from(raw)
    return Question(number, opcode, node, raw[_IN.size :], raw)


def greeting(question: Question) -> bytes:
    """The answer to INIT. Raises ValueError when the kernel is too old."""
    major, minor, readahead, flags = _INIT_IN.unpack_from(question.body)
    if (major, minor) < (MAJOR, MINOR):
        raise ValueError(f"this kernel speaks FUSE {major}.{minor}, at least {MAJOR}.{MINOR} is needed")
    congested = BACKGROUND_REQUESTS * 3 // 4
    return _INIT_OUT.pack(
        MAJOR, MINOR, readahead, flags & _WANTED, BACKGROUND_REQUESTS, congested, 4096, 1, MAX_PAGES, 0, 0
    )


def attributes(node: int, size: int) -> bytes:
    """What ``stat`` shows of a file of ``size`` bytes, or of a directory if ``size`` is negative."""
    # Two links for a file: overlayfs takes a lower file with one for its own inode's identity, and would show the
    # names of one hard-linked placeholder as different inodes once it is written.
    mode, links = (stat.S_IFREG | 0o644, 2) if size >= 0 else (stat.S_IFDIR | 0o755, 2)
    size = max(0, size)
    return _ATTRIBUTES.pack(node, size, -(-size // 512), mode, links, 0, 0, 0, 4096, 0)


def entry(node: int, size: int) -> bytes:
    """The answer to LOOKUP, to be remembered for good."""
    return _ENTRY.pack(node, 0, FOREVER_SECONDS, FOREVER_SECONDS, 0, 0) + attributes(node, size)


def lasting_attributes(node: int, size: int) -> bytes:
    """The answer to GETATTR, to be remembered for good."""
    return _ATTRIBUTES_OUT.pack(FOREVER_SECONDS, 0, 0) + attributes(node, size)


def wanted_range(question: Question) -> tuple[int, int]:
    """Offset and length of a READ or READDIR."""
    _, offset, length = _READ_IN.unpack_from(question.body)
    return offset, length


def directory_page(entries: list[tuple[bytes, int, bool]], offset: int, length: int) -> bytes:
    """The answer to READDIR: as many of the entries (name, node, whether a directory) as fit, from number ``offset``."""
    page = bytearray()
    for index in range(offset, len(entries)):
        name, node, is_directory = entries[index]
        kind = (stat.S_IFDIR if is_directory else stat.S_IFREG) >> 12
        record = _DIRENT.pack(node, index + 1, len(name), kind) + name
        record += b"\0" * (-len(record) % 8)
        if len(page) + len(record) > length:
            break
        page += record
    return bytes(page)


def statistics(files: int, mark: int) -> bytes:
    """The answer to STATFS. ``mark`` shows as the number of free files, of which a read-only tree has none."""
    return _STATFS.pack(0, 0, 0, files, mark, 4096, 255, 4096)
