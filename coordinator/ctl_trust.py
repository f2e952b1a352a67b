"""``cargoctl fleet init | token | approve | renew | remove | list | cut``: who belongs to a secured fleet.

What they do stands in ``coordinator/fleet.py``; here are the words, the questions and the command line. They run with
the operator's certificate, beside the authority's key.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from coordinator import mending
from coordinator.ctl_output import EXIT_FAILED, EXIT_OK, UsageError, checked_id, console, print_json
from coordinator.fleet import (
    AUTHORITY,
    CERTIFICATE_DAYS,
    OPERATOR,
    TOKEN_MINUTES,
    Fleet,
    Renewed,
    fingerprints,
    make_files,
    renew_files,
)
from coordinator.timeline import printable
from events.certificates import SOON_DAYS
from events.errors import StoreUnavailableError
from events.etcd import EtcdStore
from events.keyspace import valid_host_name
from events.settings import EtcdSettings
from events.store import Store

DEFAULT_DIRECTORY = Path("/etc/cargo/fleet")
SOUND_VERSIONS = ((3, 5, 33), (3, 6, 14), (3, 7, 1))
"""The first of each series in which etcd asks for a right before compaction, alarms and leases (docs/security.md)."""
_ON_FILE = ("etcd", OPERATOR, AUTHORITY)
_START = """\
The files are there. Start etcd with them, on every member, then run this again:

  etcd --client-cert-auth --trusted-ca-file {d}/ca.crt --cert-file {d}/etcd.crt --key-file {d}/etcd.key \\
       --peer-client-cert-auth --peer-trusted-ca-file {d}/ca.crt --peer-cert-file {d}/etcd.crt \\
       --peer-key-file {d}/etcd.key --peer-cert-allowed-cn etcd --listen-client-urls https://… …

docs/operators-guide.md has all of it. What etcd said now: {why}"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``cargoctl fleet``."""
    parser.add_argument(
        "--directory",
        type=Path,
        default=DEFAULT_DIRECTORY,
        help=f"of the authority and the operator's certificate (default {DEFAULT_DIRECTORY})",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, run: Any, words: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = verbs.add_parser(name, help=words, description=words)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="output for programs")
        sub.set_defaults(run=run)
        return sub

    sub = add("init", init, "make the authority and certificates, then users, and turn etcd's authentication on")
    sub.add_argument(
        "--etcd-name", action="append", default=[], metavar="NAME", help="address or DNS name of a member of etcd"
    )
    sub.add_argument("--coordinator", action="append", default=[], metavar="NAME", help="as in its coordinator.cfg")
    sub.add_argument("--files-only", action="store_true", help="make the files, and leave etcd alone")
    sub = add("token", token, "make a token with which one host may ask to join")
    sub.add_argument("host")
    sub.add_argument("--minutes", type=int, default=TOKEN_MINUTES, help="how long it is good for (default %(default)s)")
    sub = add("approve", approve, "compare a host's fingerprint, and make it a member")
    sub.add_argument("host")
    sub.add_argument("--fingerprint", default="", help="what the host has shown, instead of a question")
    sub = add(
        "renew",
        renew,
        "new certificates for the keys that are there, of whatever ends soon, or of those that are named",
    )
    sub.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a host, coordinator/NAME, etcd, operator, authority (default: what ends soon)",
    )
    sub.add_argument(
        "--within-days", type=int, default=SOON_DAYS, metavar="N", help="what soon means (default %(default)s)"
    )
    sub.add_argument(
        "--days", type=int, default=CERTIFICATE_DAYS, help="how long they are good for (default %(default)s)"
    )
    sub = add("remove", remove, "withdraw everything that a host has, at once")
    sub.add_argument("host")
    sub.add_argument("--force", action="store_true", help="although migrations of it are under way")
    sub = add("cut", cut, "cut off what is not proven at the end of a history that everybody holds")
    sub.add_argument("id")
    sub.add_argument("--since", type=int, metavar="SEQ", help="the first event to go, instead of a question")
    sub.add_argument(
        "--evidence", type=Path, required=True, metavar="FILE", help="where the history as it is goes first"
    )
    add("list", list_members, "members, and hosts that ask to join")


def defaults(settings: EtcdSettings, directory: Path) -> EtcdSettings:
    """``settings`` with the operator's certificate, where they name none."""
    if settings.ca is not None:
        return settings
    return EtcdSettings(
        settings.endpoints,
        settings.prefix,
        directory / "ca.crt",
        directory / "operator.crt",
        directory / "operator.key",
    )


def _fleet(store: Store, options: argparse.Namespace) -> Fleet:
    assert isinstance(store, EtcdStore)
    return Fleet(store, options.directory)


