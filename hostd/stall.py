"""Whether a transfer still moves anything.

rsync's own ``--timeout`` does not always tell: the receiving side sends the other one a sign of life every half of it, and
takes its own writing for progress. A sender that hangs (in a FIFO that took a file's place between a look and the opening, on a
disk that does not answer) is so waited for without end. So what the transfer's processes read and write here is
looked at from outside; signs of life are too few bytes to count. What it must never do: end anything, which is for its user.

Stands below ``hostd/process.py``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

LEAST_BYTES = 32 * 1024
"""In the time allowed. Signs of life are some hundred bytes a minute; the slowest link of use moves a hundred times as much."""
LOOKS = 8
"""In the time allowed: looking costs little, but not nothing."""


class StallWatch:
    """Of one process and all below it. ``allowed_seconds``: how long so little may move."""

    def __init__(self, pid: int, allowed_seconds: float, now_seconds: float) -> None:
        self._pid = pid
        self._allowed_seconds = allowed_seconds
        self._moved = 0
        self._since = self._looked = now_seconds

    def stalled(self, now_seconds: float) -> bool:
        """Cheap when asked often."""
        if now_seconds - self._looked < self._allowed_seconds / LOOKS:
            return False
        self._looked = now_seconds
        moved = moved_bytes(self._pid)
        if moved is None:
            return False
        if not self._moved <= moved < self._moved + LEAST_BYTES:  # fewer: one of them has ended, which is a change, too
            self._moved, self._since = moved, now_seconds
        return now_seconds - self._since >= self._allowed_seconds


def moved_bytes(pid: int) -> int | None:
    """What the process and its living descendants have read and written so far, files, pipes and sockets alike.

    None when it has ended, or when the kernel does not tell of descendants.
    """
    if not Path(f"/proc/{pid}/task/{pid}/children").exists():
        return None
    total, waiting = 0, [pid]
    while waiting:
        place = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split(": ") for line in (place / "io").read_text().splitlines())
            total += int(counts["rchar"]) + int(counts["wchar"])
            for task in (place / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return total
