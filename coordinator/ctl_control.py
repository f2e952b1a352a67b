"""``cargoctl why``, the controls, and ``failpoints``: steering, and knowing what to steer."""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from coordinator import controls, lifecycle, narrate
from coordinator.ctl_history import FOLLOW_TICK_SECONDS, GOOD_ENDS, follow
from coordinator.ctl_output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    checked_id,
    console,
    events_of,
    print_json,
    show,
)
from coordinator.narrate import duration
from coordinator.timeline import printable
from coordinator.waiting import Why, explain
from events import failpoints
from events.errors import CargoError
from events.failpoint_names import FAILPOINTS, points_of
from events.schema import Event
from events.store import Store

# --- why -----------------------------------------------------------------------------------------


def why(store: Store, options: argparse.Namespace) -> int:
    """What a migration waits for, since when, for whom, and what would change that."""
    events = events_of(store, options)
    answer = explain(events)
    heard = (
        {} if options.file is not None else {party.process: _heard(store, party.process) for party in answer.parties}
    )
    if options.json:
        parties = [party.__dict__ | {"heard_of": heard.get(party.process)} for party in answer.parties]
        print_json(answer.__dict__ | {"id": options.id, "parties": parties})
        return EXIT_OK
    _show_why(options, answer, heard, ended=not answer.parties)
    return EXIT_OK


def _heard(store: Store, process: str) -> bool | None:
    """Whether a process shows signs of life; None for what has none to show."""
    if process == "coordinator":
        return store.get(store.keys.leader) is not None
    kind, _, host = process.partition("/")
    return store.get(store.keys.host(host)) is not None if kind == "hostd" else None


def _show_why(options: argparse.Namespace, answer: Why, heard: dict[str, bool | None], *, ended: bool) -> None:
    out = console(options)
    head = Text(f"{options.id or ''} {answer.phase}: ".lstrip(), style="bold")
    head.append(printable(answer.waiting_for), style="")
    out.print(head, soft_wrap=True)
    out.print(f"  since  {_since(answer.since)}, event {answer.since_seq}", soft_wrap=True)
    for party in answer.parties:
        line = Text(f"  whom   {party.process}: {printable(narrate.doing(party.doing))}")
        signs = heard.get(party.process)
        if signs is not None:
            said = "heard of now" if signs else "silent: not registered now, which proves nothing"
            line.append(f" ({said})", style="dim" if signs else "red")
        out.print(line, soft_wrap=True)
        if party.failing:
            out.print(Text(f"         failing: {printable(party.failing)}", style="red"), soft_wrap=True)
        out.print(f"  until  it appends {' or '.join(party.appends)}", soft_wrap=True)
    if answer.possible_controls:
        out.print(f"  you    can say: {', '.join(answer.possible_controls)}", soft_wrap=True)
    elif ended:
        out.print("  you    need do nothing: it has ended", soft_wrap=True)
    if ended:
        return
    if not answer.possible_controls:
        out.print("  you    need say nothing: it goes on by itself", soft_wrap=True)
    for role, advice in (("source", answer.if_source_is_dead), ("target", answer.if_target_is_dead)):
        if advice:
            out.print(f"  if the {role} is dead: {printable(advice)}", soft_wrap=True)


