"""The data plane's processes: started without a shell, followed to their end, never left behind.

What it must never do: wait for ever, or let a transfer of an earlier life write where a new one begins.

Stands below ``hostd/transport.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from events.errors import CancelledError, TransientError
from hostd.stall import StallWatch

STOP_GRACE_SECONDS = 5.0
PROBE_GRACE_SECONDS = 0.2
LOCK_TIMEOUT_SECONDS = 30
MAX_STDERR_BYTES = 64 * 1024


class Running:
    """One rsync, in a session of its own, which ends when this agent does or when it is told to."""

    def __init__(self, command: list[str | bytes], *, lock: int | None, stall_seconds: float = 0.0) -> None:
        """``stall_seconds``: how long it may move next to nothing before ``follow`` gives it up; 0 for ever."""
        # If the agent is killed, a transfer must not go on writing behind the back of its next life.
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
        self._stderr = bytearray()
        self._stall_seconds = stall_seconds
        self.returncode = 0

    @property
    def stderr(self) -> str:
        return self._stderr.decode("utf-8", "replace")

    def collect(self, cancelled: threading.Event | None) -> bytes:
        output = bytearray()
        self.follow(output.extend, cancelled)
        return bytes(output)

    def follow(self, on_output: Callable[[bytes], None], cancelled: threading.Event | None) -> None:
        """Read both streams to their end.

        Raises CancelledError when told to stop and TransientError after a stall, with the process ended.
        """
        process = self._process
        watch = StallWatch(process.pid, self._stall_seconds, time.monotonic())
        assert process.stdout is not None and process.stderr is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ, on_output)
                selector.register(process.stderr, selectors.EVENT_READ, self._keep)
                while selector.get_map():
                    if cancelled is not None and cancelled.is_set():
                        raise CancelledError("the transfer was told to stop; what has arrived stays for the next one")
                    if self._stall_seconds and watch.stalled(time.monotonic()):
                        raise TransientError(
                            f"the transfer has moved nothing for {self._stall_seconds:.0f} s and was ended: the other side "
                            "may hang in a file that it was to read. What has arrived stays for the next attempt"
                        )
                    for key, _ in selector.select(timeout=0.1):
                        chunk = os.read(key.fd, 65536)
                        if chunk:
                            key.data(chunk)
                        else:
                            selector.unregister(key.fileobj)
            self.returncode = process.wait()
        finally:
            stop(process)
            process.stdout.close()
            process.stderr.close()

    def _keep(self, chunk: bytes) -> None:
        self._stderr += chunk[: MAX_STDERR_BYTES - len(self._stderr)]


def stop(process: subprocess.Popen[bytes], *, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
    """End a process and its session. Harmless when it has ended.

    A process that waits for a dead FUSE mount cannot be killed before the mount is: it is left to end by itself.
    """
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_seconds)
            return


def run(
    command: list[str] | list[str | bytes],
    *,
    timeout_seconds: float,
    working_directory: Path | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[bytes] | None:
    """Run a short command to its end; None when it had to be killed. A daemon that it becomes goes on."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            cwd=working_directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment(),
            start_new_session=True,
            pass_fds=pass_fds,
        )
        try:
            code = process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            stop(process, grace_seconds=PROBE_GRACE_SECONDS)
            return None
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, b"", stderr.read(MAX_STDERR_BYTES))


def environment() -> dict[str, str]:
    """Messages in one language, and nothing of the caller's own ssh or rsync habits."""
    ignored = ("SSH_", "RSYNC_", "LC_", "LANG", "DISPLAY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    return {**kept, "LC_ALL": "C"}


@contextlib.contextmanager
def destination_lock(
    run_dir: Path, destination: Path, cancelled: threading.Event | None, *, stream: int = 0
) -> Iterator[int]:
    """One transfer at a time into one destination, across lives of this agent; or one of each ``stream``'s number.

    rsync inherits the descriptor, so the lock lasts until its last process has ended, whoever started it.
    """
    name = hashlib.sha256(os.fsencode(destination.absolute())).hexdigest()[:16] + (f"-{stream}" if stream else "")
    descriptor = os.open(run_dir / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError("the transfer was told to stop before it began") from error
                if time.monotonic() > deadline:
                    raise TransientError(f"another transfer into {destination} is still running") from error
                time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)