def _host(options: argparse.Namespace) -> str:
    host: str = options.host
    if not valid_host_name(host):
        raise UsageError(f"{host!r} cannot be a host's name")
    return host


def init(store: Store, options: argparse.Namespace) -> int:
    """Everything a fleet needs before its first host."""
    for name in options.coordinator:
        if not valid_host_name(name):
            raise UsageError(f"{name!r} cannot be a coordinator's name")
    made = make_files(options.directory, options.etcd_name, options.coordinator)
    out = console(options)
    if not options.json:
        for path in made:
            out.print(f"made {path}", soft_wrap=True)
    if options.files_only:
        if options.json:
            print_json({"made": made, "authentication": None})
        return EXIT_OK
    try:
        version = _fleet(store, options).enable(options.coordinator)
    except StoreUnavailableError as error:
        words = _START.format(d=options.directory, why=error)
        print(f"cargoctl: {words}", file=sys.stderr)
        return EXIT_FAILED
    warning = old_etcd(version)
    if warning:
        print(f"cargoctl: {warning}", file=sys.stderr)
    if options.json:
        print_json({"made": made, "etcd": version, "authentication": True, "warning": warning})
    else:
        out.print("etcd asks everybody for a certificate and a role; `cargoctl fleet token HOST` lets a host in")
    return EXIT_OK


