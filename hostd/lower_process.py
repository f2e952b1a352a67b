"""Starting, finding and ending the process that serves a union's lower layer (``hostd/lower.py``).

It lives as long as its mount, whatever becomes of the agent. What it must never do: end a server while the union
above it is, or may be, mounted: the container would read errors.

Stands between ``hostd/federation.py`` and the server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from events.errors import PermanentError, TransientError
from hostd import mounts
from hostd.lower import mark_of
from hostd.process import run
from hostd.settings import PATIENCE_SECONDS

START_TIMEOUT_SECONDS = 30
END_SECONDS = 5.0
ANSWER_SECONDS = 5.0
_MODULE = b"hostd.lower"


class LowerProcess:
    """The lower layer of one stage. Stateless: everything is found by looking."""

    def __init__(self, stage: Path, name: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """``name`` is the file system's source name in the mount table, unique to the stage."""
        self.mountpoint = stage / "lower"
        self._stage = stage
        self._name = name
        self._patience_seconds = patience_seconds

    def serves(self) -> bool:
        """Whether it is mounted and answers. Asked in a child, because a dead one may hang whoever looks."""
        record = mounts.mount_at(self.mountpoint)
        if record is None or record.source != self._name.encode():
            return False
        # The kernel remembers attributes of a dead one for good, but always asks for a file system's.
        done = run(["stat", "--file-system", "--", str(self.mountpoint)], timeout_seconds=ANSWER_SECONDS)
        return done is not None and done.returncode == 0

    def has_looked_elsewhere(self, placeholders: Path) -> bool:
        """Whether it serves another list than this one: somebody looked into it too early. Ask after ``serves``."""
        mark = os.statvfs(self.mountpoint).f_ffree
        return mark not in {0, mark_of(placeholders.stat())}

    def start(self) -> None:
        """Mount and serve, with whatever list of placeholders is there when the first file is looked up.

        Raises PermanentError with the reason when this host cannot.
        """
        # -P: the agent's working directory is no place to find modules in.
        command: list[str | bytes] = [sys.executable, "-P", "-m", _MODULE.decode(), str(self._stage)]
        command += [f"fsname={self._name}", f"patience={self._patience_seconds:g}"]
        done = run(command, timeout_seconds=START_TIMEOUT_SECONDS)
        if done is None:
            raise TransientError(f"the lower layer did not come up on {self.mountpoint}; it can be tried again")
        if done.returncode != 0 or not mounts.is_mounted(self.mountpoint):
            words = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise PermanentError(
                f"the lower layer could not be mounted on {self.mountpoint}: {words or 'no reason given'}. "
                "Nothing has changed; see that /dev/fuse is there and the fuse module loaded."
            )

    def end(self) -> None:
        """End the server and unmount. Only when no union stands on it. Harmless when there is neither.

        The server goes first: a read that waits for a source which is not there would hold the unmount up.
        Raises TransientError when somebody else has it in use.
        """
        processes = self.processes()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        mounts.unmount(self.mountpoint)

    def processes(self) -> list[int]:
        """The living servers of this stage: one, or none."""
        found = []
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if _MODULE in words and f"fsname={self._name}".encode() in words:
                    found.append(int(name))
        return found

    def wait_until_ended(self, processes: list[int]) -> None:
        """Raises TransientError when one of them lives on for too long."""
        if alive := mounts.wait_until_gone(processes, timeout_seconds=END_SECONDS):
            raise TransientError(
                f"the server of {self.mountpoint} (pid {alive[0]}) has not ended yet; it can be tried again"
            )
