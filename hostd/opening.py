"""What a migration needs of its source later, being opened beside whatever else there is to do before.

A view takes most of a second, most of it key exchanges of SSH, and nothing but the stop needs it: so it is begun as soon as there is
a place for it, and waited for right before the stop (``hostd/effects/open_views.py``, ``attach_remote.py``). So is the
connection, while the source prepares (``connect_source.py``).

It must never outlive its migration's part on this host: ``call_off`` waits until nothing is being mounted any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from events.errors import CancelledError

LOOK_AGAIN_SECONDS = 0.05


class Opening:
    """One migration's views or connection, on their way. It ends with the process; after a crash what is open is found again."""

    def __init__(
        self, migration: str, attach: Callable[[threading.Event], None], detach: Callable[[], None] = lambda: None
    ) -> None:
        """``attach`` opens them all, harmlessly repeated, and looks at its event between what it does. Begins at once.

        ``detach`` takes down what has been opened.
        """
        self._attach, self._detach = attach, detach
        self._called_off = threading.Event()
        self.failure: Exception | None = None
        """Why it ended early; known once it has ended."""
        self._thread = threading.Thread(target=self._run, name=f"open:{migration}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, good or bad."""
        return not self._thread.is_alive()

    def wait(self, check: Callable[[], None]) -> None:
        """Until it has ended. ``check`` is called often and may raise."""
        while not self.ended:
            check()
            self._thread.join(LOOK_AGAIN_SECONDS)

    def call_off(self, timeout_seconds: float | None = None) -> None:
        """End it, and wait until it does nothing any more, or so long.

        A peer that does not answer takes it half a minute to give up at worst (``hostd/transport.py``).
        """
        self._called_off.set()
        self._thread.join(timeout_seconds)

    def close(self, timeout_seconds: float) -> None:
        """As ``call_off``, and take down what is open already, which nothing stands on yet. Raises CargoError."""
        self.call_off(timeout_seconds)
        if self.ended:
            self._detach()

    def _run(self) -> None:
        try:
            self._attach(self._called_off)
        except CancelledError:
            pass
        except Exception as error:
            self.failure = error
