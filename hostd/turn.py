"""The law of an agent's loop, without its hands: read, fold, decide, perform one effect after the other, append.

A turn is a generator. It yields what is to be done next as plain data (``Read``, ``Perform``, ``Append`` …), and
whoever drives it does that and sends in, or throws in, what came of it:

    operations = turns.turn()
    operation = next(operations)                      # StopIteration: the turn is over; its value: look again at once?
    operation = operations.send(do(operation))        # or operations.throw(what do() raised)

``hostd/runner.py`` drives it with a thread, real effects and the real clock; the simulator drives the very same
turns one operation at a time, with whatever may happen in between. Decided here: what to do on an error, on a lost
race for a sequence number, on a step that was overtaken; when to give up; what a failure's report says.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

from events.decision import Decision
from events.errors import (
    CancelledError,
    CargoError,
    ConflictError,
    PermanentError,
    RefusedError,
    StoreUnavailableError,
    TransientError,
)
from events.schema import Data, Event, StepFailed, StepRecovered
from hostd.plan import Plan, View

MAX_ATTEMPTS_BEFORE_CLAIM = 6
"""With the back-off of the runner, about a minute: longer than a reboot of sshd, short enough that a person who
waits for a migration learns that it will not happen while the container still runs on the source."""
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 30.0
IRREVOCABLE_STATES = frozenset(
    {"starting", "filling", "filling_digested", "filled", "verifying", "verified", "settled"}
    | {"finalising", "finalised"}
    | {"frozen", "yielded", "digesting", "digested", "releasing", "released"}
    | {"cleaning", "restoring", "yielding", "clearing", "clearing_late", "recalling", "carrying", "reviving"}
)
"""States whose steps are retried for ever: no abort exists, or the step is the abort itself."""
MAX_REASON_CHARACTERS = 2000
"""An event is bounded; a tool's whole output belongs into the log."""
MAX_REASONS = 50
MAX_REASONS_CHARACTERS = 6_000
"""Of all reasons together: a character may take six bytes in an event, which may have 64 KiB."""
ENDS_STEP = "ends_step"
"""An outcome that holds this ends its step: another host has to do something first, and the event says what."""


class StartedAgainError(PermanentError):
    """The source's container ran although it had been stopped; by now it is stopped again, so nobody will find it twice.

    Before the claim that ends the migration: what it has written is nowhere else.
    """

    def __init__(self, reason: str, source: str, target: str) -> None:
        super().__init__(reason)
        self._source, self._target = source, target

    @staticmethod
    def ends_migration(state: str) -> bool:
        """Whether that is so when it is told in ``state`` of the source."""
        return state == "frozen"

    def advice(self, state: str) -> str:
        """What it means there; empty as for any failure that ends the migration."""
        if self.ends_migration(state):
            return ""
        if state in ("recalling", "carrying"):
            return f"the rollback goes on; {self._source} keeps what was written to its data meanwhile"
        return (
            f"the container lives on {self._target} and goes on there; what has not arrived there yet may hold what was "
            f"written on {self._source} meanwhile"
        )


def retry_delay_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(failures, 10))


@dataclass(frozen=True)
class Read:
    """Read what is new in the stream and give it to ``learn``."""


@dataclass(frozen=True)
class Begin:
    """A step begins; what follows up to the next Append or Rest belongs to it."""

    decision: Decision


@dataclass(frozen=True)
class Perform:
    """Run the effect and send in its outcome; a ``run`` that is no longer wanted raises CancelledError."""

    name: str
    undo: bool


@dataclass(frozen=True)
class Pass:
    """A named point at which a tester may have put a fault."""

    name: str
    moment: Literal["before_effect", "after_effect", "before_event", "after_event"]


@dataclass(frozen=True)
class Append:
    """Append ``draft(data, decision)`` and give the event to ``appended``, with nobody reading in between."""

    data: Data
    decision: Decision


@dataclass(frozen=True)
class Rest:
    """The step ended without an event: it is repeated when its cause changes, or when somebody asks for it."""


