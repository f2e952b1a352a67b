"""``cargoctl``: what a person needs to live with Cargo. It reads the bus, and writes requests and controls.

Everything it writes could be written with etcdctl just as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator import lifecycle
from coordinator.controls import CONTROLS
from coordinator.narrate import size
from coordinator.timeline import line_of
from events.connecting import connect
from events.errors import CargoError, SchemaError
from events.keyspace import valid_migration_id
from events.records import decode_container, decode_host
from events.schema import TERMINAL_PHASES, Event, plain
from events.settings import DEFAULT_CONFIG, ETCD_OPTIONS, EtcdSettings, Reader
from events.store import Store

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
ENDPOINTS_VARIABLE = "CARGO_ETCD"
DEFAULT_ENDPOINT = "127.0.0.1:2379"
FOLLOW_TICK_SECONDS = 5.0

Command = Callable[[Store, argparse.Namespace], int]


class UsageError(CargoError):
    """What was asked for cannot be asked for."""


# --- list ----------------------------------------------------------------------------------------


def list_hosts(store: Store, options: argparse.Namespace) -> int:
    """Hosts that are registered now, and the containers on them."""
    hosts = []
    for item in store.range(store.keys.hosts):
        name = item.key.rpartition("/")[2]
        record = decode_host(item.value)
        containers = [decode_container(pair.value) for pair in store.range(store.keys.inventory(name))]
        hosts.append((name, record, containers))
    if options.json:
        import msgspec  # noqa: PLC0415 - only this branch needs it

        _print_json(
            [
                {"host": name, **msgspec.to_builtins(record), "containers": msgspec.to_builtins(containers)}
                for name, record, containers in hosts
            ]
        )
        return EXIT_OK
    table = Table("host", "address", "container", "state", "image", "data", "ports", box=None, pad_edge=False)
    for name, record, containers in hosts:
        if not containers:
            table.add_row(name, record.address, Text("no containers", style="dim"))
        for container in containers:
            state = "paused" if container.paused else "running" if container.running else "stopped"
            known = [mount.size_bytes for mount in container.mounts if mount.size_bytes is not None]
            ports = ", ".join(f"{port.host_port}→{port.container_port}" for port in container.ports)
            table.add_row(
                name,
                record.address,
                container.name,
                state,
                container.image,
                size(sum(known)) if known else "",
                ports,
            )
    _console(options).print(table if hosts else "no host is registered: is cargo-hostd running anywhere?")
    return EXIT_OK


# --- migrate -------------------------------------------------------------------------------------


def migrate(store: Store, options: argparse.Namespace) -> int:
    """Write a request and follow it to its end."""
    migration = options.id or f"{options.container}-{uuid.uuid4().hex[:6]}"
    if not valid_migration_id(migration):
        raise UsageError(f"{migration!r} is not usable as an id: letters, digits, '.', '_', '-', at most 64")
    request: dict[str, Any] = {
        "container": options.container,
        "source": options.source,
        "target": options.target,
    }
    for name in (
        "strategy",
        "downtime_budget_seconds",
        "max_rounds",
        "bwlimit_kib",
        "stop_timeout_seconds",
        "on_release",
    ):
        value = getattr(options, name)
        if value is not None:
            request[name] = value
    key = store.keys.request(migration)
    if store.head(migration) is not None or not store.put_if_absent(key, json.dumps(request).encode()):
        raise UsageError(f"there is a migration {migration} already; choose another id")
    if not options.json:
        _console(options).print(f"etcdctl put {key} '{json.dumps(request)}'", style="bold", soft_wrap=True)
    if options.detach:
        return EXIT_OK
    return _follow(store, migration, options)


# --- history -------------------------------------------------------------------------------------


def history(store: Store, options: argparse.Namespace) -> int:
    """The timeline of one migration."""
    if options.follow:
        return _follow(store, options.id, options)
    events = _events(store, options.id)
    for event in events:
        _show(event, events[0], options)
    return EXIT_OK


def _events(store: Store, migration: str) -> list[Event]:
    if not valid_migration_id(migration):
        raise UsageError(f"{migration!r} is not the id of a migration")
    events = store.read(migration)
    if not events:
        raise UsageError(f"there is no migration {migration}; `cargoctl status` lists them all")
    return events


def _show(event: Event, first: Event, options: argparse.Namespace) -> None:
    if options.json:
        print(
            json.dumps(
                {
                    "seq": event.seq,
                    "type": event.type,
                    "at": event.at,
                    "by": event.by,
                    "cause": event.cause,
                    "epoch": event.epoch,
                    "data": plain(event.data),
                }
            ),
            flush=True,
        )
        return
    _console(options).print(line_of(event, first), soft_wrap=True)


def _follow(store: Store, migration: str, options: argparse.Namespace) -> int:
    """Show events as they are appended, until the migration ends."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    last: Event | None = None
    first: Event | None = None
    with store.follow(store.keys.migration(migration), stop=stop, tick_seconds=FOLLOW_TICK_SECONDS) as follower:
        for _ in follower:
            for event in store.read(migration, after=last):
                first = first or event
                last = event
                _show(event, first, options)
                if event.type in TERMINAL_PHASES:
                    return EXIT_OK if event.type in ("completed", "finalised") else EXIT_FAILED
    return EXIT_FAILED


