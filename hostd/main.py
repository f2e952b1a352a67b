"""``cargo-hostd``: reads its configuration, connects to the bus and to Docker, serves its host.

Or does one thing for it and ends: ``check`` says what the host lacks, ``mounts`` mounts at boot what stood.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from events import logs, supervisor
from events.connecting import connect, exposure
from events.errors import CargoError
from events.failpoints import Failpoints
from events.following import StopEvent
from events.settings import DEFAULT_CONFIG
from events.version import version
from hostd.effects.base import Workbench
from hostd.engine import Engine
from hostd.service import Service
from hostd.settings import HostSettings, load
from hostd.ssh_keys import authorized_line
from hostd.standing import mount_again
from hostd.transport import Transport
from hostd.warm import shut_left_gates

if TYPE_CHECKING:
    import structlog

    from events.store import Store
    from events.trust import Trust
    from hostd.pins import Pins
    from hostd.renewal import Renewal

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargo-hostd",
        description="Cargo's agent: manages containers and their data on this Docker host.",
        epilog="Exit codes: 0 clean stop, or nothing is missing; 1 failure, or something is; 2 wrong usage or configuration. "
        "`cargo-hostd join TOKEN` makes this host a member of a secured fleet.",
    )
    made.add_argument(
        "command",
        nargs="?",
        choices=("run", "check", "mounts"),
        default="run",
        help="run: serve this host (default). check: say what this host lacks, in words, and change nothing. "
        "mounts: at boot, before Docker, mount the unions that stood",
    )
    made.add_argument("--json", action="store_true", help="check: as data")
    made.add_argument("--version", action="version", version=f"cargo-hostd {version()}")
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
    """Run until SIGTERM or SIGINT; or ``join`` a fleet. Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["join"]:
        from hostd import joining  # noqa: PLC0415 - an agent at work needs none of it

        return joining.main(given[1:])
    options = parser().parse_args(given)
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
    if options.command == "check":
        from hostd.checkup import check  # noqa: PLC0415 - the agent itself must not carry what only this needs

        return check(settings, as_json=options.json)
    log = logs.configure(settings.log, process="hostd", host=settings.name)
    if options.command == "mounts":
        return _mounts(settings, log)
    stop = StopEvent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
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
    exposed = exposure(settings.etcd.endpoints, settings.etcd, settings.trust)
    if exposed:
        log.warning(exposed)
    store = connect(settings.etcd, settings.etcd.endpoints, settings.trust)
    log.info("serving", address=settings.address, etcd=list(settings.etcd.endpoints))
    supervisor.tell(supervisor.READY)
    keepers: list[Pins | Renewal] = []
    members_changed = None
    try:
        service = Service(store, bench, failpoints, log)
        # What has been loaded stays. Looking through it again takes the garbage collector 17 ms, also in the middle of an
        # outage.
        gc.freeze()
        if store.trust is not None:
            pins, renewal = _keepers(settings, store, store.trust, service, log)
            keepers = [pins] if renewal is None else [pins, renewal]
            members_changed = pins.wake
        for keeper in keepers:
            keeper.start()
        service.run(stop, members_changed)
    finally:
        for keeper in keepers:
            keeper.close()
        store.close()
    return EXIT_OK


def _keepers(
    settings: HostSettings, store: Store, trust: Trust, service: Service, log: structlog.stdlib.BoundLogger
) -> tuple[Pins, Renewal | None]:
    """What a host of a secured fleet keeps as the fleet's members are: SSH pins, and its own certificate."""
    # Loaded only here: they bring what only a secured fleet needs in memory.
    from events.crypto import SigningKey  # noqa: PLC0415
    from hostd.pins import Pins  # noqa: PLC0415
    from hostd.renewal import Renewal  # noqa: PLC0415

    line = partial(authorized_line, state_dir=settings.state_dir)
    files = (settings.ssh_known_hosts, settings.ssh_authorized_keys)
    pins = Pins(settings.name, partial(trust.members, 0.0), *files, log, line, service.bar)
    if settings.etcd.cert is None or settings.trust.signing_key is None:
        return pins, None
    return pins, Renewal(settings.name, store, settings.etcd, SigningKey.load(settings.trust.signing_key), log)


def _mounts(settings: HostSettings, log: structlog.stdlib.BoundLogger) -> int:
    """Mount again what stood. Each in the log; one that fails is the agent's to repair, once it runs."""
    failed = False
    for done in mount_again(settings.state_dir, patience_seconds=settings.read_patience_seconds):
        if done.trouble:
            failed = True
            log.error("not mounted", migration=done.migration, place=str(done.place), reason=done.trouble)
        else:
            log.info("mounted again", migration=done.migration, place=str(done.place))
    return EXIT_FAILED if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
