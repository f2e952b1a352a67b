"""Drives one migration on one host: read, fold, decide, perform, append.

    while there is something to do:
        view = plan.fold(store.read(migration), view)        # pure
        decision = plan.decide(view)                          # pure
        outcomes = perform(decision.effects)                  # level-triggered, cancellable
        store.append(decision.conclude(outcomes))             # conflict: fold again

It must never act on a stream that it cannot fold, nor append anything but the outcome of a step that
the stream still asks for. One thread at most works on a migration; it ends when there is nothing to
do, so a host with a thousand settled containers has no thread for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from events.decision import Decision
from events.errors import (
    CancelledError,
    CargoError,
    ConflictError,
    RefusedError,
    SchemaError,
    StoreUnavailableError,
    TransientError,
)
from events.failpoints import Failpoints
from events.schema import Data, Event, StepFailed
from events.stamp import Stamper
from events.store import Store
from hostd.effects.base import ContainerChangedError, Context, TrackingLostError, Workbench
from hostd.effects.registry import EFFECTS
from hostd.plan import Plan, View

MAX_ATTEMPTS_BEFORE_CLAIM = 6
"""With the back-off below, about a minute: longer than a reboot of sshd, short enough that a person who
waits for a migration learns that it will not happen while the container still runs on the source."""
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 30.0
_IRREVOCABLE_STATES = frozenset(
    {"starting", "filling", "filling_digested", "filled", "verifying", "verified", "settled", "finalising"}
    | {"frozen", "yielded", "digesting", "digested", "releasing", "released"}
    | {"cleaning", "restoring", "yielding", "clearing", "carrying", "reviving"}
)
"""States whose steps are retried for ever: no abort exists, or the step is the abort itself."""


@dataclass
class RunnerPorts:
    """What a runner needs of its process."""

    host: str
    store: Store
    stamper: Stamper
    failpoints: Failpoints
    bench: Workbench
    progress: Callable[[str, dict[str, Any]], None]
    log: structlog.stdlib.BoundLogger


class Runner:
    """One migration on this host, in one role."""

    def __init__(self, migration: str, plan: Plan, ports: RunnerPorts) -> None:
        self.migration = migration
        self.plan = plan
        self.ports = ports
        self.author = f"hostd/{ports.host}"
        self.view: View = plan.start()
        self.last: Event | None = None
        self.halted = ""
        """Why this stream is not acted upon any more: it cannot be understood."""
        self._log = ports.log.bind(migration=migration, role=plan.role)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._closing = threading.Event()
        self._done_cause: tuple[str, int] | None = None
        self._failures = 0
        self._busy_step = ""
        self._poke_at: float | None = None

    # --- waking --------------------------------------------------------------------------------

    def kick(self, *, poke: bool = False) -> None:
        """Something may have happened: look. ``poke`` repeats a step that ends without an event."""
        with self._lock:
            if self._closing.is_set():
                return
            if poke:
                self._done_cause = None
            self._woken.set()
            if self._thread is not None and self._thread.is_alive():
                peek = bool(self._busy_step)
            else:
                self._thread = threading.Thread(
                    target=self._work, name=f"{self.plan.role}:{self.migration}", daemon=True
                )
                self._thread.start()
                return
        if peek:
            self._peek()

    def close(self, timeout_seconds: float) -> None:
        """Stop working: the step under way is cancelled, the stream tells the next life what to do."""
        self._closing.set()
        self._cancelled.set()
        self._woken.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)

    @property
    def finished(self) -> bool:
        """This host has nothing more to do for the migration, now or after a restart."""
        return self.view.state == "ended"

    def _peek(self) -> None:
        """While a step runs: cancel it if the stream has turned to undoing."""
        try:
            decision = self._read_and_decide()
        except CargoError:
            return  # the working thread meets the same and reports it
        if decision.undo and decision.step != self._busy_step:
            self._cancelled.set()

    # --- the loop ------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing.is_set():
            self._woken.clear()
            try:
                more = self._turn()
            except StoreUnavailableError as error:
                self._log.warning("store unavailable, holding", reason=str(error))
                more = self._back_off()
            except SchemaError as error:
                self.halted = str(error)
                self._log.error("refusing to act on this migration", reason=str(error))
                return
            except Exception:
                self._log.exception("unexpected error, will try again")
                more = self._back_off()
            if more or self._woken.is_set():
                continue
            if self._poke_at is not None:
                self._woken.wait(max(0.0, self._poke_at - time.monotonic()))
                self._poke_at = None
                self._done_cause = None
                continue
            with self._lock:
                if not self._woken.is_set():
                    self._thread = None
                    return

    def _read_and_decide(self) -> Decision:
        with self._reading:
            fresh = self.ports.store.read(self.migration, after=self.last)
            self.view = self.plan.fold(fresh, self.view)
            if fresh:
                self.last = fresh[-1]
            return self.plan.decide(self.view, self.author)

    def _turn(self) -> bool:
        """One turn. Returns whether to look again at once."""
        decision = self._read_and_decide()
        if decision.idle or self._done_cause == (decision.step, decision.cause):
            return False
        self._cancelled.clear()
        self._busy_step = decision.step
        try:
            self._perform_and_append(decision)
        except CancelledError:
            self._log.info("step cancelled", step=decision.step)
            return not self._closing.is_set()
        except (ConflictError, StoreUnavailableError):
            raise
        except CargoError as error:
            return self._failed(decision, error)
        finally:
            self._busy_step = ""
        self._failures = 0
        return True

    def _perform_and_append(self, decision: Decision) -> None:
        self._log.info("step begins", step=decision.step, seq=self.view.seq)
        context = Context(
            migration=self.migration,
            view=self.view,
            bench=self.ports.bench,
            cancelled=self._cancelled,
            log=self._log.bind(step=decision.step, seq=self.view.seq),
            progress=lambda fields: self.ports.progress(self.migration, fields),
        )
        started = time.monotonic()
        outcomes = self._perform(decision, context)
        self._log.info("step done", step=decision.step, seq=self.view.seq, seconds=round(time.monotonic() - started, 4))
        event = decision.conclude(outcomes) if decision.conclude is not None else None
        if event is None:
            self._done_cause = (decision.step, decision.cause)
            if context.poke_after is not None:
                self._poke_at = time.monotonic() + context.poke_after
            return
        self._hit(decision.step, "before_event")
        self._conclude(decision, event)
        self._hit(decision.step, "after_event")

    def _perform(self, decision: Decision, context: Context) -> dict[str, Any]:
        outcomes: dict[str, Any] = {}
        problems: list[CargoError] = []
        for name in decision.effects:
            effect = EFFECTS[name]
            if decision.undo:
                # The way back runs everything: one undo that fails must not keep the next from running.
                try:
                    outcomes[name] = effect.undo(context)
                except CargoError as error:
                    problems.append(error)
                continue
            context.check_cancelled()
            self._hit(name, "before_effect")
            outcomes[name] = effect.run(context)
            self._hit(name, "after_effect")
        if problems:
            raise TransientError("; ".join(str(problem) for problem in problems))
        return outcomes

    def _conclude(self, decision: Decision, data: Data) -> None:
        """Append the outcome. If others appended meanwhile, the step must still be asked for."""
        while True:
            try:
                self._append(data, decision)
            except ConflictError:
                self._read_and_decide()
            else:
                return

    def _append(self, data: Data, decision: Decision) -> None:
        """Append ``data`` if the stream, as far as it has been read, still asks for ``decision``."""
        request = self.view.requested.request
        others = {request.source, request.target} - {self.ports.host}
        with self._reading:
            current = self.plan.decide(self.view, self.author)
            if current.step != decision.step:
                raise CancelledError(f"{decision.step} was overtaken")
            event = self.ports.store.append(
                self.migration,
                self.last,
                data,
                cause=current.cause,
                stamp=self.ports.stamper.stamp(self.view.epoch),
                notify=sorted(others),
            )
            self.view = self.plan.apply(self.view, event)
            self.last = event
        self._log.info("appended", type=event.type, seq=event.seq)

    # --- failure -------------------------------------------------------------------------------

    def _failed(self, decision: Decision, error: CargoError) -> bool:
        self._failures += 1
        transient = isinstance(error, TransientError)
        irrevocable = self.view.state in _IRREVOCABLE_STATES
        retrying = irrevocable or (transient and self._failures < MAX_ATTEMPTS_BEFORE_CLAIM)
        self._log.warning(
            "step failed",
            step=decision.step,
            seq=self.view.seq,
            reason=str(error),
            retrying=retrying,
            attempt=self._failures,
        )
        known = self.view.failing.get(self.author)
        if known is None or known.reason != _clip(str(error)) or known.retrying != retrying:
            report = StepFailed(
                step=decision.step,
                reason=_clip(str(error)),
                retrying=retrying,
                attempt=self._failures,
                advice=self._advice(retrying),
                code=_code(error),
                reasons=tuple(_clip(reason) for reason in error.reasons[:50])
                if isinstance(error, RefusedError)
                else (),
            )
            try:
                self._append(report, decision)
            except (ConflictError, CancelledError):
                return True
        if not retrying:
            self._failures = 0
            return True
        return self._back_off()

    def _advice(self, retrying: bool) -> str:
        request = self.view.requested.request
        if self.view.state in ("cleaning", "restoring"):
            return f"{self.ports.host} keeps trying to undo what it did; look at its log if this lasts"
        if self.view.state in _IRREVOCABLE_STATES:
            return (
                f"the data on {request.source} is kept untouched; {self.ports.host} keeps trying, "
                "and goes on by itself once the cause is gone"
            )
        if retrying:
            return f"nothing is lost, the container's home is still {request.source}; trying again"
        return f"the migration is aborted, the container stays on {request.source}"

    def _back_off(self) -> bool:
        delay = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** min(self._failures, 10))
        self._woken.wait(delay)
        return True

    def _hit(self, name: str, moment: str) -> None:
        self.ports.failpoints.hit(f"{self.plan.role}.{name}:{moment}")


MAX_REASON_CHARACTERS = 2000
"""An event is bounded; a tool's whole output belongs into the log."""


def _clip(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARACTERS else text[: MAX_REASON_CHARACTERS - 1] + "…"


def _code(error: CargoError) -> Any:
    if isinstance(error, TrackingLostError):
        return "tracking_lost"
    if isinstance(error, ContainerChangedError):
        return "container_changed"
    return "refused" if isinstance(error, RefusedError) else "failed"
