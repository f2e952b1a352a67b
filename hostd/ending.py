"""The end of a container, seen in the kernel: its processes are gone some 100 ms before Docker has cleaned up and says so.

The first process of a pid namespace ends last: the kernel kills and waits for all others, whose files are closed by then, before
anybody can see its end (pid_namespaces(7)). What is left is Docker's own bookkeeping, networks and mounts, which changes no data.
Of that, only Docker's event ``die`` is waited for: whoever lays the events of two hosts side by side never sees two that run.

It must never take a process for a container's first that is not, nor let anybody see a container run whose processes have ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from events.errors import TransientError

if TYPE_CHECKING:
    from hostd.engine_calls import StopResult

PROC = Path("/proc")


class Ending:
    """A stop under way: Docker's answer comes in a thread of its own."""

    def __init__(self, stop: Callable[[], StopResult]) -> None:
        self._stop = stop
        self._answered = threading.Event()
        self._noted = threading.Event()
        """Docker has told everybody of the end, or has answered."""
        self._hears, self._tells = os.pipe2(os.O_CLOEXEC)
        self._result: StopResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ending", daemon=True)

    def first(self, process: int) -> bool:
        """Ask for the stop, and wait: True once ``process`` (a pidfd) has ended and Docker has told so, False if it answers before.

        To be called once. Where nobody listens to Docker's events (``told``), its answer is what is waited for.
        """
        self._thread.start()
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(self._hears, select.POLLIN)  # the other end is closed at the answer
        try:
            if process not in dict(poll.poll()):
                return False
            self._noted.wait()
            return not self._answered.is_set()
        finally:
            os.close(self._hears)

    def told(self) -> None:
        """Docker's event of the container's end has come."""
        self._noted.set()

    def result(self) -> StopResult:
        """Docker's answer, waited for. Raises what the stop raised."""
        self._answered.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self, timeout_seconds: float) -> bool:
        """Wait for Docker's answer, but not in the thread that asks for it. Returns whether it is there.

        Raises TransientError when it takes longer: nobody may think that the container runs, nor start it yet.
        """
        if threading.current_thread() is self._thread:
            return False
        if not self._answered.wait(timeout_seconds):
            raise TransientError(
                "Docker has not taken note of the container's end yet: none of its processes is left, its data is "
                "complete, and it is looked at again"
            )
        return True

    def _run(self) -> None:
        try:
            self._result = self._stop()
        except BaseException as error:
            self._error = error
        self._answered.set()
        self._noted.set()
        os.close(self._tells)


def watch_container(container_id: str, pid: int) -> int | None:
    """A descriptor (pidfd) that becomes readable when none of the container's processes is left.

    None when ``pid`` is not the first process of a pid namespace of that container's own, as this process sees it: its number
    was given away, the container shares another's namespace, or Docker counts processes in another one than this agent.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        # Asked after the descriptor was opened, so that all of it means the same process.
        if _is_first(pid) and is_of(container_id, pid):
            return process
    except OSError:
        pass
    os.close(process)
    return None


def _is_first(pid: int) -> bool:
    """Whether it is number 1 of a pid namespace beneath this process's own."""
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name == "NSpid":
            return len(numbers.split()) > 1 and numbers.split()[-1] == "1"
    return False


def is_of(container_id: str, pid: int) -> bool:
    """Docker calls a container's control groups by its id, whatever it makes them with. Raises OSError."""
    return container_id in (PROC / str(pid) / "cgroup").read_text()


def kill(pid: int, still: Callable[[], bool], *, timeout_seconds: float) -> None:
    """Kill the process if it is ``still`` the one that is meant, and wait until it has ended, or so long.

    ``still`` is asked once no other process can get its number. Harmless when it has ended.
    """
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            if still():
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], timeout_seconds)
        finally:
            os.close(process)
