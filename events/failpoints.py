"""Faults on demand: named points in the product where a tester makes it die, fail, wait or stop.

Syntax of a specification, as put to ``failpoints/<process>`` or given in ``CARGO_FAILPOINTS``:

    target.start_container:after_effect=kill; source.stop:before_event=delay(2)@3

    point=action[@n]     several are separated by semicolons; @n acts on the n-th pass only
    actions              kill | error(text) | delay(seconds) | pause

A point is ``<role>.<effect>:before_effect|after_effect`` or ``<role>.<step>:before_event|after_event``.
Unset, a pass costs one look into an empty dictionary.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from dataclasses import dataclass

import structlog

from events.errors import CargoError, TransientError

_SPEC = re.compile(
    r"(?P<point>[a-z_]+\.[a-z_]+:[a-z_]+)=(?P<action>[a-z]+)(\((?P<arg>[^()]*)\))?(@(?P<nth>[0-9]{1,9}))?"
)
MAX_DELAY_SECONDS = 7 * 24 * 3600.0
ENVIRONMENT_VARIABLE = "CARGO_FAILPOINTS"


@dataclass(frozen=True)
class Fault:
    """What happens at a point: ``nth`` 0 acts on every pass."""

    action: str
    argument: str
    nth: int


def parse(text: str) -> dict[str, Fault]:
    """The faults in a specification. Raises CargoError that quotes what cannot be understood."""
    faults: dict[str, Fault] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = _SPEC.fullmatch(part)
        if match is None or match["action"] not in {"kill", "error", "delay", "pause"}:
            raise CargoError(
                f"cannot understand the failpoint {part[:120]!r}; "
                "write point=kill, point=error(text), point=delay(seconds) or point=pause, with @n at will"
            )
        if match["action"] == "delay":
            try:
                seconds = float(match["arg"] or "")
            except ValueError:
                seconds = -1.0
            if not 0 <= seconds <= MAX_DELAY_SECONDS:  # not a number is not within them either
                raise CargoError(
                    f"the failpoint {part[:120]!r} needs a number of seconds from 0 to {MAX_DELAY_SECONDS:.0f}"
                )
        faults[match["point"]] = Fault(match["action"], match["arg"] or "", int(match["nth"] or 0))
    return faults


class Failpoints:
    """The faults in force in this process."""

    def __init__(self, text: str = "") -> None:
        self._lock = threading.Lock()
        self._faults = parse(text)
        self._passes: dict[str, int] = {}
        self._changed = threading.Event()

    @classmethod
    def from_environment(cls) -> Failpoints:
        """The faults that ``CARGO_FAILPOINTS`` asks for."""
        return cls(os.environ.get(ENVIRONMENT_VARIABLE, ""))

    def set(self, text: str) -> None:
        """Replace the faults in force; whoever waits at a ``pause`` looks again."""
        faults = parse(text)
        with self._lock:
            self._faults = faults
            self._passes.clear()
        self._changed.set()

    def hit(self, point: str) -> None:
        """Pass ``point``. May raise TransientError, wait, or end the process on the spot."""
        fault = self._faults.get(point)
        if fault is None:
            return
        with self._lock:
            self._passes[point] = self._passes.get(point, 0) + 1
            if fault.nth and self._passes[point] != fault.nth:
                return
        # Said before it happens: afterwards there may be nobody left to say it.
        if structlog.is_configured():
            structlog.get_logger().warning("failpoint", point=point, action=fault.action)
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "error":
                raise TransientError(f"failpoint {point}: {fault.argument or 'an error on demand'}")
            case "delay":
                threading.Event().wait(float(fault.argument))
            case "pause":
                while self._faults.get(point) == fault:
                    self._changed.clear()
                    self._changed.wait(1.0)
