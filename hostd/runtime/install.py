"""``cargo-hostd-runtime``: makes the runtime of warm starts known to this host's dockerd, or takes it away again.

Writes the runtime into dockerd's configuration, keeping all else in it, and has dockerd read it anew (SIGHUP): no
container is restarted. It must never replace a configuration that it cannot read.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from events.errors import CargoError
from hostd.engine import Engine
from hostd.fold import write_durably
from hostd.gate import RUNTIME

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
WRAPPER = Path(__file__).with_name("cargo-runc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargo-hostd-runtime",
        description="Makes the runtime of warm starts known to this host's Docker. Running containers are not touched.",
        epilog="Exit codes: 0 done, 1 it could not be done and nothing was changed, 2 wrong usage.",
    )
    made.add_argument("verb", choices=("install", "remove"))
    made.add_argument(
        "--place",
        type=Path,
        default=Path("/usr/local/libexec/cargo/cargo-runc"),
        help="where the runtime goes (default: %(default)s)",
    )
    made.add_argument(
        "--configuration", type=Path, default=Path("/etc/docker/daemon.json"), help="dockerd's (default: %(default)s)"
    )
    made.add_argument("--pid-file", type=Path, default=Path("/run/docker.pid"), help="dockerd's (default: %(default)s)")
    made.add_argument(
        "--socket",
        type=Path,
        default=Path("/run/docker.sock"),
        help="dockerd's, asked by remove (default: %(default)s)",
    )
    made.add_argument(
        "--force",
        action="store_true",
        help="remove it although containers here were made with it, and cannot start then",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Install or remove. Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.verb == "install":
            install(options.place, options.configuration)
        else:
            if not options.force:
                require_unused(options.socket)
            remove(options.configuration)
    except (OSError, ValueError, CargoError) as error:
        print(f"cargo-hostd-runtime: {error}; dockerd's configuration is as it was", file=sys.stderr)
        return EXIT_FAILED
    try:
        told = reload(options.pid_file)
        if options.verb == "remove":
            options.place.unlink(missing_ok=True)  # once Docker asks for it no more
    except (OSError, ValueError) as error:
        print(f"cargo-hostd-runtime: {options.configuration} is changed, but {error}; do it again", file=sys.stderr)
        return EXIT_FAILED
    print(f"{options.verb}: done" + ("" if told else "; dockerd does not run, it will see this when it starts"))
    return EXIT_OK


def install(place: Path, configuration: Path) -> None:
    """Put the runtime to ``place`` and name it in ``configuration``. Raises OSError, ValueError."""
    settings = _read(configuration)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, WRAPPER.read_bytes(), 0o755)
    settings.setdefault("runtimes", {})[RUNTIME] = {"path": str(place)}
    _write(configuration, settings)


def require_unused(socket: Path) -> None:
    """Raise ValueError while containers need it, CargoError when Docker does not say."""
    engine = Engine(socket)
    try:
        found = engine.inspect_all()
    finally:
        engine.close()
    needing = sorted(
        str(raw.get("Name", "")).removeprefix("/")
        for raw in found
        if (raw.get("HostConfig") or {}).get("Runtime") == RUNTIME
    )
    if needing:
        raise ValueError(
            f"these containers were made with the runtime and cannot be started without it: {', '.join(needing)}. Make them "
            "anew or move them away first, or say --force"
        )


def remove(configuration: Path) -> None:
    """Take it out of ``configuration``. Raises OSError, ValueError."""
    settings = _read(configuration)
    # Stays, if empty: at a reload dockerd keeps the runtimes that it knows of unless the file speaks of runtimes.
    settings.setdefault("runtimes", {}).pop(RUNTIME, None)
    _write(configuration, settings)


def reload(pid_file: Path) -> bool:
    """Have dockerd read its configuration. False when none runs."""
    try:
        os.kill(int(pid_file.read_text()), signal.SIGHUP)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def _read(configuration: Path) -> dict[str, Any]:
    try:
        text = configuration.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    settings = json.loads(text) if text.strip() else {}
    if not isinstance(settings, dict) or not isinstance(settings.get("runtimes", {}), dict):
        raise ValueError(f"{configuration} is not a configuration of dockerd")  # noqa: TRY004
    return settings


def _write(configuration: Path, settings: dict[str, Any]) -> None:
    configuration.parent.mkdir(parents=True, exist_ok=True)
    mode = configuration.stat().st_mode & 0o777 if configuration.exists() else 0o644
    write_durably(configuration, (json.dumps(settings, indent=2) + "\n").encode(), mode)


if __name__ == "__main__":
    sys.exit(main())
