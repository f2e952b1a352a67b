"""A daemon of the lab as an object: start, stop, kill, freeze, thaw, and where its log is.

Who the daemon is, is kept in a small file (pid and start time), so that any later process can handle it and a
reused pid is never mistaken for it. Everything that the lab starts carries its mark in the environment, which
lets ``down`` find it when such files are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal as signals
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.errors import LabError
from labkit.waiting import wait_until

MARK = "CARGO_LAB_MARK"
"""Environment variable whose value is the lab's directory."""

LAUNCH = Path(__file__).with_name("launch.py")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LOG_TAIL_LINES = 25


def clean_environment() -> dict[str, str]:
    """What every process of the lab starts with: nothing of the caller's (proxies, DOCKER_HOST, ETCD_…)."""
    return {
        "PATH": PATH,
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def started_ticks(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot; None when it does not live (a zombie does not)."""
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def process_state(pid: int) -> str | None:
    """One letter, as in proc(5); None when there is no such process."""
    fields = _stat_fields(pid)
    return None if fields is None else fields[0]


def launch(order: dict[str, Any]) -> int:
    """Have launch.py carry out an order; returns the pid. Raises LabError with its words."""
    # -I and -S: neither the caller's PYTHON… variables nor site-packages have a say in it.
    argv = [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(order)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {"error": done.stderr.strip() or "no answer"}
    if "pid" not in answer:
        raise LabError(f"could not start {order['argv'][0]}: {answer['error']}")
    return int(answer["pid"])


def read_record(record: Path) -> tuple[int, int] | None:
    """(pid, start ticks) as written by ``write_record``; None when absent or damaged."""
    try:
        fields = json.loads(record.read_text())
        return int(fields["pid"]), int(fields["started_ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(record: Path, pid: int) -> None:
    """Remember that ``pid`` is what ``record`` stands for."""
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"pid": pid, "started_ticks": started_ticks(pid) or 0}) + "\n")


def live_pid(record: Path) -> int | None:
    """The pid in ``record`` if that very process still lives."""
    known = read_record(record)
    if known is None or started_ticks(known[0]) != known[1]:
        return None
    return known[0]


class Process:
    """One daemon. ``env`` holds extra variables for its next start, for failpoints for example."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        record: Path,
        mark: str,
        cwd: str = "/",
        inside: Callable[[], int] | None = None,
        ready: Callable[[], bool] | None = None,
        ready_seconds: float = 30,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.log = log
        self.env: dict[str, str] = {}
        self._record = record
        self._mark = mark
        self._cwd = cwd
        self._inside = inside
        self._ready = ready
        self._ready_seconds = ready_seconds

    @property
    def pid(self) -> int | None:
        """As the machine sees it; None when it is not running."""
        return live_pid(self._record)

    @property
    def running(self) -> bool:
        """Whether it lives. A frozen process does."""
        return self.pid is not None

    @property
    def ready(self) -> bool:
        """Whether it lives and does its work."""
        return self.running and (self._ready is None or self._ready())

    def start(self, *, env: Mapping[str, str] | None = None, wait: bool = True) -> None:
        """Start unless it runs already. ``env`` is for this start only, on top of ``self.env``."""
        if not self.running:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            order: dict[str, Any] = {
                "kind": "start",
                "argv": self.argv,
                "env": clean_environment() | {MARK: self._mark} | self.env | dict(env or {}),
                "cwd": self._cwd,
                "log": str(self.log),
            }
            if self._inside is not None:
                order["inside"] = self._inside()
            write_record(self._record, launch(order))
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Return once it does its work. Raises LabError with the log's tail if it dies or takes too long."""

        def settled() -> bool:
            return not self.running or self._ready is None or self._ready()

        try:
            wait_until(settled, f"{self.name} is not ready", self._ready_seconds)
            trouble = "" if self.running else f"{self.name} ended right after its start"
        except LabError as error:
            trouble = str(error)
        if trouble:
            raise LabError(f"{trouble}; the end of {self.log}:\n{self.log_tail()}")

    def signal(self, number: int) -> None:
        """Send a signal. Raises LabError when it is not running."""
        pid = self.pid
        if pid is None:
            raise LabError(f"{self.name} is not running")
        os.kill(pid, number)

    def kill(self, signal: int = signals.SIGKILL, *, wait: bool = True, timeout_seconds: float = 30) -> None:
        """Send ``signal`` to it alone, not to its children; wait until it is gone. Harmless when it is."""
        known = self.pid
        if known is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(known, signal)
        if wait:
            wait_until(lambda: self.pid is None, f"{self.name} (pid {known}) did not end", timeout_seconds)

    def stop(self, timeout_seconds: float = 20) -> bool:
        """SIGTERM, wait, and SIGKILL if it took too long. Returns whether it ended by itself in time."""
        try:
            self.kill(signals.SIGTERM, timeout_seconds=timeout_seconds)
        except LabError:
            self.kill()
            return False
        return True

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP it (alone); returns once it stands still."""
        self.signal(signals.SIGSTOP)
        pid = self.pid
        wait_until(lambda: pid is None or process_state(pid) in {"T", None}, f"{self.name} goes on", 10)

    def thaw(self) -> None:
        """SIGCONT it."""
        self.signal(signals.SIGCONT)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def __repr__(self) -> str:
        return f"<Process {self.name} pid={self.pid}>"