# --- status --------------------------------------------------------------------------------------


def status(store: Store, options: argparse.Namespace) -> int:
    """Where one migration stands, or all of them."""
    if options.id:
        return _status_of(store, options)
    result = store.heads()
    if options.json:
        import msgspec  # noqa: PLC0415

        _print_json({"migrations": msgspec.to_builtins(result.heads), "broken": result.broken})
        return EXIT_OK
    table = Table("migration", "container", "from", "to", "phase", "events", "since", box=None, pad_edge=False)
    for name, head in sorted(result.heads.items(), key=lambda pair: pair[1].at):
        style = "red" if head.phase in ("aborted", "rejected") else "green" if head.terminal else "yellow"
        table.add_row(
            name,
            head.container,
            head.source,
            head.target,
            Text(head.phase, style=style),
            str(head.seq),
            head.at,
        )
    for name, why in result.broken.items():
        table.add_row(name, Text(f"cannot be read: {why}", style="red"))
    _console(options).print(table if table.row_count else "no migrations yet")
    return EXIT_OK


def _status_of(store: Store, options: argparse.Namespace) -> int:
    events = _events(store, options.id)
    state = lifecycle.fold(events)
    waiting = lifecycle.waiting_for(state)
    progress = {}
    for item in store.range(store.keys.progress_of(options.id)):
        progress[item.key.rpartition("/")[2]] = json.loads(item.value)
    if options.json:
        _print_json(
            {
                "id": options.id,
                "phase": state.state,
                "seq": state.seq,
                "waiting": waiting,
                "paused": state.paused,
                "rounds": len(state.rounds),
                "progress": progress,
            }
        )
        return EXIT_OK
    console = _console(options)
    console.print(f"{options.id}: [bold]{state.state}[/bold], {waiting}")
    if state.paused:
        console.print("paused by a person; `cargoctl resume` goes on")
    for number, done in enumerate(state.rounds, 1):
        console.print(f"  round {number}: {size(done.bytes_moved)} in {done.duration_seconds:.1f} s")
    for host, fields in progress.items():
        console.print(f"  {host}: " + ", ".join(f"{name} {value}" for name, value in fields.items()))
    return EXIT_OK


# --- controls ------------------------------------------------------------------------------------


def control(store: Store, options: argparse.Namespace) -> int:
    """Write a control key and show what the coordinator answers."""
    events = _events(store, options.id)
    wish: dict[str, Any] = {"control": options.command}
    if options.reason:
        wish["reason"] = options.reason
    if options.command == "bwlimit":
        wish["kib"] = options.kib
    key = store.keys.control(options.id)
    if not store.put_if_absent(key, json.dumps(wish).encode()):
        raise UsageError(f"another control for {options.id} is waiting for the coordinator; is one running?")
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    with store.follow(key, stop=stop, tick_seconds=FOLLOW_TICK_SECONDS) as follower:
        for _ in follower:
            if store.get(key) is None:
                break
    fresh = store.read(options.id, after=events[-1])
    for event in fresh:
        _show(event, events[0], options)
    return EXIT_FAILED if any(event.type == "control_refused" for event in fresh) else EXIT_OK


