"""Gates: where a container's start waits, all but done, until the agent says the word.

The other half is ``hostd/runtime/cargo-runc``, the OCI runtime that waits. A gate is a directory named after the
container, with a FIFO for the runtime's ``start``, and for as long as it exists the container cannot start without
a word. So a gate is never removed while a start may be under way, only shut: a gate that nobody opens, whose agent
died, or whose host went down, never lets the process run.

It must never decide whether a gate may be opened: that is ``hostd/effects/start_container.py``, after the claim.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from events.errors import TransientError
from hostd.ending import kill
from hostd.mounts import process_of, processes_of

RUNTIME = "cargo"
"""The name under which dockerd knows the runtime."""
PLAIN_RUNTIME = "runc"
"""What it is behind its gate."""
GATES = Path("/run/cargo/gates")
"""The runtime looks here; it knows no configuration. Root's alone, and gone with a reboot."""
END_SECONDS = 10.0
"""How long a killed process may take to end."""
FIFO, PID_FILE, WAITING, SHUT = "start", "pidfile", "waiting", "shut"


class Gate:
    """The gate of one container."""

    def __init__(self, container_id: str, gates: Path = GATES) -> None:
        self.directory = gates / container_id
        self._held: int | None = None

    def make(self) -> None:
        """Make the gate, closed; before Docker is asked for the start.

        It is held open for writing: should this process die, what waits there reads an end, and is refused.
        """
        self.remove()
        self.directory.mkdir(mode=0o700, parents=True)
        os.mkfifo(self.directory / FIFO, 0o600)
        self._held = os.open(self.directory / FIFO, os.O_RDWR | os.O_CLOEXEC)

    @property
    def waiting(self) -> bool:
        """The container's start has come to the gate, and waits there."""
        return (self.directory / WAITING).exists()

    @property
    def pid_file(self) -> Path | None:
        """Where the runtime was told to put the container's first process; None before its ``create``."""
        try:
            text = (self.directory / PID_FILE).read_text(encoding="utf-8").strip()
        except OSError:
            return None
        return Path(text) if text.startswith("/") else None

    def open(self) -> None:
        """Let the process run that waits here."""
        assert self._held is not None, "only who made the gate opens it"
        os.write(self._held, b"open")

    def shut(self) -> None:
        """Refuse whatever waits here or comes here; the gate stays until ``remove``.

        First the mark, then the word: the runtime opens the FIFO before it looks for the mark.
        """
        if not self.directory.is_dir():
            return
        (self.directory / SHUT).touch(mode=0o600)
        self._let_go()
        with contextlib.suppress(OSError):  # ENXIO: nobody waits
            fd = os.open(self.directory / FIFO, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(fd, b"shut")
            finally:
                os.close(fd)

    def end_process(self) -> None:
        """Kill the container's first process, which waits for the runtime's ``start`` and has run nothing; once the gate is shut.

        The runtime does that itself, unless it was killed with the Docker that waited for it. Then a Docker that is started
        anew may not know of the process, nor that it had mounted anything for it. Harmless when there is none.
        """
        pid_file = self.pid_file
        if pid_file is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it has ended, and with it the file or the process
            _kill(int(pid_file.read_text(encoding="utf-8")), self.directory.name)

    def remove(self) -> None:
        """Away with the gate. Only once Docker has ended the start: a later one is not held back."""
        self._let_go()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def end_forgotten(container_id: str) -> None:
    """Kill what runs in the control group of a container of which Docker says that it does not run.

    A Docker that was killed in the middle of a start may not know of the process, which would go on beside the next one.
    Raises TransientError when it does not end.
    """
    deadline = time.monotonic() + END_SECONDS
    while left := processes_of(container_id):
        if time.monotonic() > deadline:
            raise TransientError(
                f"processes of the container {container_id[:12]} do not end, although Docker says that it does not run: {left}"
            )
        for pid in left:
            _kill(pid, container_id)


def _kill(pid: int, container_id: str) -> None:
    kill(pid, lambda: process_of(pid, container_id), timeout_seconds=END_SECONDS)


def left_gates(gates: Path = GATES) -> list[str]:
    """Containers with a gate of an earlier life of this process."""
    return sorted(entry.name for entry in gates.iterdir()) if gates.is_dir() else []
