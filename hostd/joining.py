"""``cargo-hostd join TOKEN``: a new host asks to become a member of a secured fleet, and fetches its certificate.

Keys are generated here and never leave: what is published is their public halves, signed. May be run again at any
time: keys that are there are kept, and a request that waits is not published twice. A person compares the fingerprint
that is shown with what ``cargoctl fleet approve`` shows.

It must never accept a certificate that the authority in the token has not signed for the very key made here.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from events import joining
from events.crypto import (
    Authority,
    CryptoError,
    SigningKey,
    certificate_request,
    new_tls_key,
    read_file,
    write_file,
    write_private,
)
from events.errors import CargoError, PermanentError, SchemaError
from events.etcd import EtcdAccess, EtcdStore
from events.joining import JoinAnswer, JoinRequest, Token
from events.keyspace import Keyspace
from events.store import Store
from hostd.settings import load

DEFAULT_DIRECTORY = Path("/etc/cargo")
SSH_HOST_KEY = Path("/etc/ssh/ssh_host_ed25519_key.pub")
POLL_SECONDS = 1.0
WAIT_SECONDS = 3600
_HEADER = "# Written by `cargo-hostd join`; docs/samples/hostd.cfg explains every option.\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="cargo-hostd join",
        description="Makes this host's keys, asks to join a fleet with them, and waits until a person has approved.",
        epilog="Exit codes: 0 a member, 1 failure or not approved in time, 2 wrong usage.",
    )
    made.add_argument("bearer", metavar="TOKEN", help="of `cargoctl fleet token`; - reads it from standard input")
    made.add_argument("--address", required=True, help="where other hosts reach this one by SSH, an IP address")
    made.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="for keys and configuration")
    made.add_argument("--ssh-host-key", type=Path, default=SSH_HOST_KEY, metavar="FILE", help="the public one of sshd")
    made.add_argument("--wait-seconds", type=float, default=WAIT_SECONDS, help="for the approval (default %(default)s)")
    return made


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        bearer = joining.decode_token(sys.stdin.readline() if options.bearer == "-" else options.bearer)
        return _join(bearer, options)
    except CargoError as error:
        print(f"cargo-hostd join: {error}", file=sys.stderr)
        return 1


def _join(token: Token, options: argparse.Namespace) -> int:
    trust, ssh = options.directory / "trust", options.directory / "ssh"
    for directory in (trust, ssh):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (trust / "ca.crt").exists() and read_file(trust / "ca.crt") != token.ca.encode():
        raise PermanentError(
            f"this host trusts another fleet's authority, in {trust / 'ca.crt'}. Nothing was changed. If it is to leave that "
            f"fleet, stop its agent and remove {trust} first"
        )
    write_file(trust / "ca.crt", token.ca.encode(), 0o644)
    request = _request(token, trust, ssh, options)
    raw = joining.encode_request(request, SigningKey.load(trust / "signing.key"))
    check = partial(_check, Authority(token.ca.encode()), trust / "etcd.key")
    with _store_of(token) as store:
        answer = _answer(store, token.host, check)
        if answer is None:
            _publish(store, token.host, raw)
            print(f"{token.host} asks to join, with the fingerprint\n  {joining.request_fingerprint(raw)}", flush=True)
            print(f"compare it where the operator runs: cargoctl fleet approve {token.host}", flush=True)
            answer = _wait(store, token.host, check, options.wait_seconds)
    write_file(trust / "etcd.crt", answer.cert.encode(), 0o644)
    config = options.directory / "hostd.cfg"
    wanted = _settings(token, request.address, trust, ssh)
    if _blank(config):
        write_file(config, _as_file(wanted).encode(), 0o644)
    elif differing := _differing(config, wanted):
        raise PermanentError(
            f"{token.host} is a member as {answer.user}, but there was a configuration {config} already, which is left as "
            "it is. Before the agent is started it has to say\n" + "\n".join(f"  {line}" for line in differing)
        )
    print(f"{token.host} is a member as {answer.user}; start cargo-hostd -c {config}")
    return 0


def _settings(token: Token, address: str, trust: Path, ssh: Path) -> dict[tuple[str, str], str]:
    """What the configuration has to say, by section and option."""
    return {
        ("host", "name"): token.host,
        ("host", "address"): address,
        ("etcd", "endpoints"): ", ".join(token.endpoints),
        ("etcd", "prefix"): token.prefix,
        ("etcd", "ca"): f"{trust}/ca.crt",
        ("etcd", "cert"): f"{trust}/etcd.crt",
        ("etcd", "key"): f"{trust}/etcd.key",
        ("trust", "ca"): f"{trust}/ca.crt",
        ("trust", "signing_key"): f"{trust}/signing.key",
        ("ssh", "identity"): f"{ssh}/id_ed25519",
        ("ssh", "known_hosts"): f"{ssh}/known_hosts",
        ("ssh", "authorized_keys"): f"{ssh}/authorized_keys",
    }


def _as_file(wanted: dict[tuple[str, str], str]) -> str:
    sections: dict[str, list[str]] = {}
    for (section, option), value in wanted.items():
        sections.setdefault(section, [f"\n[{section}]\n"]).append(f"{option} = {value}\n")
    return _HEADER + "".join(line for lines in sections.values() for line in lines)


def _blank(config: Path) -> bool:
    """Whether nobody has said anything in ``config`` yet: it is not there, or is as the package installs it."""
    if not config.exists():
        return True
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read_string(read_file(config).decode("utf-8", "replace"))
    except configparser.Error:
        return False
    return not any(found.options(section) for section in found.sections())


def _differing(config: Path, wanted: dict[tuple[str, str], str]) -> list[str]:
    """What ``config`` says otherwise, or not at all. Where etcd is can be said in several ways. Raises SettingsError."""
    said = load(config)
    found = {
        ("host", "name"): said.name,
        ("host", "address"): said.address,
        ("etcd", "prefix"): said.etcd.prefix,
        ("etcd", "ca"): said.etcd.ca,
        ("etcd", "cert"): said.etcd.cert,
        ("etcd", "key"): said.etcd.key,
        ("trust", "ca"): said.trust.ca,
        ("trust", "signing_key"): said.trust.signing_key,
        ("ssh", "identity"): said.ssh_identity,
        ("ssh", "known_hosts"): said.ssh_known_hosts,
        ("ssh", "authorized_keys"): said.ssh_authorized_keys,
    }
    return [
        f"[{where[0]}] {where[1]} = {wanted[where]}" for where, value in found.items() if str(value) != wanted[where]
    ]


def _request(token: Token, trust: Path, ssh: Path, options: argparse.Namespace) -> JoinRequest:
    if not (trust / "etcd.key").exists():
        write_private(trust / "etcd.key", new_tls_key())
    own = SigningKey.load_or_make(trust / "signing.key")
    if not (ssh / "id_ed25519").exists():
        made = subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"hostd@{token.host}", "-f", str(ssh / "id_ed25519")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise PermanentError(f"ssh-keygen made no key: {made.stderr.strip()}")
    return JoinRequest(
        host=token.host,
        address=options.address,
        csr=certificate_request(read_file(trust / "etcd.key"), f"hostd/{token.host}").decode(),
        signing_key=own.public,
        ssh_host_key=_public_line(options.ssh_host_key),
        ssh_client_key=_public_line(ssh / "id_ed25519.pub"),
    )


def _public_line(path: Path) -> str:
    """Kind and key, without the comment."""
    return " ".join(read_file(path).decode("utf-8", "replace").split()[:2])


@contextlib.contextmanager
def _store_of(token: Token) -> Iterator[EtcdStore]:
    """The bus, as whoever bears the token."""
    with tempfile.TemporaryDirectory(prefix="cargo-join-") as name:
        private = Path(name)
        for file, text in (("ca", token.ca), ("cert", token.cert), ("key", token.key)):
            write_private(private / file, text.encode())
        access = EtcdAccess(ca=private / "ca", cert=private / "cert", key=private / "key")
        store = EtcdStore(token.endpoints, Keyspace(token.prefix), access=access)
        try:
            yield store
        finally:
            store.close()


def _publish(store: Store, host: str, raw: bytes) -> None:
    stored = store.get(store.keys.join_request(host))
    if stored is not None and stored.value != raw and _is_anothers(stored.value, raw, host):
        raise PermanentError(
            f"somebody else has asked to join as {host} with this token. Do not approve it; find out who has the token, "
            f"and make a new one with `cargoctl fleet token {host}`"
        )
    if stored is None or stored.value != raw:
        store.put(store.keys.join_request(host), raw)


def _is_anothers(found: bytes, own: bytes, host: str) -> bool:
    try:
        return joining.decode_request(found, host).signing_key != joining.decode_request(own, host).signing_key
    except SchemaError:
        return True


def _check(authority: Authority, key: Path, answer: JoinAnswer) -> None:
    authority.check_certificate(answer.cert.encode(), answer.user, read_file(key))


def _answer(store: Store, host: str, check: Callable[[JoinAnswer], None]) -> JoinAnswer | None:
    """The answer that is for this very key; one to somebody else's request, or to an earlier one, is passed over."""
    stored = store.get(store.keys.join_answer(host))
    if stored is None:
        return None
    answer = joining.decode_answer(stored.value)
    try:
        check(answer)
    except CryptoError:
        return None
    return answer


def _wait(store: Store, host: str, check: Callable[[JoinAnswer], None], wait_seconds: float) -> JoinAnswer:
    give_up_at = time.monotonic() + wait_seconds
    while (answer := _answer(store, host, check)) is None:
        if time.monotonic() >= give_up_at:
            raise PermanentError(
                f"{host} was not approved in time. Its keys stay here; run this again with a token that is good"
            )
        threading.Event().wait(POLL_SECONDS)
    return answer
