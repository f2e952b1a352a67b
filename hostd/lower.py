"""The lower layer of one union: a small read-only file system, served by a process of its own.

    python -m hostd.lower STAGE fsname=cargo-lower-… patience=600 [device=… pending=…]

It shows exactly the files that are listed in ``STAGE/placeholders`` (path and size), below ``STAGE/lower``: their
contents come from ``STAGE/replica`` or ``STAGE/remote``, see ``hostd/lower_contents.py``. Names, sizes and inode
numbers never change for as long as it is mounted, so the kernel may remember all of it, contents included.

It outlives the agent, as a container's data must: it has a session of its own, ignores the signals that end agents, and
ends when its file system is unmounted. It is two processes: one serves, the other holds the file system's descriptor
and the questions that wait for an answer (``hostd/fuse_pending.py``), and starts a new server when the first is
killed. Readers then wait for a moment, and nothing else happens. The agent keeps the same descriptors, as a third
(``hostd/lower_process.py``), and hands them to a new pair when both are gone: ``device=3 pending=4``. It may be started before the list is final, since nothing is
remembered before the first look-up, which reads the list; whoever goes on then makes sure that it was the final one
(``mark_of``). What it must never do: write anything but its log, or decide anything; who mounts and unmounts is ``hostd/lower_process.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from hostd.fuse_pending import Pending, clear
from hostd.fuse_wire import (
    UNANSWERED,
    Connection,
    Opcode,
    Question,
    directory_page,
    entry,
    greeting,
    lasting_attributes,
    statistics,
    wanted_range,
)
from hostd.lower_contents import Contents, Read

ROOT = 1
SERVING_THREADS = 8
"""They answer what is here, and wait for the local disk only."""
READ_AHEAD_KIB = 512
KIND = "cargo"
LOG_FILE = "lower.log"
MAX_LOG_BYTES = 1024 * 1024
MAX_OPEN_FILES = 65536
REVIVAL_SECONDS = 0.05
"""Before a server that died is replaced; more when it dies again at once, so that no processor is eaten."""
LONGEST_REVIVAL_SECONDS = 5.0
LOOK_SECONDS = 0.5
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class Listing:
    """The tree that the list of placeholders makes. Nodes are numbered: 1 is the root, then files, then directories."""

    def __init__(self, holders: list[tuple[bytes, int]]) -> None:
        self.paths: list[bytes] = [b"", b""]
        self.sizes: list[int] = [-1, -1]
        """Negative for a directory."""
        self.numbers: dict[bytes, int] = {b"": ROOT}
        self._entries: dict[int, list[tuple[bytes, int, bool]]] | None = None
        for path, size in holders:
            if path not in self.numbers:
                self._add(path, size)
        for path, _ in holders:
            above = os.path.dirname(path)
            while above not in self.numbers:
                self._add(above, -1)
                above = os.path.dirname(above)

    def _add(self, path: bytes, size: int) -> None:
        self.numbers[path] = len(self.paths)
        self.paths.append(path)
        self.sizes.append(size)

    def child(self, number: int, name: bytes) -> int | None:
        """The node of this name in a directory."""
        path = self.paths[number]
        return self.numbers.get(path + b"/" + name if path else name)

    def entries(self, number: int) -> list[tuple[bytes, int, bool]]:
        """What is directly in a directory: name, node, whether it is a directory."""
        if self._entries is None:
            below: dict[int, list[tuple[bytes, int, bool]]] = {}
            for child in range(ROOT + 1, len(self.paths)):
                parent, name = os.path.split(self.paths[child])
                below.setdefault(self.numbers[parent], []).append((name, child, self.sizes[child] < 0))
            self._entries = below
        return [(b".", number, True), (b"..", ROOT, True), *self._entries.get(number, [])]


_NOTHING_YET = Listing([])


def mark_of(status: os.stat_result) -> int:
    """A number that tells one version of the list from another; never 0. ``statvfs`` shows it as ``f_ffree``."""
    return hash((status.st_ino, status.st_mtime_ns, status.st_size)) & 0x7FFF_FFFF_FFFF_FFFF or 1


class Lower:
    """Answers the kernel's questions, from several threads."""

    def __init__(
        self,
        stage: bytes,
        connection: Connection,
        pending: Pending,
        contents: Contents,
        log: Callable[[str], None],
    ) -> None:
        self._log = log
        self._list = os.path.join(stage, b"placeholders")
        self._connection = connection
        self._pending = pending
        self._contents = contents
        self._listing: Listing | None = None
        self._mark = 0
        self._lock = threading.Lock()
        self._answers: dict[int, Callable[[Question], None]] = {
            Opcode.LOOKUP: self._look_up,
            Opcode.GETATTR: self._describe,
            Opcode.READ: self._read,
            Opcode.READDIR: self._list_directory,
            Opcode.STATFS: self._count,
            Opcode.INIT: lambda question: connection.answer(question, greeting(question)),
            Opcode.DESTROY: connection.answer,
        }

    def take_over(self) -> None:
        """Answer what a server before this one was asked and may not have answered."""
        for question in self._pending.left_over():
            self._answer(question)

    def serve(self, area: memoryview) -> None:
        """Answer until the file system is unmounted. ``area`` is this thread's, to receive questions in."""
        clear(area)
        while (question := self._connection.ask(area)) is not None:
            self._answer(question)
            clear(area)

    def _answer(self, question: Question) -> None:
        """Have it answered, now or later; then it is kept until it is."""
        answer = self._answers.get(question.opcode)
        if question.opcode in UNANSWERED:
            self._pending.forget(question)
            return
        try:
            if answer is None:
                self._connection.fail(question, errno.ENOSYS)
            else:
                answer(question)
        except (OSError, ValueError, LookupError, struct.error) as error:
            self._log(f"question {question.opcode} about node {question.node} failed: {error!r}")
            self._connection.fail(question, error.errno or errno.EIO if isinstance(error, OSError) else errno.EIO)
        else:
            if question.opcode == Opcode.READ:
                return
        self._pending.forget(question)

    def _loaded(self) -> Listing:
        if self._listing is not None:
            return self._listing
        with self._lock:
            if self._listing is None:
                try:
                    with open(self._list, "rb") as file:
                        data = file.read()
                        self._mark = mark_of(os.fstat(file.fileno()))
                except FileNotFoundError:
                    return _NOTHING_YET
                try:
                    # The fields of federation's record, of which path and size matter here.
                    records = msgspec.msgpack.decode(data, type=list[tuple[bytes, int, int, bytes]])
                except msgspec.MsgspecError as error:
                    raise OSError(errno.EIO, "the list of placeholders cannot be understood") from error
                self._listing = Listing([(path, size) for path, size, _, _ in records])
            return self._listing

    def _look_up(self, question: Question) -> None:
        listing = self._loaded()
        child = listing.child(question.node, question.body.rstrip(b"\0"))
        if child is None:
            self._connection.fail(question, errno.ENOENT)
        else:
            self._connection.answer(question, entry(child, listing.sizes[child]))

    def _describe(self, question: Question) -> None:
        # The root is the same whatever the list says, and looking at it, as every tool does, must not fix the list.
        listing = _NOTHING_YET if question.node == ROOT else self._loaded()
        self._connection.answer(question, lasting_attributes(question.node, listing.sizes[question.node]))

    def _count(self, question: Question) -> None:
        listing = self._listing or _NOTHING_YET
        self._connection.answer(question, statistics(len(listing.paths), self._mark))

    def _list_directory(self, question: Question) -> None:
        listing = self._loaded()
        self._connection.answer(question, directory_page(listing.entries(question.node), *wanted_range(question)))

    def _read(self, question: Question) -> None:
        listing = self._loaded()
        offset, length = wanted_range(question)
        size = listing.sizes[question.node]
        length = max(0, min(length, size - offset))

        def finished(data: bytes | None) -> None:
            if data is None:
                self._connection.fail(question, errno.EIO)
            else:
                self._connection.answer(question, data)
            self._pending.forget(question)

        self._pending.keep(question)
        self._contents.read(Read(listing.paths[question.node], size, offset, length, finished))


