"""``cargo-hostd``: reads its configuration, connects to the bus and to Docker, serves its host."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from events import logs
from events.connecting import connect
from events.errors import CargoError
from events.failpoints import Failpoints
from events.settings import DEFAULT_CONFIG
from hostd.effects.base import Workbench
from hostd.engine import Engine
from hostd.service import Service
from hostd.settings import HostSettings, load
from hostd.transport import Transport
from hostd.warm import shut_left_gates

if TYPE_CHECKING:
    import structlog

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargo-hostd",
        description="Cargo's agent: manages containers and their data on this Docker host.",
        epilog="Exit codes: 0 clean stop, 1 failure, 2 wrong usage or configuration.",
    )
    made.add_argument(
        "-c",
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="CONFIG",
        help="configuration file, INI (default: ./config.cfg); docs/samples/ explains each option",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        settings = load(options.config)
        failpoints = Failpoints.from_environment()
    except CargoError as error:
        print(f"cargo-hostd: {error}", file=sys.stderr)
        return EXIT_USAGE
    if os.geteuid() != 0:
        print(
            "cargo-hostd: must run as root: it mounts, and reads and writes other users' files",
            file=sys.stderr,
        )
        return EXIT_USAGE
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log = logs.configure(settings.log, process="hostd", host=settings.name)
    try:
        return _run(settings, failpoints, stop, log)
    except CargoError as error:
        log.error("giving up", reason=str(error))
        return EXIT_FAILED


def _run(
    settings: HostSettings, failpoints: Failpoints, stop: threading.Event, log: structlog.stdlib.BoundLogger
) -> int:
    for directory in (settings.state_dir, settings.run_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    bench = Workbench(
        settings=settings,
        engine=Engine(str(settings.docker_socket)),
        transport=Transport(settings.run_dir / "ssh"),
    )
    shut_left_gates(log)
    store = connect(settings.etcd, settings.etcd.endpoints)
    log.info("serving", address=settings.address, etcd=list(settings.etcd.endpoints))
    try:
        Service(store, bench, failpoints, log).run(stop)
    finally:
        store.close()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
