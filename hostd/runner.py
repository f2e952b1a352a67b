"""Drives one migration on one host: read, fold, decide, perform, append.

    while there is something to do:
        view = plan.fold(store.read(migration), view)        # pure
        decision = plan.decide(view)                          # pure
        outcomes = perform(decision.effects)                  # level-triggered, cancellable
        store.append(decision.conclude(outcomes))             # conflict: fold again

The order of these, and what follows from an error, is ``hostd/turn.py``'s; here are its hands: thread, clock,
store and effects.

It must never act on a stream that it cannot fold, nor append anything but the outcome of a step that
the stream still asks for. One thread at most works on a migration; it ends when there is nothing to
do, so a host with a thousand settled containers has no thread for them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from events.decision import Decision
from events.errors import CargoError, SchemaError, StoreUnavailableError
from events.failpoints import Failpoints
from events.schema import Data, Event
from events.stamp import Stamper
from events.store import Store
from hostd.effects.base import Context, Workbench
from hostd.effects.registry import EFFECTS
from hostd.journal import Journal
from hostd.plan import Plan, View
from hostd.ssh_gatekeeper import Gatekeeper
from hostd.ssh_grants import admission, foreseen
from hostd.turn import (
    IRREVOCABLE_STATES,
    LONGEST_RETRY_SECONDS,
    MAX_ATTEMPTS_BEFORE_CLAIM,
    Append,
    Begin,
    Operation,
    Pass,
    Perform,
    Read,
    Rest,
    Tell,
    Turns,
    Wait,
    retry_delay_seconds,
)

__all__ = ["MAX_ATTEMPTS_BEFORE_CLAIM", "Runner", "RunnerPorts"]

SUPERVISE = "supervise_container"
EXCLUSIVE = frozenset({SUPERVISE, "recall_container", "fold_union"})
"""Effects that start or stop the container on the target: one at a time."""
EAGER_PART, EAGER_SECONDS = 0.2, 1.0
"""Of the wait for the next attempt, and at most, that passes although something has happened: see ``_back_off``."""
LOOK_SECONDS = 4.0
"""How often what a running container reads through is looked after, during a step that may take hours."""


RETRY = "resumed"
"""A person's ``retry`` or ``resume``; it moves no machine and ends the pause between two attempts."""


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
    ended: Callable[[str], None] = lambda _migration: None
    """Told when a migration is finished for this host."""
    journal: Journal | None = None
    """What this host has seen of each history; None keeps no such evidence."""
    gate: Gatekeeper | None = None
    """Admits the migration's other host by SSH; None leaves that to others."""


