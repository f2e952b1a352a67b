"""The little that has not arrived at the stop, read whole through the open view of the source.

A union for two megabytes costs about what the megabytes cost, and everything that is read through it later costs more
than on a plain tree. So they are asked for first, for a moment; whatever has not come by then goes the other way.

What it must never do: hold up the stop window because the source does not answer, or give contents that are not the
file's. The view may hang, so only threads that nobody waits for touch it, and they touch nothing else.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from hostd.lower_contents import Remote
from hostd.remainder import AT_HAND_BYTES, AT_HAND_FILES

READERS = 3
"""As many as the view has connections."""
_STAGE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def read_at_hand(stage: Path, wanted: Iterable[tuple[bytes, int]], deadline: float) -> dict[bytes, bytes]:
    """Contents, by path, of those ``wanted`` (path and size) that came before ``deadline``, by ``time.monotonic``.

    ``stage`` has the view as ``remote``. The smallest come first, up to the amount that is at hand. Never raises because
    of the source; a file that has another size there, or cannot be read, is not among them.
    """
    jobs: queue.SimpleQueue[tuple[bytes, int]] = queue.SimpleQueue()
    left = AT_HAND_BYTES
    for path, size in sorted(wanted, key=lambda job: job[1])[:AT_HAND_FILES]:
        left -= size
        if left >= 0:
            jobs.put((path, size))
    answers: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
    readers = min(READERS, jobs.qsize())
    for number in range(readers):
        threading.Thread(
            target=_read, args=(stage, jobs, answers, deadline), name=f"at-hand:{number}", daemon=True
        ).start()
    contents: dict[bytes, bytes] = {}
    while readers:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if answer is None:
            readers -= 1
        else:
            contents[answer[0]] = answer[1]
    return contents


def _read(
    stage: Path,
    jobs: queue.SimpleQueue[tuple[bytes, int]],
    answers: queue.SimpleQueue[tuple[bytes, bytes] | None],
    deadline: float,
) -> None:
    def in_time() -> bool:
        return time.monotonic() < deadline

    try:
        at = os.open(stage, _STAGE)
        try:
            remote = Remote(at)
            while in_time():
                path, size = jobs.get_nowait()
                with contextlib.suppress(OSError):
                    contents = remote.read_whole(path, size, in_time)
                    if contents is not None:
                        answers.put((path, contents))
        finally:
            os.close(at)
    except (OSError, queue.Empty):
        pass
    finally:
        answers.put(None)