def old_etcd(version: str) -> str:
    """What an etcd of that version does not keep a stolen credential from, in words; empty for a sound one."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(int(part) for part in found.groups()) if found else (0, 0, 0)
    if numbers >= SOUND_VERSIONS[-1] or any(numbers[:2] == good[:2] and numbers >= good for good in SOUND_VERSIONS):
        return ""
    wanted = ", ".join(".".join(map(str, good)) for good in SOUND_VERSIONS)
    return (
        f"etcd {version} lets every user compact the store, raise alarms and keep others' leases alive. That forges and "
        f"reveals nothing, but can stop the whole fleet; use {wanted} or newer (docs/security.md)"
    )


def token(store: Store, options: argparse.Namespace) -> int:
    """A token on stdout."""
    host = _host(options)
    if not 1 <= options.minutes <= 24 * 60:
        raise UsageError("--minutes takes 1 to 1440")
    made = _fleet(store, options).token(host, options.endpoints, options.minutes)
    if options.json:
        print_json({"host": host, "token": made})
    else:
        print(made)
        print(f"on {host}, within {options.minutes} minutes: cargo-hostd join TOKEN", file=sys.stderr)
    return EXIT_OK


def approve(store: Store, options: argparse.Namespace) -> int:
    """Show what the host has brought, ask, and sign."""
    fleet = _fleet(store, options)
    candidate = fleet.candidate(_host(options))
    out = console(options)
    if not options.json:
        out.print(f"{candidate.request.host} at {candidate.request.address} asks to join with")
        for what, value in fingerprints(candidate.request).items():
            out.print(f"  {what:<15} {value}", soft_wrap=True)
        out.print(Text(f"  fingerprint     {candidate.fingerprint}", style="bold"), soft_wrap=True)
    if options.fingerprint and options.fingerprint != candidate.fingerprint:
        raise UsageError(
            f"that is not the fingerprint of the request, which is {candidate.fingerprint}: nothing was approved. If the "
            "host shows the other one, somebody else has used its token; make a new one"
        )
    question = f"Does {candidate.request.host} show the same fingerprint? Type yes to approve: "
    if not options.fingerprint and not _agreed(question, "--fingerprint, as the host has shown it"):
        print("cargoctl: not approved", file=sys.stderr)
        return EXIT_FAILED
    member = fleet.approve(candidate)
    if options.json:
        print_json({"host": candidate.request.host, "user": member.user, "fingerprint": candidate.fingerprint})
    else:
        out.print(f"{candidate.request.host} is a member now; it fetches its certificate by itself")
    return EXIT_OK


def renew(store: Store, options: argparse.Namespace) -> int:
    """New certificates, and where they have to go."""
    if not 1 <= options.days <= 3650 or options.within_days < 0:
        raise UsageError("--days takes 1 to 3650, --within-days 0 or more")
    renewed = renew_files(options.directory, options.names, options.within_days, options.days)
    made = {one.name for one in renewed}
    hosts = [name for name in options.names if name not in _ON_FILE and not name.startswith("coordinator/")]
    lacking = [name for name in options.names if name not in made and name not in hosts]
    if lacking:
        raise UsageError(f"there is no certificate of {', '.join(lacking)} with its key in {options.directory}")
    silent: list[str] = []
    every = AUTHORITY in made  # so that all hosts learn of its new certificate
    if hosts or every or not options.names:
        of_hosts, silent = _fleet(store, options).renew(
            [] if every else hosts, options.within_days, options.days, every=every
        )
        renewed += of_hosts
    if options.json:
        rows = {
            one.name: {"ends": one.ends.isoformat(), "file": str(one.file) if one.file else None} for one in renewed
        }
        print_json({"renewed": rows, "silent": silent})
    else:
        out = console(options)
        for one in renewed:
            out.print(f"{one.name} is good until {one.ends:%Y-%m-%d}: {_where_to(one)}", soft_wrap=True)
        if not renewed:
            out.print(f"nothing ends within {options.within_days} days")
    for words in silent:
        print(f"cargoctl: {words}", file=sys.stderr)
    return EXIT_FAILED if silent else EXIT_OK


def _where_to(one: Renewed) -> str:
    if one.file is None:
        return "its agent fetches the certificate by itself"
    if one.name == "etcd":
        return f"bring {one.file} to every member of etcd, which reads it at the next connection"
    if one.name == AUTHORITY:
        return f"bring {one.file} to etcd, which has to be restarted, and to the coordinators; the hosts fetch it by themselves"
    if one.name == OPERATOR:
        return f"{one.file} is in use from now on"
    return f"bring {one.file} to its machine, where it is used from the next connection on"


def _agreed(question: str, instead: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"there is nobody to ask here: give {instead}")
    return input(question).strip() == "yes"


def remove(store: Store, options: argparse.Namespace) -> int:
    """Everything that the host has, at once."""
    fleet, host = _fleet(store, options), _host(options)
    under_way = fleet.under_way(host)
    if under_way and not options.force:
        raise UsageError(
            f"{host} takes part in {', '.join(sorted(under_way))}. Let them end, or abort or roll them back, first; with "
            "--force they stop where they are, and wait for a person. Nothing was changed"
        )
    removal = fleet.remove(host)
    if options.json:
        print_json({"host": host, "under_way": removal.under_way, "unnamed": removal.unnamed})
        return EXIT_OK
    out = console(options)
    out.print(f"{host} is no member any more: its user, role, keys and pins are withdrawn")
    for migration in removal.under_way:
        out.print(Text(f"{migration} waits for a person: `cargoctl why {migration}`", style="bold"))
    if removal.unnamed:
        out.print(f"{removal.unnamed} ended histories whose last word is {host}'s cannot be proven any more")
    return EXIT_OK


def cut(store: Store, options: argparse.Namespace) -> int:
    """Show what would go, ask, and cut it off."""
    _fleet(store, options)
    found = mending.find(store, checked_id(options.id))
    out = console(options)
    if not options.json:
        out.print(printable(found.why), soft_wrap=True)
        for number, _ in found.recorded.texts[found.since - 1 :]:
            out.print(f"event {number} would go")
    if options.since is not None and options.since != found.since:
        raise UsageError(f"what is not proven begins with event {found.since}; nothing was changed")
    question = f"Have you looked where the container runs? Type yes to cut off event {found.since} and what follows: "
    if options.since is None and not _agreed(question, "--since, as `cargoctl verify` shows it"):
        print("cargoctl: nothing was changed", file=sys.stderr)
        return EXIT_FAILED
    mending.cut_off(store, found, options.evidence)
    if options.json:
        print_json({"migration": options.id, "since": found.since, "evidence": str(options.evidence)})
    else:
        out.print(
            f"{options.id} ends with event {found.since - 1} again; restart the coordinators, which go on from there"
        )
    return EXIT_OK


def list_members(store: Store, options: argparse.Namespace) -> int:
    """Members, former ones, and who asks to join."""
    fleet = _fleet(store, options)
    members, refused = fleet.members()
    asking = fleet.asking()
    if options.json:
        rows = {
            name: {"active": one.active, "since": one.since, "address": one.address, "user": one.user}
            for name, one in members.items()
        }
        print_json({"members": rows, "refused": refused, "asking": asking})
        return EXIT_FAILED if refused else EXIT_OK
    out = console(options)
    for name, one in sorted(members.items()):
        state = "member since" if one.active else "removed"
        out.print(f"{name:<24} {state} {one.since}  {one.address}", soft_wrap=True)
    for name, why in sorted(refused.items()):
        out.print(Text(f"{printable(name)}: {printable(why)}", style="bold red"), soft_wrap=True)
    for host, words in sorted(asking.items()):
        out.print(f"{printable(host)} asks to join: {printable(words)}", soft_wrap=True)
    return EXIT_FAILED if refused else EXIT_OK