def _logger(stage: bytes) -> Callable[[str], None]:
    file = os.path.join(stage, os.fsencode(LOG_FILE))
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.fstat(descriptor).st_size > MAX_LOG_BYTES:
        os.ftruncate(descriptor, 0)

    def log(words: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError):  # a full disk must not stop the reads
            os.write(descriptor, f"{now} {words}\n".encode(errors="backslashreplace"))

    return log


def _become_a_daemon() -> None:
    """The calling process ends with 0; a child of it, in a session of its own, returns."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_OPEN_FILES), hard))
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for file, text in (("comm", "cargo-lower"), ("oom_score_adj", "-900")):
        # When memory is short, what a running container reads its data through should go last.
        with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as setting:
            setting.write(text)


def _read_ahead_more(mountpoint: bytes) -> None:
    """Ask the kernel to read ahead further than its 128 KiB, which makes each question worth more. Saves time only."""
    device = os.stat(mountpoint).st_dev
    setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError), open(setting, "w") as file:
        file.write(str(READ_AHEAD_KIB))


def _serve(stage: bytes, connection: Connection, pending: Pending, patience_seconds: float) -> None:
    """Serve until unmounted."""
    log = _logger(stage)
    contents = Contents(stage, patience_seconds=patience_seconds, log=log)
    lower = Lower(stage, connection, pending, contents, log)
    lower.take_over()
    threads = [threading.Thread(target=lower.serve, args=(area,), daemon=True) for area in pending.areas]
    for thread in threads:
        thread.start()
    threading.Thread(target=contents.watch, daemon=True).start()
    _read_ahead_more(os.path.join(stage, b"lower"))
    for thread in threads:
        thread.join()


def _hold(serve: Callable[[], None], log: Callable[[str], None]) -> None:
    """Have it served by a child of this process, and by another one when that dies, until it is unmounted."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    pause_seconds = REVIVAL_SECONDS
    while True:
        began = time.monotonic()
        server = os.fork()
        if server == 0:
            code = 1
            try:
                serve()
                code = 0
            except Exception as error:
                log(f"the server failed: {error!r}")
            finally:
                os._exit(code)  # at once: a worker may still wait for a source that hangs
        ended = _end_of(server)
        if ended == 0:
            return
        lived_seconds = time.monotonic() - began
        pause_seconds = REVIVAL_SECONDS if lived_seconds > 60 else min(pause_seconds * 2, LONGEST_REVIVAL_SECONDS)
        log(f"the server ended ({ended}); readers wait for the next one")
        time.sleep(pause_seconds)


