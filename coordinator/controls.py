"""What a person may ask of a migration under way, and the answer to it. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.lifecycle import STILL_MOVING, Lifecycle, waiting_for
from events.schema import (
    AbortOrdered,
    BwlimitOrdered,
    ControlRefused,
    Data,
    FinaliseOrdered,
    Paused,
    Resumed,
    RollbackOrdered,
    TargetAssertedOff,
)

MAX_CONTROL_BYTES = 4096
MAX_WORDS = 500
MAX_KIB = 2**31 - 1


@dataclass(frozen=True)
class Control:
    """A parsed control. ``problem`` is set when it could not be understood."""

    name: str
    reason: str = ""
    problem: str = ""
    discard_target_writes: bool = False
    target_off: str = ""
    """Who vouches that the target is powered off."""
    kib: int | None = None
    """Of ``bwlimit``: KiB/s, 0 for no limit."""


_OPTIONS: dict[str, dict[str, type]] = {
    "abort": {"reason": str},
    "rollback": {"reason": str, "discard_target_writes": bool, "target_off": str},
    "finalise": {"reason": str},
    "pause": {"reason": str},
    "resume": {"reason": str},
    "retry": {"reason": str},
    "bwlimit": {"reason": str, "kib": int},
}
CONTROLS = tuple(_OPTIONS)


def parse(raw: bytes) -> Control:
    """``abort``, or ``{"control":"rollback","reason":"…","discard_target_writes":true,"target_off":"ada"}``."""
    shown = raw[:80].decode("utf-8", "backslashreplace").strip()
    if len(raw) > MAX_CONTROL_BYTES:
        return Control(shown, problem=f"a control may have {MAX_CONTROL_BYTES} bytes at most")
    text = raw.decode("utf-8", "backslashreplace").strip()
    if text in CONTROLS:
        return Control(text)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is text that no event can hold
    except (ValueError, RecursionError):
        return Control(shown, problem=f"not a known control (known: {', '.join(CONTROLS)})")
    name = value.get("control") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in CONTROLS:
        return Control(shown, problem=f'"control" must be one of: {", ".join(CONTROLS)}')
    known = _OPTIONS[name]
    given = {key: option for key, option in value.items() if key != "control"}
    wrong = [key for key, option in given.items() if key not in known or type(option) is not known[key]]
    if wrong:
        return Control(name, problem=f"unknown or wrongly typed options: {', '.join(sorted(wrong))[:200]}")
    cut: dict[str, Any] = {
        key: option[:MAX_WORDS] if isinstance(option, str) else option for key, option in given.items()
    }
    return Control(name, **cut)


def answer(control: Control, lifecycle: Lifecycle, *, target_seen: bool = False) -> Data | None:
    """The next event that obeys or refuses ``control``; None when what it asks for is so already.

    ``target_seen``: the target's agent has written something since the control was put.
    """
    if control.problem:
        return ControlRefused(control=control.name, reason=control.problem)
    data = _ANSWERS[control.name](control, lifecycle)
    if control.target_off and target_seen and isinstance(data, RollbackOrdered | TargetAssertedOff):
        return _not_off(control, lifecycle)
    return data


def _abort(control: Control, lifecycle: Lifecycle) -> Data | None:
    if lifecycle.state in ("aborting", "aborted"):
        return None
    if lifecycle.abortable:
        return AbortOrdered(reason=control.reason or "a person asked for it", by_person=True)
    if lifecycle.reversible:
        return ControlRefused(
            control="abort",
            reason="the target has claimed the container, so its data is the newest; `rollback` brings it back",
        )
    return _too_late(control, lifecycle)


def _rollback(control: Control, lifecycle: Lifecycle) -> Data | None:
    if control.target_off and not control.discard_target_writes:
        return ControlRefused(
            control="rollback",
            reason="from a target that is off nothing can be carried back; what it wrote since the cut-over would be "
            "lost, so this needs discard_target_writes as well",
        )
    if lifecycle.state == "rolled_back":
        return None
    if lifecycle.state == "rolling_back":
        if control.target_off and not (lifecycle.asserted_off or lifecycle.carried_back):
            return TargetAssertedOff(who=control.target_off, words=control.reason)
        return None
    if lifecycle.abortable:
        return ControlRefused(control="rollback", reason="nothing has been claimed yet; `abort` is the way back")
    if lifecycle.reversible:
        return RollbackOrdered(
            reason=control.reason or "a person asked for it", discard_target_writes=control.discard_target_writes
        )
    return _too_late(control, lifecycle)


def _not_off(control: Control, lifecycle: Lifecycle) -> Data:
    """Nobody may have obeyed for a long time, and the word that was true then may be none any more."""
    target = lifecycle.request.target if lifecycle.request is not None else "the target"
    return ControlRefused(
        control="rollback",
        reason=f"since {control.target_off} vouched that {target} is off, its agent has written here: it is on, and the "
        f"container may be running there. Nothing was done. Roll back without target_off, or switch {target} off for "
        "good and ask again",
    )


def _finalise(control: Control, lifecycle: Lifecycle) -> Data | None:
    if lifecycle.state in ("finalise", "finalised"):
        return None
    if lifecycle.state == "completed":
        return FinaliseOrdered(why=control.reason or "a person asked for it", stop_now=True)
    return ControlRefused(
        control="finalise", reason=f"only a completed migration can be finalised; now: {waiting_for(lifecycle)}"
    )


def _pause(control: Control, lifecycle: Lifecycle) -> Data | None:
    if lifecycle.paused:
        return None
    if lifecycle.abortable and not lifecycle.source_stopped:
        return Paused()
    if lifecycle.terminal:
        return _too_late(control, lifecycle)
    return ControlRefused(control="pause", reason="the cut-over has begun; waiting now would only prolong the outage")


def _resume(control: Control, lifecycle: Lifecycle) -> Data | None:
    return Resumed() if lifecycle.paused and not lifecycle.terminal else None


def _retry(control: Control, lifecycle: Lifecycle) -> Data | None:
    """``resumed`` moves no machine; its arrival ends the pause between two attempts of whoever is failing."""
    if lifecycle.paused:
        return ControlRefused(control="retry", reason="it is paused by a person; `resume` goes on")
    if lifecycle.failures:
        return Resumed(by_person=control.reason or "try again now")
    if lifecycle.terminal:
        return _too_late(control, lifecycle)
    return ControlRefused(control="retry", reason=f"nothing has failed; now: {waiting_for(lifecycle)}")


def _bwlimit(control: Control, lifecycle: Lifecycle) -> Data | None:
    if control.kib is None or not 0 <= control.kib <= MAX_KIB:
        return ControlRefused(
            control="bwlimit",
            reason=f'it needs a number of KiB per second from 0 (no limit) to {MAX_KIB}: {{"control":"bwlimit","kib":N}}',
        )
    if lifecycle.state not in STILL_MOVING:
        return _too_late(control, lifecycle)
    return None if control.kib == lifecycle.bwlimit_kib else BwlimitOrdered(kib=control.kib)


def _too_late(control: Control, lifecycle: Lifecycle) -> Data:
    return ControlRefused(control=control.name, reason=f"it is too late: {waiting_for(lifecycle)}")


_ANSWERS: dict[str, Callable[[Control, Lifecycle], Data | None]] = {
    "abort": _abort,
    "rollback": _rollback,
    "finalise": _finalise,
    "pause": _pause,
    "resume": _resume,
    "retry": _retry,
    "bwlimit": _bwlimit,
}