def _since(at: str) -> str:
    try:
        age = (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    except (ValueError, TypeError):
        return printable(at)
    return f"{at}, {duration(age)} ago" if age >= 0 else at


# --- controls ------------------------------------------------------------------------------------


def control(store: Store, options: argparse.Namespace) -> int:
    """Write a control key and show what the coordinator answers."""
    migration = checked_id(options.id)
    events = store.read(migration)
    if not events:
        raise UsageError(f"there is no migration {migration}; `cargoctl status` lists them all")
    key = store.keys.control(migration)
    if not store.put_if_absent(key, json.dumps(_wish(options)).encode()):
        raise UsageError(f"another control for {migration} is waiting for the coordinator; is one running?")
    if not _answered(store, key, options.timeout_seconds):
        raise CargoError(
            f"no coordinator has answered within {options.timeout_seconds:g} s. The control stays at {key}, and the "
            "first coordinator that leads answers it; take it back with: etcdctl del"
        )
    fresh = store.read(migration, after=events[-1])
    for event in fresh:
        show(event, events[0], options)
    if any(event.type == "control_refused" for event in fresh):
        return EXIT_FAILED
    if not fresh:
        _require_nothing_to_do(options, events)
        if not options.json:
            console(options).print(f"nothing to do: it is so already, {explain(events).waiting_for}", markup=False)
    if options.follow:
        wanted = {"abort": frozenset({"aborted"}), "rollback": frozenset({"rolled_back"})}
        good = wanted.get(options.command, GOOD_ENDS)
        return follow(store, migration, options, after=fresh[-1] if fresh else events[-1], good=good)
    return EXIT_OK


def _require_nothing_to_do(options: argparse.Namespace, events: list[Event]) -> None:
    """A coordinator that takes the key away without a word either has nothing to do or refuses the whole history."""
    wish = controls.parse(json.dumps(_wish(options)).encode())
    if controls.answer(wish, lifecycle.fold(events)) is not None:
        raise CargoError(
            f"the coordinator did not answer: it refuses to act on {options.id}. Its log says why, and so may "
            f"`cargoctl verify {options.id}`; a coordinator that is started anew looks at the history again"
        )


def _wish(options: argparse.Namespace) -> dict[str, Any]:
    wish: dict[str, Any] = {"control": options.command}
    for name in ("reason", "discard_target_writes", "target_off", "kib"):
        value = getattr(options, name, None)
        if value or (name == "kib" and value is not None):
            wish[name] = value
    if wish.get("target_off") and not wish.get("discard_target_writes"):
        raise UsageError(
            "--target-off gives up what the container wrote on the target since the cut-over: nobody can carry it back "
            "from a host that is off. Say --discard-target-writes as well if that is what you want"
        )
    return wish


def _answered(store: Store, key: str, timeout_seconds: float) -> bool:
    """Whether the key is gone in time; SIGINT ends the waiting."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    give_up_at = time.monotonic() + timeout_seconds
    with store.follow(key, stop=stop, tick_seconds=FOLLOW_TICK_SECONDS) as follower:
        while not stop.is_set() and store.get(key) is not None:
            remaining = give_up_at - time.monotonic()
            if remaining <= 0:
                return False
            follower.poll(min(remaining, 1.0))
    return store.get(key) is None


# --- failpoints ----------------------------------------------------------------------------------


def list_failpoints(store: Store, options: argparse.Namespace) -> int:
    """Every failpoint there is, and which are set on the bus."""
    prefix = store.keys.failpoint_sets
    in_force = {item.key[len(prefix) :]: item.value.decode("utf-8", "replace") for item in store.range(prefix)}
    if options.json:
        print_json({"failpoints": FAILPOINTS, "set": in_force})
        return EXIT_OK
    for points in FAILPOINTS.values():
        for point in points:
            print(point)
    out = console(options)
    for process, text in sorted(in_force.items()):
        out.print(Text(f"set for {printable(process)}: {printable(text)}", style="bold red"), soft_wrap=True)
    return EXIT_OK


def set_failpoints(store: Store, options: argparse.Namespace) -> int:
    """Put faults into force in one process, in place of those that were."""
    key = _failpoints_key(store, options.process)
    try:
        faults = failpoints.parse(options.spec)
    except CargoError as error:
        raise UsageError(str(error)) from error
    if not faults:
        raise UsageError("no fault is named; to take faults away: cargoctl failpoints clear PROCESS")
    unknown = sorted(set(faults) - set(points_of(options.process)))
    if unknown:
        raise UsageError(f"{options.process} has no failpoint {', '.join(unknown)}; `cargoctl failpoints` lists all")
    store.put(key, options.spec.encode())
    return _said(options, {"process": options.process, "set": sorted(faults)}, f"{options.process}: {options.spec}")


def clear_failpoints(store: Store, options: argparse.Namespace) -> int:
    """Take all faults of one process away."""
    was = store.delete(_failpoints_key(store, options.process))
    words = f"{options.process}: no faults any more" if was else f"{options.process}: there were none"
    return _said(options, {"process": options.process, "cleared": was}, words)


def _failpoints_key(store: Store, process: str) -> str:
    kind, _, host = process.partition("/")
    if process != "coordinator" and not (kind == "hostd" and host):
        raise UsageError(f"{process!r} is no process: say coordinator, or hostd/HOST")
    try:
        return store.keys.failpoints(process)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _said(options: argparse.Namespace, value: dict[str, Any], words: str) -> int:
    if options.json:
        print_json(value)
    else:
        console(options).print(words, markup=False, soft_wrap=True)
    return EXIT_OK