def _end_of(server: int) -> int | None:
    """Wait until a child serves no more; its exit code, or None when threads of it still hang below the source's view.

    A read of a source that is silent cannot be killed before its view is, and neither can its thread. All others have
    ended by then, and so a new server can begin.
    """
    while True:
        done, status = os.waitpid(server, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        with open(f"/proc/{server}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[0] == b"Z":
                return None
        signal.sigtimedwait([signal.SIGCHLD], LOOK_SECONDS)


def main(arguments: list[str]) -> None:
    """Mount, and let the calling process end; serve until unmounted. Raises OSError when it cannot be mounted."""
    stage, source, patience, *handed = arguments
    raw = os.fsencode(stage)
    log = _logger(raw)
    if handed:
        device, memory = (int(word.partition("=")[2]) for word in handed)
        os.set_inheritable(device, False)
        os.set_inheritable(memory, False)
        connection, pending = Connection(device), Pending(SERVING_THREADS, memory)
        log("both processes were gone; the agent has started them anew")
    else:
        pending = Pending(SERVING_THREADS)
        connection = Connection.mount(source.removeprefix("fsname="), KIND, os.path.join(raw, b"lower"))
    _become_a_daemon()
    patience_seconds = float(patience.removeprefix("patience="))
    _hold(lambda: _serve(raw, connection, pending, patience_seconds), log)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        os._exit(1)
    os._exit(0)
