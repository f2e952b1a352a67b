"""Wait on a condition, with a deadline. The only place of the lab that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable

from labkit.errors import LabError

PAUSE_SECONDS = 0.02


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Return once ``condition()`` holds. Raises LabError ``what`` + the time when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"{what} (waited {timeout_seconds:.0f} s)")
        time.sleep(PAUSE_SECONDS)
