"""The end of a container, seen in the kernel: its processes are gone some 100 ms before Docker has cleaned up and says so.

The first process of a pid namespace ends last: the kernel kills and waits for all others before anybody can see its end
(pid_namespaces(7)). What is left then is Docker's own bookkeeping, networks and mounts, which changes no data.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostd.engine_calls import StopResult

CGROUPS = "/proc/{pid}/cgroup"
"""Docker calls a container's control groups by its id, whatever it makes them with."""


class Ending:
    """A stop under way: Docker's answer comes in a thread of its own."""

    def __init__(self, stop: Callable[[], StopResult]) -> None:
        self._stop = stop
        self._answered = threading.Event()
        self._hears, self._tells = os.pipe2(os.O_CLOEXEC)
        self._result: StopResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ending", daemon=True)

    def first(self, process: int) -> bool:
        """Ask for the stop, and wait: True once ``process`` (a pidfd) has ended, False if Docker answers before.

        To be called once.
        """
        self._thread.start()
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(self._hears, select.POLLIN)  # the other end is closed at the answer
        try:
            return process in dict(poll.poll())
        finally:
            os.close(self._hears)

    def result(self) -> StopResult:
        """Docker's answer, waited for. Raises what the stop raised."""
        self._answered.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self) -> None:
        """Return once Docker has answered; at once in the thread that asks it."""
        if threading.current_thread() is not self._thread:
            self._answered.wait()

    def _run(self) -> None:
        try:
            self._result = self._stop()
        except BaseException as error:
            self._error = error
        self._answered.set()
        os.close(self._tells)


def watch_container(container_id: str, pid: int) -> int | None:
    """A descriptor (pidfd) that becomes readable at the end of the container's first process.

    None when ``pid`` is not a process of that container, or not in this process's view: it has ended and its number was
    given away, or Docker counts processes in another namespace than this one.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        # Asked after the descriptor was opened, so that both mean the same process.
        if container_id in Path(CGROUPS.format(pid=pid)).read_text():
            return process
    except OSError:
        pass
    os.close(process)
    return None