@dataclass(frozen=True)
class Tell:
    """A step failed; for the log."""

    decision: Decision
    error: CargoError
    retrying: bool
    attempt: int


@dataclass(frozen=True)
class Wait:
    """Wait before the next attempt, the longer the more have failed, or until something happens."""

    failures: int


Operation = Read | Begin | Perform | Pass | Append | Rest | Tell | Wait
Turn = Generator[Operation, Any, bool]


@dataclass(frozen=True)
class Draft:
    """What an append needs besides the stamp."""

    previous: Event | None
    data: Data
    cause: int
    epoch: int
    notify: tuple[str, ...]


class Turns:
    """One migration on one host, in one role."""

    def __init__(self, plan: Plan, host: str) -> None:
        self.plan = plan
        self.host = host
        self.author = f"hostd/{host}"
        self.view: View = plan.start()
        self.last: Event | None = None
        self.rested: tuple[str, int] | None = None
        """Step and cause of what ended without an event; None repeats it."""
        self.failures = 0
        self.busy_step = ""
        self.untold: StartedAgainError | None = None
        """What no repetition would find again: told with the next step when others appended first, whatever step that is."""

    def learn(self, fresh: list[Event]) -> Decision:
        """Fold ``fresh``, which continue ``last``. Raises SchemaError."""
        self.view = self.plan.fold(fresh, self.view)
        if fresh:
            self.last = fresh[-1]
        return self.plan.decide(self.view, self.author)

    @property
    def finished(self) -> bool:
        """This host has done all it has to, in a state that only somebody else's word ends, if anything does."""
        if self.view.state not in self.plan.table.final:
            return False
        decision = self.plan.decide(self.view, self.author)
        return decision.idle or self.rested == (decision.step, decision.cause)

    def overtaken(self, decision: Decision) -> bool:
        """Whether the stream, as far as it is known, has turned to undoing while a step runs."""
        return decision.undo and decision.step != self.busy_step

    def turn(self) -> Turn:
        """One turn. Its value says whether to look again at once. Raises SchemaError, StoreUnavailableError."""
        decision = yield Read()
        if decision.idle or self.rested == (decision.step, decision.cause):
            return False
        if decision.undo:
            self.untold = None
        elif self.untold is not None:
            return (yield from self._failed(decision, self.untold))
        try:
            yield from self._perform_and_append(decision)
        except CancelledError:
            return True
        except (ConflictError, StoreUnavailableError):
            raise
        except CargoError as error:
            return (yield from self._failed(decision, error))
        finally:
            self.busy_step = ""
        self.failures = 0
        return True

    # --- a step --------------------------------------------------------------------------------

    def _perform_and_append(self, decision: Decision) -> Generator[Operation, Any, None]:
        yield Begin(decision)
        self.busy_step = decision.step
        outcomes = yield from (self._undo(decision) if decision.undo else self._run(decision))
        data = decision.conclude(outcomes) if decision.conclude is not None else None
        failed = self.view.failing.get(self.author)
        if data is None and failed is not None and self.view.state in self.plan.table.final:
            data = StepRecovered(step=decision.step)  # nothing else of this host would ever say so
        if data is None:
            self.rested = (decision.step, decision.cause)
            yield Rest()
            return
        yield Pass(decision.step, "before_event")
        while True:
            try:
                yield Append(data, decision)
            except ConflictError:
                yield Read()  # others appended meanwhile; ``draft`` looks whether the step is still asked for
            else:
                break
        yield Pass(decision.step, "after_event")

    @staticmethod
    def _run(decision: Decision) -> Generator[Operation, Any, dict[str, Any]]:
        outcomes: dict[str, Any] = {}
        for name in decision.effects:
            yield Pass(name, "before_effect")
            outcomes[name] = yield Perform(name, undo=False)
            yield Pass(name, "after_effect")
            if (outcomes[name] or {}).get(ENDS_STEP):
                break
        return outcomes

    @staticmethod
    def _undo(decision: Decision) -> Generator[Operation, Any, dict[str, Any]]:
        """The way back runs everything: one undo that fails must not keep the next from running.

        Only the last one waits for all others: it forgets what they need to know when they are tried again.
        """
        outcomes: dict[str, Any] = {}
        problems: list[CargoError] = []
        for name in decision.effects:
            if problems and name == decision.effects[-1]:
                break
            try:
                outcomes[name] = yield Perform(name, undo=True)
            except CargoError as error:
                problems.append(error)
        if problems:
            raise TransientError("; ".join(str(problem) for problem in problems))
        return outcomes

    def draft(self, data: Data, decision: Decision) -> Draft:
        """How to append ``data``. Raises CancelledError if the stream no longer asks for ``decision``."""
        current = self.plan.decide(self.view, self.author)
        if current.step != decision.step:
            raise CancelledError(f"{decision.step} was overtaken")
        request = self.view.requested.request
        others = {request.source, request.target} - {self.host}
        return Draft(self.last, data, current.cause, self.view.epoch, tuple(sorted(others)))

    def appended(self, event: Event) -> None:
        """``event``, made from the latest draft, is durable."""
        self.view = self.plan.apply(self.view, event)
        self.last = event

    # --- failure -------------------------------------------------------------------------------

    def _failed(self, decision: Decision, error: CargoError) -> Turn:
        self.failures += 1
        final = isinstance(error, StartedAgainError) and error.ends_migration(self.view.state)
        if isinstance(error, StartedAgainError):
            self.untold = error
        retrying = not final and (
            self.view.state in IRREVOCABLE_STATES
            or (isinstance(error, TransientError) and self.failures < MAX_ATTEMPTS_BEFORE_CLAIM)
        )
        yield Tell(decision, error, retrying, self.failures)
        report = self._report(decision, error, retrying)
        if self._worth_telling(report):
            try:
                yield Append(report, decision)
            except (ConflictError, CancelledError):
                return True
        self.untold = None
        if not retrying:
            self.failures = 0
            return True
        yield Wait(self.failures)
        return True

    def _worth_telling(self, report: StepFailed) -> bool:
        """A step that fails for days must not fill the history: another reason is told at each doubling only."""
        known = self.view.failing.get(self.author)
        if known is None or known.step != report.step or known.retrying != report.retrying:
            return True
        return known.reason != report.reason and (self.untold is not None or report.attempt >= 2 * known.attempt)

    def _report(self, decision: Decision, error: CargoError, retrying: bool) -> StepFailed:
        reasons = [_clip(reason) for reason in error.reasons[:MAX_REASONS]] if isinstance(error, RefusedError) else []
        while sum(map(len, reasons)) > MAX_REASONS_CHARACTERS:
            reasons.pop()
        advice = error.advice(self.view.state) if isinstance(error, StartedAgainError) else ""
        return StepFailed(
            step=decision.step,
            reason=_clip(str(error)),
            retrying=retrying,
            attempt=self.failures,
            advice=advice or self._advice(retrying),
            code=_code(error),
            reasons=tuple(reasons),
        )

    def _advice(self, retrying: bool) -> str:
        request = self.view.requested.request
        if self.view.state in ("cleaning", "restoring"):
            return f"{self.host} keeps trying to undo what it did; look at its log if this lasts"
        if self.view.state in IRREVOCABLE_STATES and retrying:
            return (
                f"the data on {request.source} is kept untouched; {self.host} keeps trying, "
                "and goes on by itself once the cause is gone"
            )
        if retrying:
            return f"nothing is lost, the container's home is still {request.source}; trying again"
        return f"the migration is aborted, the container stays on {request.source}"


def _clip(text: str) -> str:
    # A path that is not Unicode, decoded for a message, has characters that no event can hold.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_REASON_CHARACTERS else text[: MAX_REASON_CHARACTERS - 1] + "…"


def _code(error: CargoError) -> Any:
    """Errors that the coordinator answers in a special way name their ``code`` (``hostd/effects/base.py``)."""
    return getattr(error, "code", "refused" if isinstance(error, RefusedError) else "failed")
