"""``cargoctl list | migrate | status``: what runs where, moving it, and where that stands."""

from __future__ import annotations

import argparse
import json
import uuid
from typing import Any

import msgspec
from rich.table import Table
from rich.text import Text

from coordinator import lifecycle, narrate
from coordinator.ctl_history import follow
from coordinator.ctl_output import EXIT_OK, UsageError, checked_id, console, print_json
from coordinator.narrate import size
from coordinator.timeline import printable
from events.errors import SchemaError
from events.keyspace import valid_migration_id
from events.records import ContainerRecord, HostRecord, decode_container, decode_host
from events.store import KeyValue, Store

REQUEST_OPTIONS = (
    "strategy",
    "downtime_budget_seconds",
    "max_rounds",
    "bwlimit_kib",
    "stop_timeout_seconds",
    "on_release",
    "image",
    "remote",
    "start",
    "without",
    "privileged",
    "rootfs",
)

# --- list ----------------------------------------------------------------------------------------


def list_hosts(store: Store, options: argparse.Namespace) -> int:
    """Hosts that are registered now, and the containers on them."""
    hosts: list[tuple[str, HostRecord, list[ContainerRecord]]] = []
    unreadable: dict[str, str] = {}
    for item in store.range(store.keys.hosts):
        name = item.key.rpartition("/")[2]
        try:
            record = decode_host(item.value)
        except SchemaError as error:
            unreadable[name] = str(error)
            continue
        containers = []
        for pair in store.range(store.keys.inventory(name)):
            try:
                containers.append(decode_container(pair.value))
            except SchemaError as error:
                unreadable[f"{name}/{pair.key.rpartition('/')[2]}"] = str(error)
        hosts.append((name, record, containers))
    if options.json:
        known = [
            {"host": name, **msgspec.to_builtins(record), "containers": msgspec.to_builtins(containers)}
            for name, record, containers in hosts
        ]
        print_json(known)
        return EXIT_OK
    out = console(options)
    out.print(_fleet(hosts) if hosts else "no host is registered: is cargo-hostd running anywhere?")
    for what, why in unreadable.items():
        out.print(Text(f"{printable(what)} cannot be read: {printable(why)}", style="red"), soft_wrap=True)
    return EXIT_OK


def _fleet(hosts: list[tuple[str, HostRecord, list[ContainerRecord]]]) -> Table:
    table = Table("host", "address", "container", "state", "image", "data", "ports", box=None, pad_edge=False)
    for name, record, containers in hosts:
        if not containers:
            table.add_row(name, Text(printable(record.address)), Text("no containers", style="dim"))
        for container in containers:
            state = "paused" if container.paused else "running" if container.running else "stopped"
            known = [mount.size_bytes for mount in container.mounts if mount.size_bytes is not None]
            ports = ", ".join(f"{port.host_port}→{port.container_port}" for port in container.ports)
            cells = (record.address, container.name, state, container.image, size(sum(known)) if known else "", ports)
            table.add_row(name, *(Text(printable(cell)) for cell in cells))
    return table


# --- migrate -------------------------------------------------------------------------------------


def migrate(store: Store, options: argparse.Namespace) -> int:
    """Write a request and follow it to its end."""
    migration = options.id or f"{options.container[:40]}-{uuid.uuid4().hex[:6]}"
    if not valid_migration_id(migration):
        raise UsageError(f"{migration!r} is not usable as an id: letters, digits, '.', '_', '-', at most 64")
    request: dict[str, Any] = {
        "container": options.container,
        "source": options.source,
        "target": options.target,
    }
    for name in REQUEST_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            request[name] = value
    key = store.keys.request(migration)
    if store.head(migration) is not None or not store.put_if_absent(key, json.dumps(request).encode()):
        raise UsageError(f"there is a migration {migration} already; choose another id")
    if not options.json:
        text = f"etcdctl put {key} '{json.dumps(request)}'"
        console(options).print(text, style="bold", soft_wrap=True, markup=False)
    if options.detach:
        return EXIT_OK
    return follow(store, migration, options)


# --- status --------------------------------------------------------------------------------------


def status(store: Store, options: argparse.Namespace) -> int:
    """Where one migration stands, or all of them."""
    if options.id:
        return _status_of(store, options)
    result = store.heads()
    if options.json:
        print_json({"migrations": msgspec.to_builtins(result.heads), "broken": result.broken})
        return EXIT_OK
    table = Table("migration", "container", "from", "to", "phase", "events", "since", box=None, pad_edge=False)
    for name, head in sorted(result.heads.items(), key=lambda pair: pair[1].at):
        style = "red" if head.phase in ("aborted", "rejected") else "green" if head.terminal else "yellow"
        cells = [Text(printable(cell)) for cell in (name, head.container, head.source, head.target)]
        cells += [Text(printable(head.phase), style=style), Text(str(head.seq)), Text(printable(head.at))]
        table.add_row(*cells)
    for name, why in result.broken.items():
        table.add_row(Text(printable(name)), Text(f"cannot be read: {printable(why)}", style="red"))
    console(options).print(table if table.row_count else "no migrations yet")
    return EXIT_OK


def _status_of(store: Store, options: argparse.Namespace) -> int:
    events = store.read(checked_id(options.id))
    if not events:
        raise UsageError(f"there is no migration {options.id}; `cargoctl status` lists them all")
    state = lifecycle.fold(events)
    waiting = lifecycle.waiting_for(state)
    warnings = [warning for event in events for warning in narrate.warnings(event.data)]
    progress = {
        item.key.rpartition("/")[2]: _progress(item) for item in store.range(store.keys.progress_of(options.id))
    }
    if options.json:
        print_json(
            {
                "id": options.id,
                "phase": state.state,
                "seq": state.seq,
                "waiting": waiting,
                "paused": state.paused,
                "rounds": len(state.rounds),
                "progress": progress,
                "warnings": warnings,
            }
        )
        return EXIT_OK
    out = console(options)
    line = Text(f"{options.id}: ")
    line.append(state.state, style="bold")
    line.append(f", {printable(waiting)}")
    out.print(line, soft_wrap=True)
    for warning in warnings:
        out.print(Text(f"  note: {printable(warning)}", style="yellow"), soft_wrap=True)
    if state.paused:
        out.print("paused by a person; `cargoctl resume` goes on")
    for number, done in enumerate(state.rounds, 1):
        out.print(f"  round {number}: {size(done.bytes_moved)} in {done.duration_seconds:.1f} s")
    for host, fields in progress.items():
        out.print(Text(printable(f"  {host}: {narrate.progress(fields)}")), soft_wrap=True)
    return EXIT_OK


def _progress(item: KeyValue) -> dict[str, Any]:
    """What a host says of a transfer; it is only shown, so a value that cannot be read is nothing."""
    try:
        value = json.loads(item.value)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
