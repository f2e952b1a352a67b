"""Whether this host's rsync can go on with a file that it has a part of. Some cannot, and crash.

The security fixes of January 2025, as 3.4.0, 3.4.1 and the stable distributions have them (Debian 12's 3.2.7 among them), keep
the receiver from opening a part that lies in a ``--partial-dir`` of an absolute path. The sender then refers to data
that the receiver does not have: with ``--sparse`` it dies of it, at each attempt anew (RsyncProject/rsync#715, #722). The version
says nothing, since the fix of the fix travels the same ways, so it is tried out on a small file.

What it must never do: touch anything but a directory of its own, or fail a transfer: in doubt files begin anew.

Asked by ``hostd/transport.py`` before a transfer gets a ``--partial-dir``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

from hostd.process import run

TRIAL_SECONDS = 30.0
"""A few hundredths of a second, but an emulated machine needs seconds."""
_FILE_BYTES = 4096
_PART_BYTES = 2800
"""Four of the blocks that rsync compares a file of this size by."""


class Resumption:
    """The answer for the rsync that is installed now; safe to ask from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[str, int, int], bool] = {}

    def possible(self, run_dir: Path) -> bool:
        """Whether a ``--partial-dir`` is of use. Tried once for each rsync that is put there; ``run_dir`` is private."""
        program = shutil.which("rsync")
        if program is None:
            return False  # the transfer itself will say so
        with self._lock:
            status = os.stat(program)
            key = program, status.st_ino, status.st_mtime_ns
            if key not in self._known:
                self._known[key] = _tried(run_dir)
            return self._known[key]


def _tried(run_dir: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix=".resumption-", dir=run_dir) as directory:
            return _goes_on(Path(directory))
    except OSError:
        return False


def _goes_on(place: Path) -> bool:
    source, destination, parts = place / "source", place / "destination", place / "parts"
    for made in (source, destination, parts):
        made.mkdir()
    content = os.urandom(_FILE_BYTES)
    (source / "file").write_bytes(content)
    (parts / "file").write_bytes(content[:_PART_BYTES])
    command = [
        "rsync",
        "-a",
        "--sparse",
        "--no-whole-file",
        f"--partial-dir={parts}",
        "--",
        f"{source}/",
        f"{destination}/",
    ]
    done = run(command, timeout_seconds=TRIAL_SECONDS)
    arrived = destination / "file"
    return done is not None and done.returncode == 0 and arrived.is_file() and arrived.read_bytes() == content
