"""``cargoctl``: what a person needs to live with Cargo. It reads the bus, and writes requests and controls.

Everything it writes could be written with etcdctl just as well, but for ``archive``, which also removes. This module is
the command line; the commands stand in ``ctl_fleet.py`` (list, migrate, status), ``ctl_history.py`` (history, replay,
verify, export, archive), ``ctl_control.py`` (why, the controls, failpoints) and ``ctl_trust.py`` (fleet).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TypeAlias

from coordinator import ctl_control, ctl_fleet, ctl_history, ctl_trust
from coordinator.controls import CONTROLS
from coordinator.ctl_output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Command, UsageError
from events.connecting import connect, exposure
from events.errors import CargoError, SchemaError, StoreUnavailableError
from events.settings import (
    DEFAULT_CONFIG,
    ETCD_OPTIONS,
    TRUST_OPTIONS,
    EtcdSettings,
    Reader,
    SettingsError,
    TrustSettings,
)

ENDPOINTS_VARIABLE = "CARGO_ETCD"
DEFAULT_ENDPOINT = "127.0.0.1:2379"
ANSWER_SECONDS = 30.0
"""How long a control waits for its answer: a coordinator that died is replaced within some ten seconds."""
RETENTION_DAYS = 30.0

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse has no public name for it


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargoctl",
        description="Looks at migrations of containers, starts them and steers them.",
        epilog="Exit codes: 0 done; 1 failed, aborted, rejected or refused, or something is wrong; 2 wrong usage.",
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
    _fleet_commands(commands)
    _history_commands(commands)
    _control_commands(commands)
    _failpoint_commands(commands)
    ctl_trust.arguments(_add(commands, "fleet", ctl_trust.list_members, "who belongs to a secured fleet"))
    return made


def _add(commands: Commands, name: str, run: Command, words_for_help: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(name, help=words_for_help, description=words_for_help)
    sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="output for programs")
    sub.set_defaults(run=run)
    return sub


def _fleet_commands(commands: Commands) -> None:
    _add(commands, "list", ctl_fleet.list_hosts, "hosts and the containers that run there")
    sub = _add(commands, "migrate", ctl_fleet.migrate, "move a container, and follow the migration to its end")
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
    sub.add_argument("--image", choices=("transfer", "pull", "refuse"), help="what to do if the target lacks the image")
    sub.add_argument("--remote", choices=("sshfs", "nfs"), help="how the target looks at what has not arrived yet")
    sub.add_argument(
        "--start",
        choices=("warm", "cold"),
        help="whether the target may start it up to its first instruction beforehand",
    )
    sub.add_argument(
        "--without", action="append", metavar="NAME", help="what it may go without there, such as device:/dev/kvm"
    )
    sub.add_argument(
        "--privileged", action="store_true", default=None, help="consent to move a privileged container with that right"
    )
    sub.add_argument(
        "--no-rootfs",
        dest="rootfs",
        action="store_false",
        default=None,
        help="leave behind what the container wrote outside of its mounts",
    )
    sub.add_argument("--detach", action="store_true", help="do not wait")
    sub = _add(commands, "status", ctl_fleet.status, "where migrations stand")
    sub.add_argument("id", nargs="?", help="one migration (default: all)")


def _history_commands(commands: Commands) -> None:
    def on_one(name: str, run: Command, words: str) -> argparse.ArgumentParser:
        sub = _add(commands, name, run, words)
        sub.add_argument("id", nargs="?", help="the migration; with --file only where the file holds several")
        sub.add_argument("--file", type=Path, metavar="FILE", help="read an exported history instead of the bus")
        return sub

    sub = on_one("history", ctl_history.history, "the timeline of a migration")
    sub.add_argument("--follow", action="store_true", help="go on until it ends")
    sub = on_one("replay", ctl_history.replay, "fold a history step by step and show the state of each machine")
    sub.add_argument("--until", type=int, metavar="SEQ", help="stop after this event")
    on_one("verify", ctl_history.verify, "everything that is wrong with one history, or with all of them")
    on_one("why", ctl_control.why, "what a migration waits for, since when, for whom, and what would change that")
    sub = _add(commands, "export", ctl_history.export, "copy histories into a file that the other commands read")
    sub.add_argument("ids", nargs="*", metavar="ID", help="migrations to export")
    sub.add_argument("--all", action="store_true", help="all of them")
    sub.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON Lines; written as a whole")
    sub = _add(commands, "archive", ctl_history.archive_ended, "move ended histories into files, and off the bus")
    sub.add_argument(
        "--older-than",
        type=float,
        default=RETENTION_DAYS,
        metavar="DAYS",
        help=f"only those whose newest event is that old (default {RETENTION_DAYS:g})",
    )
    sub.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory, one file a migration")
    sub.add_argument("--dry-run", action="store_true", help="only say which")


def _control_commands(commands: Commands) -> None:
    words = {
        "abort": "give up before the claim: the container stays on the source",
        "rollback": "go back after the claim: the container returns to the source with what it wrote on the target",
        "finalise": "fold the union into plain volumes now, which costs a restart of the container",
        "pause": "order nothing new before the container is stopped",
        "resume": "go on after a pause",
        "retry": "try a failing step again now, instead of when its pause ends",
        "bwlimit": "limit the transfers from now on",
    }
    for name in CONTROLS:
        sub = _add(commands, name, ctl_control.control, words.get(name, f"ask the coordinator to {name} a migration"))
        sub.add_argument("id")
        sub.add_argument("--reason", default="", help="kept in the history")
        sub.add_argument("--follow", action="store_true", help="then go on until the migration ends")
        sub.add_argument(
            "--timeout-seconds",
            type=float,
            default=ANSWER_SECONDS,
            help=f"how long to wait for the answer (default {ANSWER_SECONDS:g})",
        )
        if name == "bwlimit":
            sub.add_argument("--kib", type=int, required=True, help="KiB per second, 0 for no limit")
        if name == "rollback":
            sub.add_argument(
                "--discard-target-writes",
                action="store_true",
                help="give up whatever the container wrote on the target since the cut-over",
            )
            sub.add_argument(
                "--target-off",
                metavar="WHO",
                default="",
                help="the target is dead, and WHO vouches that it is powered off and stays off",
            )


def _failpoint_commands(commands: Commands) -> None:
    sub = _add(commands, "failpoints", ctl_control.list_failpoints, "faults on demand: list, set, clear")
    verbs = sub.add_subparsers(dest="verb", metavar="VERB")
    _add(verbs, "list", ctl_control.list_failpoints, "every failpoint there is, and which are set")
    one = _add(verbs, "set", ctl_control.set_failpoints, "put faults into force, in place of those that were")
    one.add_argument("process", metavar="PROCESS", help="coordinator, or hostd/HOST")
    one.add_argument(
        "spec", metavar="SPEC", help="point=kill|error(text)|delay(seconds)|pause, @n for the n-th pass; …"
    )
    one = _add(verbs, "clear", ctl_control.clear_failpoints, "take all faults of a process away")
    one.add_argument("process", metavar="PROCESS", help="coordinator, or hostd/HOST")


def _settings(options: argparse.Namespace) -> tuple[EtcdSettings, TrustSettings]:
    path = options.config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() and not options.etcd else None)
    settings, trust = EtcdSettings(endpoints=()), TrustSettings()
    if path is not None:
        known = {"etcd": ETCD_OPTIONS, "trust": TRUST_OPTIONS}
        reader = Reader(path, known | dict.fromkeys(("coordinator", "host", "log", "docker", "moves", "ssh"), ()))
        settings, trust = reader.etcd(), reader.trust()
    endpoints = tuple(options.etcd.replace(",", " ").split()) or settings.endpoints or (DEFAULT_ENDPOINT,)
    return EtcdSettings(endpoints, settings.prefix, settings.ca, settings.cert, settings.key), trust


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        settings, trust = _settings(options)
        if options.command == "fleet":
            settings, trust = ctl_trust.defaults(settings, options.directory), TrustSettings()
            options.endpoints = settings.endpoints
        exposed = exposure(settings.endpoints, settings, trust)
        if exposed and options.command != "fleet":
            print(f"cargoctl: {exposed}", file=sys.stderr)
        store = connect(settings, settings.endpoints, trust)
        try:
            code: int = options.run(store, options)
            return code
        finally:
            store.close()
    except (UsageError, SettingsError) as error:
        print(f"cargoctl: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SchemaError as error:
        print(f"cargoctl: this history must not be acted on: {error}", file=sys.stderr)
        return EXIT_FAILED
    except CargoError as error:
        guessed = isinstance(error, StoreUnavailableError) and settings.endpoints == (DEFAULT_ENDPOINT,)
        hint = f". If etcd is elsewhere, say so with --etcd, ${ENDPOINTS_VARIABLE} or -c" if guessed else ""
        print(f"cargoctl: {error}{hint}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing may be flushed there when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


__all__ = ["EXIT_FAILED", "EXIT_OK", "EXIT_USAGE", "main", "parser"]

if __name__ == "__main__":
    sys.exit(main())
