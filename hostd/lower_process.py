"""Starting, finding and ending the process that serves a union's lower layer (``hostd/lower.py``).

It lives as long as its mount, whatever becomes of the agent. The agent keeps its descriptors as well, so that the file
system outlives the death of all who serve it: readers wait until the agent has started new ones. What it must never do: end a server while the union
above it is, or may be, mounted: the container would read errors.

Stands between ``hostd/federation.py`` and the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from events.errors import PermanentError, TransientError
from hostd import fuse_pending, mounts
from hostd.lower import mark_of
from hostd.process import run
from hostd.settings import PATIENCE_SECONDS

START_TIMEOUT_SECONDS = 30
END_SECONDS = 5.0
ANSWER_SECONDS = 5.0
_MODULE = b"hostd.lower"


_DEVICE = b"/dev/fuse"
_MEMORY = b"/memfd:" + os.fsencode(fuse_pending.NAME)
_PIDFD_GETFD = 438
"""The system call's number, the same on every architecture (Linux 5.6)."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Kept:
    device: int
    pending: int

    def close(self) -> None:
        os.close(self.device)
        os.close(self.pending)


_KEPT: dict[str, _Kept] = {}
"""This process's descriptors of lower layers, by their names. They make it possible to go on, and decide nothing."""
_SERVERS: dict[str, list[int]] = {}
"""Who served it when somebody last looked; never believed without looking at them again."""
_KEEPING = threading.Lock()


class LowerProcess:
    """The lower layer of one stage. Everything is found by looking, but for the descriptors that are kept."""

    def __init__(self, stage: Path, name: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """``name`` is the file system's source name in the mount table, unique to the stage."""
        self.mountpoint = stage / "lower"
        self._stage = stage
        self._name = name
        self._patience_seconds = patience_seconds

    def serves(self) -> bool:
        """Whether it is mounted and answers. Asked in a child, because a dead one may hang whoever looks."""
        if not self._is_mounted():
            return False
        # The kernel remembers attributes of a dead one for good, but always asks for a file system's.
        done = run(["stat", "--file-system", "--", str(self.mountpoint)], timeout_seconds=ANSWER_SECONDS)
        return done is not None and done.returncode == 0

    def given_up(self) -> bool:
        """Whether it is mounted and the kernel answers for it, with an error: nobody holds its descriptor any more.

        Not so while a server is being started: then the question waits.
        """
        if not self._is_mounted() or self.processes():
            return False
        done = run(["stat", "--file-system", "--", str(self.mountpoint)], timeout_seconds=ANSWER_SECONDS)
        return done is not None and done.returncode != 0

    def has_looked_elsewhere(self, placeholders: Path) -> bool:
        """Whether it serves another list than this one: somebody looked into it too early. Ask after ``serves``."""
        mark = os.statvfs(self.mountpoint).f_ffree
        return mark not in {0, mark_of(placeholders.stat())}

    def start(self) -> None:
        """Mount and serve, with whatever list of placeholders is there when the first file is looked up.

        Raises PermanentError with the reason when this host cannot.
        """
        done = self._run()
        if done is None:
            raise TransientError(f"the lower layer did not come up on {self.mountpoint}; it can be tried again")
        if done.returncode != 0 or not mounts.is_mounted(self.mountpoint):
            words = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise PermanentError(
                f"the lower layer could not be mounted on {self.mountpoint}: {words or 'no reason given'}. "
                "Nothing has changed; see that /dev/fuse is there and the fuse module loaded."
            )

    def _run(self, kept: _Kept | None = None) -> subprocess.CompletedProcess[bytes] | None:
        # -P: the agent's working directory is no place to find modules in.
        command: list[str | bytes] = [sys.executable, "-P", "-m", _MODULE.decode(), str(self._stage)]
        command += [f"fsname={self._name}", f"patience={self._patience_seconds:g}"]
        if kept is not None:
            command += [f"device={kept.device}", f"pending={kept.pending}"]
        passed = () if kept is None else (kept.device, kept.pending)
        return run(command, timeout_seconds=START_TIMEOUT_SECONDS, pass_fds=passed)

    def keep(self) -> bool:
        """See that it survives: keep its descriptors, and start it anew with them if nobody serves it any more.

        Returns whether it had to be started. Harmless when there is nothing to keep. Does not wait for an answer.
        """
        with _KEEPING:
            if not self._is_mounted():
                self._let_go()
                return False
            kept = _KEPT.get(self._name)
            processes = self._known() or self.processes()
            _SERVERS[self._name] = processes
            if processes:
                if kept is None and (taken := _descriptors_of(processes[0])) is not None:
                    _KEPT[self._name] = taken
                return False
            if kept is None:
                return False
            done = self._run(kept)
            return done is not None and done.returncode == 0

    def _known(self) -> list[int]:
        """Those found last time that still serve. To look at every process of the host takes a while."""
        return [pid for pid in _SERVERS.get(self._name, ()) if self._is_server(pid)]

    def _let_go(self) -> None:
        _SERVERS.pop(self._name, None)
        kept = _KEPT.pop(self._name, None)
        if kept is not None:
            kept.close()

    def _is_mounted(self) -> bool:
        record = mounts.mount_at(self.mountpoint)
        return record is not None and record.source == self._name.encode()

    def end(self) -> None:
        """End the server and unmount. Only when no union stands on it. Harmless when there is neither.

        The server goes first: a read that waits for a source which is not there would hold the unmount up.
        Raises TransientError when somebody else has it in use.
        """
        with _KEEPING:
            self._let_go()
            deadline = time.monotonic() + END_SECONDS
            while processes := self.processes():  # one of them may just have started another
                for pid in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                mounts.wait_until_gone(processes, timeout_seconds=END_SECONDS)
                if time.monotonic() > deadline:
                    break
            mounts.unmount(self.mountpoint)

    def processes(self) -> list[int]:
        """Who serves this stage, alive: the server and the one that holds for it; or nobody."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and self._is_server(int(name)):
                found.append(int(name))
        return found

    def _is_server(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return _MODULE in words and f"fsname={self._name}".encode() in words

    def wait_until_ended(self, processes: list[int]) -> None:
        """Raises TransientError when one of them lives on for too long."""
        if alive := mounts.wait_until_gone(processes, timeout_seconds=END_SECONDS):
            raise TransientError(
                f"the server of {self.mountpoint} (pid {alive[0]}) has not ended yet; it can be tried again"
            )


def _descriptors_of(pid: int) -> _Kept | None:
    """Copies of a server's descriptors; None where the kernel does not allow that, or it has just ended."""
    found: dict[bytes, int] = {}
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        for name in os.listdir(b"/proc/%d/fd" % pid):
            what = os.readlink(b"/proc/%d/fd/%s" % (pid, name)).removesuffix(b" (deleted)")
            if what in {_DEVICE, _MEMORY} and what not in found:
                copy = _libc.syscall(_PIDFD_GETFD, process, int(name), 0)
                if copy >= 0:
                    found[what] = copy
    except OSError:
        pass  # it has ended meanwhile
    finally:
        os.close(process)
    if found.keys() == {_DEVICE, _MEMORY}:
        return _Kept(found[_DEVICE], found[_MEMORY])
    for descriptor in found.values():
        os.close(descriptor)
    return None
