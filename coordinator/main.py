"""``cargo-coordinator``: reads its configuration, connects to the bus, leads when it is its turn.

Or ``check``: says what this machine and the bus lack, and ends.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from coordinator.access import Access
from coordinator.embedded import EmbeddedEtcd
from coordinator.service import Service
from coordinator.settings import CoordinatorSettings, load
from events import logs, supervisor
from events.connecting import connect, exposure
from events.errors import CargoError
from events.etcd_users import EtcdUsers
from events.failpoints import Failpoints
from events.settings import DEFAULT_CONFIG
from events.version import version

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargo-coordinator",
        description="Orchestrates migrations of Docker containers through etcd.",
        epilog="Exit codes: 0 clean stop, or nothing is missing; 1 failure, or something is; 2 wrong usage or configuration.",
    )
    made.add_argument(
        "command",
        nargs="?",
        choices=("run", "check"),
        default="run",
        help="run: serve (default). check: say what this machine and etcd lack, in words, and change nothing",
    )
    made.add_argument("--json", action="store_true", help="check: as data")
    made.add_argument("--version", action="version", version=f"cargo-coordinator {version()}")
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
        print(f"cargo-coordinator: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.command == "check":
        from coordinator.checkup import check  # noqa: PLC0415 - the daemon must not carry what only this needs

        return check(settings, as_json=options.json)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return _run(settings, failpoints, stop)


def _run(settings: CoordinatorSettings, failpoints: Failpoints, stop: threading.Event) -> int:
    log = logs.configure(settings.log, process="coordinator", host=settings.name)
    embedded = None
    endpoints = settings.etcd.endpoints
    try:
        if not endpoints:
            embedded = EmbeddedEtcd(settings.data_dir, settings.client_port, settings.peer_port)
            embedded.start()
            endpoints = (embedded.endpoint,)
            log.info(
                "no etcd endpoint configured: running an embedded etcd",
                endpoint=embedded.endpoint,
                data_dir=str(settings.data_dir),
            )
        exposed = exposure(endpoints, settings.etcd, settings.trust)
        if exposed:
            log.warning(exposed)
        if settings.etcd.cert is not None:
            from events import certificates  # noqa: PLC0415 - half of what a coordinator without them takes in memory

            for words in certificates.warnings(settings.etcd):
                log.warning(words)
        store = connect(settings.etcd, endpoints, settings.trust)
        try:
            supervisor.tell(supervisor.READY)
            access = None
            if store.trust is not None and settings.etcd.cert is not None:
                access = Access(store.keys, EtcdUsers(store), store.trust)
            Service(store, settings.name, failpoints, log, access).run(stop)
        finally:
            store.close()
    except CargoError as error:
        log.error("giving up", reason=str(error))
        return EXIT_FAILED
    finally:
        if embedded is not None:
            embedded.stop()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