class Runner:
    """One migration on this host, in one role."""

    def __init__(self, migration: str, plan: Plan, ports: RunnerPorts) -> None:
        self.migration = migration
        self.plan = plan
        self.ports = ports
        self._turns = Turns(plan, ports.host)
        self.halted = ""
        """Why this stream is not acted upon any more: it cannot be understood."""
        self._log = ports.log.bind(migration=migration, role=plan.role)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._supervising = threading.Lock()
        self._woken = threading.Event()
        self._stirred = threading.Event()
        """Something happened since the step began that may change how its next attempt goes."""
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._closing = threading.Event()
        self._context: Context | None = None
        self._began = 0.0
        self._effect_seconds: dict[str, float] = {}
        self._poked = threading.Event()
        """A step that ends without an event is to look once more, also when it was looking just now."""
        self._poke_at: float | None = None
        self._supervised_at = time.monotonic()
        self._supervisors = 0

    # --- waking --------------------------------------------------------------------------------

    def kick(self, *, poke: bool = False) -> None:
        """Something may have happened: look. ``poke`` repeats a step that ends without an event."""
        with self._lock:
            if self._closing.is_set():
                return
            due = self.view.state in self.plan.supervised and time.monotonic() - self._supervised_at > LOOK_SECONDS
            idle = self._thread is None or not self._thread.is_alive()
            if poke or (due and idle):
                self._poked.set()
            if due:
                self._supervised_at = time.monotonic()
            self._woken.set()
            if self._thread is not None and self._thread.is_alive():
                peek = bool(self._turns.busy_step)
            else:
                self._thread = threading.Thread(
                    target=self._work, name=f"{self.plan.role}:{self.migration}", daemon=True
                )
                self._thread.start()
                return
        if peek:
            self._peek()
            poke = poke or (due and not self._supervisors)
        if poke and self.view.state in self.plan.supervised:
            with self._lock:
                self._supervisors += 1
            threading.Thread(target=self._supervise_all_along, name=f"supervise:{self.migration}", daemon=True).start()

    def close(self, timeout_seconds: float) -> None:
        """Stop working: the step under way is cancelled, the stream tells the next life what to do."""
        self._closing.set()
        self._cancelled.set()
        self._woken.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_seconds)

    @property
    def view(self) -> View:
        """The stream as this host knows it."""
        return self._turns.view

    @property
    def last(self) -> Event | None:
        """The newest event that was read or appended."""
        return self._turns.last

    @property
    def finished(self) -> bool:
        """This host has nothing to do for the migration, now or after a restart, unless somebody appends to it."""
        return self._turns.finished

    @property
    def ended(self) -> bool:
        """Nothing can be appended any more."""
        return self.view.state == "ended"

    def _peek(self) -> None:
        """While a step runs: cancel it if the stream has turned to undoing."""
        try:
            decision = self._read()
        except CargoError:
            return  # the working thread meets the same and reports it
        if self._turns.overtaken(decision):
            self._cancelled.set()

    def _supervise_all_along(self) -> None:
        try:
            self._supervise()
        finally:
            with self._lock:
                self._supervisors -= 1

    def _supervise(self) -> None:
        """While a long step runs: the container has changed, and must be kept running all the same.

        The history is read anew under the lock that ``recall_container`` takes too, so a container that is to be
        stopped for good is never started again.
        """
        while not self._closing.is_set():
            with self._supervising:
                context = self._context_for(SUPERVISE)
                try:
                    self._read()
                    if self.view.state not in self.plan.supervised:
                        return
                    context = self._context_for(SUPERVISE)
                    EFFECTS[SUPERVISE].run(context)
                except CargoError as error:
                    self._log.warning("cannot supervise the container now", reason=str(error))
                    context.poke_after = LONGEST_RETRY_SECONDS
            if context.poke_after is None:
                return
            self._closing.wait(context.poke_after)

    # --- the loop ------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closing.is_set():
            self._woken.clear()
            try:
                more = self._turn() and not self._closing.is_set()
            except StoreUnavailableError as error:
                self._log.warning("store unavailable, holding", reason=str(error))
                more = self._back_off(self._turns.failures)
            except SchemaError as error:
                self.halted = str(error)
                self._log.error("refusing to act on this migration", reason=str(error))
                return
            except Exception:
                self._log.exception("unexpected error, will try again")
                more = self._back_off(self._turns.failures)
            if more or self._woken.is_set():
                continue
            if self._poke_at is not None:
                self._woken.wait(max(0.0, self._poke_at - time.monotonic()))
                self._poke_at = None
                self._poked.set()
                continue
            with self._lock:
                if not self._woken.is_set():
                    self._thread = None
                    break
        if self.finished and not self._closing.is_set():
            self.ports.ended(self.migration)

    def _turn(self) -> bool:
        """One turn. Returns whether to look again at once."""
        if self._poked.is_set():
            self._poked.clear()  # before it looks: whoever pokes from here on is answered by another turn
            self._turns.rested = None
        operations = self._turns.turn()
        try:
            operation = next(operations)
            while True:
                try:
                    result = self._do(operation)
                except Exception as error:
                    operation = operations.throw(error)
                else:
                    operation = operations.send(result)
        except StopIteration as done:
            return bool(done.value)
        finally:
            self._context = None

    def _do(self, operation: Operation) -> Any:
        match operation:
            case Read():
                return self._read()
            case Begin(decision):
                self._begin(decision.step)
            case Perform(name, undo):
                return self._perform(name, undo)
            case Pass(name, moment):
                if moment == "before_event":
                    self._say_done(name)
                self.ports.failpoints.hit(f"{self.plan.role}.{name}:{moment}")
            case Append():
                self._append(operation)
            case Rest():
                if self._context is not None and self._context.poke_after is not None:
                    self._poke_at = time.monotonic() + self._context.poke_after
            case Tell():
                self._say_failed(operation)
            case Wait(failures):
                self._back_off(failures)
        return None

    def _read(self) -> Decision:
        with self._reading:
            fresh = self.ports.store.read(self.migration, after=self.last)
            if self.ports.journal is not None and fresh:
                if self.last is None:
                    self.ports.journal.check(self.migration, fresh)
                self.ports.journal.note(self.migration, fresh[-1])
            if any(event.type == RETRY or event.type not in self.plan.table.ignored for event in fresh):
                self._stirred.set()
            decision = self._turns.learn(fresh)
            self._settle_gate()
            return decision

    def _settle_gate(self) -> None:
        """The peer may ask for what the history says, and no more. What fails is tried again at the next look."""
        if self.ports.gate is None:
            return
        try:
            self.ports.gate.settle(self.migration, admission(self.plan, self.view))
        except CargoError as error:
            self._log.warning("cannot change what the peer may ask for", reason=str(error))

    def _admit_before(self, data: Data) -> None:
        """What the peer will ask for as soon as it reads ``data`` must be admitted by then. Raises TransientError."""
        if self.ports.gate is None:
            return
        admitted = admission(self.plan, foreseen(self.plan, self.view, data))
        if admitted is not None:
            self.ports.gate.settle(self.migration, admitted)

    def _begin(self, step: str) -> None:
        self._cancelled.clear()
        self._stirred.clear()
        if self._closing.is_set():
            self._cancelled.set()
        self._log.info("step begins", step=step, seq=self.view.seq)
        self._began = time.monotonic()
        self._effect_seconds = {}
        self._context = self._context_for(step)

    def _context_for(self, step: str) -> Context:
        return Context(
            migration=self.migration,
            view=self.view,
            bench=self.ports.bench,
            cancelled=self._cancelled,
            log=self._log.bind(step=step, seq=self.view.seq),
            progress=lambda fields: self.ports.progress(self.migration, fields),
            newest=lambda: self.view,
        )

    def _perform(self, name: str, undo: bool) -> Any:
        assert self._context is not None, "a step begins before its effects"
        began = time.monotonic()
        try:
            with self._supervising if name in EXCLUSIVE else contextlib.nullcontext():
                if undo:
                    return EFFECTS[name].undo(self._context)
                self._context.check_cancelled()
                return EFFECTS[name].run(self._context)
        finally:
            self._effect_seconds[name] = round(time.monotonic() - began, 4)

    def _append(self, operation: Append) -> None:
        with self._reading:
            draft = self._turns.draft(operation.data, operation.decision)
            self._admit_before(draft.data)
            event = self.ports.store.append(
                self.migration,
                draft.previous,
                draft.data,
                cause=draft.cause,
                stamp=self.ports.stamper.stamp(draft.epoch),
                notify=draft.notify,
            )
            self._turns.appended(event)
        self._log.info("appended", type=event.type, seq=event.seq)

    def _say_done(self, step: str) -> None:
        seconds = round(time.monotonic() - self._began, 4)
        self._log.info("step done", step=step, seq=self.view.seq, seconds=seconds, effects=self._effect_seconds)

    def _say_failed(self, failed: Tell) -> None:
        self._log.warning(
            "step failed",
            step=failed.decision.step,
            seq=self.view.seq,
            reason=str(failed.error),
            retrying=failed.retrying,
            attempt=failed.attempt,
        )

    def _back_off(self, failures: int) -> bool:
        """Wait before the next attempt. While attempts are counted, being woken for nothing does not make another one:
        a person's question or a mere look around must not use them up. Where they are not counted it makes one sooner,
        but not at once: what the failed attempt did to Docker wakes too."""
        delay = retry_delay_seconds(failures)
        began = time.monotonic()
        while self._woken.wait(max(0.0, began + delay - time.monotonic())):
            if self._closing.is_set() or self._stirred.is_set():
                break
            if self.view.state in IRREVOCABLE_STATES:
                self._closing.wait(max(0.0, began + min(delay * EAGER_PART, EAGER_SECONDS) - time.monotonic()))
                break
            self._woken.clear()
        return True
