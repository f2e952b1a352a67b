"""``cargoctl history | replay | verify | export | archive``: what has been recorded, and whether it is sound."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

from rich.console import Console
from rich.text import Text

from coordinator import archive, lifecycle
from coordinator.audit import audit, audit_together
from coordinator.authorship import unproven
from coordinator.ctl_output import (
    EXIT_FAILED,
    EXIT_OK,
    UsageError,
    checked_id,
    console,
    events_of,
    from_file,
    plain_event,
    print_json,
    recording_of,
    require_proven,
    show,
)
from coordinator.findings import Finding
from coordinator.lifecycle import Lifecycle
from coordinator.narrate import count
from coordinator.recording import Recording
from coordinator.replay import Frame, frames, prove
from coordinator.timeline import line_of, printable
from events.errors import IllegalEventError, SchemaError
from events.schema import Event, Head, decode_head
from events.store import Store

FOLLOW_TICK_SECONDS = 5.0


# --- history -------------------------------------------------------------------------------------


def history(store: Store, options: argparse.Namespace) -> int:
    """The timeline of one migration."""
    if options.follow:
        if options.file is not None or options.id is None:
            raise UsageError("--follow needs the id of a migration on the bus")
        return follow(store, checked_id(options.id), options)
    events = events_of(store, options)
    for event in events:
        show(event, events[0], options)
    return EXIT_OK


GOOD_ENDS = frozenset({"completed", "finalised"})


def follow(
    store: Store,
    migration: str,
    options: argparse.Namespace,
    *,
    after: Event | None = None,
    good: frozenset[str] = GOOD_ENDS,
) -> int:
    """Show events as they are appended, until the migration ends; well, if in one of ``good``. Raises SchemaError."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    state = Lifecycle()
    last: Event | None = None
    first: Event | None = None
    with store.follow(store.keys.migration(migration), stop=stop, tick_seconds=FOLLOW_TICK_SECONDS) as follower:
        for _ in follower:
            for event in store.read(migration, after=last):
                first = first or event
                last = event
                state = lifecycle.apply(state, event)
                if after is None or event.seq > after.seq:
                    show(event, first, options)
            if state.terminal:
                return EXIT_OK if state.state in good else EXIT_FAILED
    return EXIT_FAILED


# --- replay --------------------------------------------------------------------------------------


def replay(store: Store, options: argparse.Namespace) -> int:
    """Each event with the state of each machine after it, and the proof that the fold is what was recorded."""
    recorded = recording_of(store, options)
    events = recorded.events()
    require_proven(store, recorded, options)
    if options.until is not None and not 1 <= options.until <= len(events):
        raise UsageError(f"--until takes a number from 1 to {len(events)}")
    shown = events if options.until is None else events[: options.until]
    out = console(options)
    frame: Frame | None = None
    steps: list[dict[str, Any]] = []
    try:
        for frame in frames(shown):
            if options.json:
                steps.append(_plain_frame(frame))
            else:
                _show_frame(out, frame, events[0])
    except IllegalEventError as error:
        at = 1 if frame is None else frame.event.seq + 1
        raise IllegalEventError(f"event {at} cannot be replayed: {error}") from error
    assert frame is not None
    assert recorded.head is not None  # `events()` has seen to it
    whole = len(shown) == len(events)
    differences = prove(frame, decode_head(recorded.head)) if whole else []
    if options.json:
        print_json({"migration": recorded.migration, "steps": steps, "whole": whole, "differences": differences})
    elif whole:
        _show_proof(out, frame, differences)
    return EXIT_FAILED if differences else EXIT_OK


def _plain_frame(frame: Frame) -> dict[str, Any]:
    source, target = frame.agents
    return {
        "event": plain_event(frame.event),
        "coordinator": {"state": frame.after.state, "why": frame.sentence},
        "source": {"state": source.state, "why": source.why, "asked_by": source.cause},
        "target": {"state": target.state, "why": target.why, "asked_by": target.cause},
        "digest": frame.event.digest,
    }


def _show_frame(out: Console, frame: Frame, first: Event) -> None:
    out.print(line_of(frame.event, first), soft_wrap=True)
    rows = [("coordinator", frame.before.state, frame.after.state, frame.sentence)]
    for before, after in zip(frame.agents_before, frame.agents, strict=True):
        rows.append((after.role, before.state, after.state, after.why))
    for role, was, now, why in rows:
        line = Text(f"       {role:<12} ", style="dim")
        line.append(f"{was} → {now}" if was != now else now, style="bold" if was != now else "")
        line.append(f"  {printable(why)}", style="dim")
        out.print(line, soft_wrap=True)


def _show_proof(out: Console, frame: Frame, differences: list[tuple[str, str, str]]) -> None:
    for name, folded, recorded in differences:
        out.print(Text(f"{name}: the events lead to {folded!r}, the head says {recorded!r}", style="bold red"))
    if not differences:
        out.print(
            Text(
                f"the fold of {frame.after.seq} events is the recorded head: phase {frame.after.state}, "
                f"event {frame.event.uuid}, digest {frame.event.digest[:16]}…",
                style="green",
            ),
            soft_wrap=True,
        )


