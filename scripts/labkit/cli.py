"""``scripts/lab``: the lab by hand."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from labkit.errors import LabError, MissingRequirementError
from labkit.lab import Lab
from labkit.process import clean_environment
from labkit.spec import DEFAULT_NAME, HOST_NAMES, with_described

FAILED, CANNOT, NOT_UP = 1, 2, 3
"""Exit codes: it went wrong; the machine lacks something or the command line is wrong; ``status``: not up."""

EPILOG = f"""\
exit codes:
  0 fine; {FAILED} it went wrong; {NOT_UP} not all is up (status)
  {CANNOT} something is missing, here or in the command line
environment:
  CARGO_LAB_ROOT  the directory of all labs (default /var/lib/cargo-lab)
  CARGO_LAB_NAME  the default of --name
  CARGO_LAB_MIRROR  the Debian mirror that root trees are made from (default http://deb.debian.org/debian)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="lab",
        description="etcd, a coordinator and several Docker hosts on this machine, for trying and testing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--name",
        default=os.environ.get("CARGO_LAB_NAME", DEFAULT_NAME),
        help="which lab; several can be up, each with a subnet of its own (default %(default)s)",
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", parents=[common], help="bring up whatever is not up yet")
    up.add_argument("--hosts", type=int, metavar="N", help=f"how many, 1 to {len(HOST_NAMES)} (default 2)")
    up.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME[=OPTION,...]",
        help="describe one host, or add it: debian13 gives it a root tree, and a Docker, of Debian 13 instead of the "
        "machine's own (made once by debootstrap, in a minute or two; kept in /var/cache/cargo-lab); containerd keeps its "
        "images in containerd's store; liverestore lets its containers outlive its dockerd. May be repeated: "
        "--host gamma=debian13,containerd",
    )
    up.add_argument("--subnet", metavar="A.B.C", help="the first three numbers of a /24 (default 10.77.0)")
    up.add_argument(
        "--secure",
        action="store_true",
        help="with TLS, roles and signed events; hosts join by tokens (docs/operators-guide.md)",
    )
    up.add_argument("--no-agents", action="store_true", help="leave coordinator and hostd out")
    up.add_argument("--json", action="store_true", help="print the status as JSON")
    verbs.add_parser("down", parents=[common], help="remove every trace of it")
    status = verbs.add_parser("status", parents=[common], help="what runs")
    status.add_argument("--json", action="store_true", help="as JSON")
    execute = verbs.add_parser("exec", parents=[common], help="run a command on a host (default: a shell)")
    execute.add_argument("host", metavar="HOST")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    logs = verbs.add_parser("logs", parents=[common], help="show logs")
    logs.add_argument("process", nargs="?", metavar="NAME", help="etcd, coordinator, alpha, alpha.dockerd, hostd, …")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as they grow")
    logs.add_argument("-n", "--lines", type=int, default=50, help="how many of each (default %(default)s)")
    return top


def table(status: dict[str, Any]) -> str:
    """The status for people."""

    def word(daemon: dict[str, Any], wanted: bool = True) -> str:
        if daemon["pid"] is None:
            return "down" if wanted else "-"
        return "ready" if daemon["ready"] else "starting"

    if not status["exists"]:
        return f"The lab {status['name']} does not exist; `scripts/lab up` makes it."
    members = status["etcd"]["members"]
    lines = [
        f"lab {status['name']} in {status['root']}: {'up' if status['up'] else 'NOT all up'}",
        f"  etcd         {' '.join(word(member) for member in members)}  {status['etcd']['endpoints']}",
        f"  coordinator  {word(status['coordinator'], status['agents'])}",
        "",
        f"  {'host':<10} {'address':<14} {'sshd':<9} {'dockerd':<9} {'hostd':<9} DOCKER_HOST",
    ]
    for host in status["hosts"]:
        words = (word(host["sshd"]), word(host["dockerd"]), word(host["hostd"], status["agents"]))
        name = host["name"] if host["running"] else f"{host['name']} (off)"
        columns = f"  {name:<10} {host['address']:<14} {words[0]:<9} {words[1]:<9} {words[2]:<9} "
        lines.append(columns + host["docker_url"])
        for cut in host["cuts"]:
            lines.append(f"    cut from {cut['peer']}" + (" (one way)" if cut["one_way"] else ""))
    return "\n".join(lines)


def _up(options: argparse.Namespace) -> int:
    if options.hosts is not None and not 1 <= options.hosts <= len(HOST_NAMES):
        raise MissingRequirementError([f"--hosts takes 1 to {len(HOST_NAMES)}"])
    began = time.monotonic()
    names = HOST_NAMES[: options.hosts or 2] if options.hosts or options.host else None
    lab = Lab(
        options.name,
        options.subnet,
        None if names is None else with_described(names, options.host),
        agents=False if options.no_agents else None,
        etcd_loopback=True if options.name == DEFAULT_NAME and not options.secure else None,
        secure=True if options.secure else None,
    )
    lab.up()
    status = lab.status()
    if options.json:
        print(json.dumps(status, indent=2))
    else:
        print(table(status))
        if lab.spec.secure:
            print(f"\nit is secure: cargoctl -c {lab.spec.operator_config} list")
        print(f"\nready after {time.monotonic() - began:.1f} s; `scripts/lab down` removes it")
    return 0


def _down(options: argparse.Namespace) -> int:
    found = Lab(options.name).down()
    print(f"removed the lab {options.name}" if found else f"there is no lab {options.name}: nothing to do")
    return 0


def _status(options: argparse.Namespace) -> int:
    status = Lab(options.name).status()
    print(json.dumps(status, indent=2) if options.json else table(status))
    return 0 if status["up"] else NOT_UP


def _exec(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    line = Lab(options.name).host(options.host).command_line(command or ["bash"])
    sys.stdout.flush()
    os.execvpe(line[0], line, clean_environment())


def _logs(options: argparse.Namespace) -> int:
    lab = Lab(options.name)
    files = sorted(lab.spec.logs.glob("*.log"))
    if options.process is not None:
        files = [file for file in files if options.process in {file.stem, *file.stem.split(".")}]
    if not files:
        raise LabError(f"no log of {options.process or 'anything'} in {lab.spec.logs}")
    follow = ["-F"] if options.follow else []
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(options.lines), *follow, "--", *map(str, files)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(argv)
    verbs = {"up": _up, "down": _down, "status": _status, "exec": _exec, "logs": _logs}
    with contextlib.suppress(KeyboardInterrupt):
        try:
            return verbs[options.verb](options)
        except MissingRequirementError as error:
            print(f"lab: this cannot work here yet:\n{error}", file=sys.stderr)
            return CANNOT
        except LabError as error:
            print(f"lab: {error}", file=sys.stderr)
            return FAILED
        except PermissionError as error:
            print(f"lab: {error}; the lab belongs to root: use sudo", file=sys.stderr)
            return CANNOT
    return 130