# --- the command line ----------------------------------------------------------------------------


def _console(options: argparse.Namespace) -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200, no_color=options.no_color)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargoctl",
        description="Looks at migrations of containers, starts them and steers them.",
        epilog="Exit codes: 0 done, 1 failed, aborted or rejected, 2 wrong usage.",
    )
    made.add_argument(
        "-c",
        "--config",
        type=Path,
        default=None,
        metavar="CONFIG",
        help=f"take [etcd] from this file (default: ./{DEFAULT_CONFIG} if there is one)",
    )
    made.add_argument(
        "--etcd",
        metavar="ENDPOINTS",
        default=os.environ.get(ENDPOINTS_VARIABLE, ""),
        help=f"etcd endpoints, or ${ENDPOINTS_VARIABLE} (default: {DEFAULT_ENDPOINT})",
    )
    made.add_argument("--json", action="store_true", help="output for programs")
    made.add_argument("--no-color", action="store_true", help="plain text")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, words_for_help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words_for_help, description=words_for_help)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="output for programs")
        sub.set_defaults(run=run)
        return sub

    add("list", list_hosts, "hosts and the containers that run there")
    sub = add("migrate", migrate, "move a container, and follow the migration to its end")
    sub.add_argument("container")
    sub.add_argument("source", help="host it runs on")
    sub.add_argument("target", help="host to move it to")
    sub.add_argument("--id", help="name of the migration (default: made from the container's)")
    sub.add_argument("--strategy", help="hybrid (default), postcopy, precopy, cold or auto")
    sub.add_argument("--downtime-budget-seconds", type=float, help="finish a remainder that fits, instead of a union")
    sub.add_argument("--max-rounds", type=int, help="upper bound of pre-copy rounds (default 5)")
    sub.add_argument("--bwlimit-kib", type=int, help="limit of the transfers, KiB per second")
    sub.add_argument("--stop-timeout-seconds", type=int, help="grace before the container is killed")
    sub.add_argument("--on-release", choices=("keep", "remove"), help="what becomes of the source's copy")
    sub.add_argument("--detach", action="store_true", help="do not wait")
    sub = add("status", status, "where migrations stand")
    sub.add_argument("id", nargs="?", help="one migration (default: all)")
    sub = add("history", history, "the timeline of a migration")
    sub.add_argument("id")
    sub.add_argument("--follow", action="store_true", help="go on until it ends")
    for name in CONTROLS:
        sub = add(name, control, f"ask the coordinator to {name} a migration")
        sub.add_argument("id")
        sub.add_argument("--reason", default="", help="kept in the history")
        if name == "bwlimit":
            sub.add_argument("--kib", type=int, required=True, help="KiB per second, 0 for no limit")
    return made


def _etcd_settings(options: argparse.Namespace) -> EtcdSettings:
    path = options.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() and not options.etcd else None)
    settings = EtcdSettings(endpoints=())
    if path is not None:
        known = {"etcd": ETCD_OPTIONS, "coordinator": (), "host": (), "log": (), "docker": (), "ssh": ()}
        reader = Reader(path, known)
        settings = reader.etcd()
    endpoints = tuple(options.etcd.replace(",", " ").split()) or settings.endpoints or (DEFAULT_ENDPOINT,)
    return EtcdSettings(endpoints, settings.prefix, settings.ca, settings.cert, settings.key)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        settings = _etcd_settings(options)
        store = connect(settings, settings.endpoints)
        try:
            code: int = options.run(store, options)
            return code
        finally:
            store.close()
    except UsageError as error:
        print(f"cargoctl: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SchemaError as error:
        print(f"cargoctl: this history must not be acted on: {error}", file=sys.stderr)
        return EXIT_FAILED
    except CargoError as error:
        print(f"cargoctl: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