# --- verify --------------------------------------------------------------------------------------


def verify(store: Store, options: argparse.Namespace) -> int:
    """Everything that is wrong with one history, or with all of them."""
    across: list[Finding] = []
    if options.id is not None:
        recordings = [recording_of(store, options)]
    else:
        recordings, heads, across = _everything(store, options)
        across = across + audit_together(recordings, heads)
    found = {one.migration: sorted({*audit(one), *unproven(store, one)}) for one in recordings}
    sound = not across and not any(found.values())
    if options.json:
        _verified_json(recordings, found, across, sound)
    else:
        _show_verified(console(options), recordings, found, across)
    return EXIT_OK if sound else EXIT_FAILED


def _everything(store: Store, options: argparse.Namespace) -> tuple[list[Recording], dict[str, Head], list[Finding]]:
    """All recordings of the file or the bus, the heads that can be read, and what belongs nowhere."""
    if options.file is not None:
        recordings = list(from_file(options.file).values())
        heads = {}
        for recorded in recordings:
            try:
                heads[recorded.migration] = decode_head(recorded.head or b"")
            except SchemaError:
                continue  # `audit` says so
        return recordings, heads, []
    migrations, heads, strange = archive.names(store)
    found = [archive.recorded(store, migration) for migration in migrations]
    across = [Finding(0, "key", f"{key}: {why}") for key, why in strange.items()]
    return [recorded for recorded in found if recorded is not None], heads, across


def _verified_json(
    recordings: list[Recording], found: dict[str, list[Finding]], across: list[Finding], sound: bool
) -> None:
    migrations = {
        recorded.migration: {
            "events": len(recorded.texts),
            "findings": [finding._asdict() for finding in found[recorded.migration]],
        }
        for recorded in recordings
    }
    print_json({"sound": sound, "migrations": migrations, "across": [finding._asdict() for finding in across]})


def _show_verified(
    out: Console, recordings: list[Recording], found: dict[str, list[Finding]], across: list[Finding]
) -> None:
    for recorded in recordings:
        findings = found[recorded.migration]
        verdict = count(len(findings), "finding") if findings else "sound"
        line = Text(f"{recorded.migration}: {count(len(recorded.texts), 'event')}, ")
        line.append(verdict, style="bold red" if findings else "green")
        out.print(line)
        _show_findings(out, findings)
    if across:
        out.print(Text("across migrations:", style="bold red"))
        _show_findings(out, across)
    if not recordings and not across:
        out.print("no migrations yet")


def _show_findings(out: Console, findings: list[Finding]) -> None:
    for finding in findings:
        line = Text(f"  {finding.seq or '':>4} ")
        line.append(f"{finding.rule}: ", style="red")
        line.append(printable(finding.text))
        out.print(line, soft_wrap=True)


# --- export and archive --------------------------------------------------------------------------


def export(store: Store, options: argparse.Namespace) -> int:
    """Copy histories, broken ones too, into a file that the other commands read."""
    if bool(options.ids) == options.all:
        raise UsageError("name migrations, or say --all")
    wanted = archive.names(store)[0] if options.all else [checked_id(one) for one in dict.fromkeys(options.ids)]
    recordings = []
    for migration in wanted:
        recorded = archive.recorded(store, migration)
        if recorded is None:
            raise UsageError(f"there is no migration {migration}; `cargoctl status` lists them all")
        recordings.append(recorded)
    if not recordings:
        raise UsageError("there is no migration to export")
    archive.write(options.output, recordings)
    events = sum(len(recorded.texts) for recorded in recordings)
    if options.json:
        print_json({"file": str(options.output), "migrations": wanted, "events": events})
    else:
        console(options).print(
            f"{options.output}: {count(len(recordings), 'migration')}, {count(events, 'event')}", soft_wrap=True
        )
    return EXIT_OK


def archive_ended(store: Store, options: argparse.Namespace) -> int:
    """Move ended histories into files, and off the bus once the files are proven."""
    heads = archive.names(store)[1]
    if options.older_than < 0:
        raise UsageError("--older-than takes a number of days, 0 or more")
    ready, in_use = archive.due(heads, options.older_than, archive.utc_now())
    results = [] if options.dry_run else archive.archive(store, ready, options.output)
    failed = [result for result in results if result.problem and not result.needed]
    if options.json:
        print_json(
            {
                "due": ready,
                "in_use": in_use,
                "archived": {result.migration: str(result.file) for result in results if result.file},
                "kept": {result.migration: result.problem for result in results if result.problem},
            }
        )
        return EXIT_FAILED if failed else EXIT_OK
    out = console(options)
    for migration in ready if options.dry_run else []:
        out.print(f"{migration} would be archived", soft_wrap=True)
    for result in results:
        if result.file is not None:
            out.print(f"{result.migration} → {result.file}", soft_wrap=True)
        else:
            out.print(Text(f"{result.migration} stays: {printable(result.problem)}", style="red"), soft_wrap=True)
    for migration in in_use:
        out.print(f"{migration} stays: its container is supervised by it until it is finalised", soft_wrap=True)
    if not (ready or results or in_use):
        out.print("no ended migration is that old")
    return EXIT_FAILED if failed else EXIT_OK
