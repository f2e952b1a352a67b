"""The operator's work on a secured fleet: its authority, its users in etcd, and who is a member.

    init      the authority, certificates for etcd, the operator and the coordinators; users; authentication on
    token     lets one host ask, for an hour
    renew     new certificates for the keys and names that are there
    approve   a person has compared the fingerprint: certificate, user, permissions and pins
    remove    takes all of that away at once

Everything is repeated until it is complete, and may be: what is there stays. It runs where the authority's key lies,
which no daemon has. It must never approve anything by itself.
"""

from __future__ import annotations

import base64
import datetime
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.recording import ARCHIVABLE_PHASES
from events import certificates, joining
from events.crypto import (
    Authority,
    SigningAuthority,
    SigningKey,
    certificate_request,
    common_name,
    expiry,
    fingerprint,
    new_tls_key,
    read_file,
    server_names,
    write_file,
    write_private,
)
from events.errors import CargoError, PermanentError, SchemaError
from events.etcd import EtcdStore
from events.etcd_users import ROOT, EtcdUsers
from events.keyspace import valid_host_name
from events.membership import FormerKey, Member, decode_member, encode_member
from events.permissions import base
from events.permissions import joining as joining_permissions
from events.stamp import utc_now_text
from events.trust import Trust

OPERATOR = "operator"
AUTHORITY = "authority"
CERTIFICATE_DAYS = 397
"""Of daemons and of etcd itself; a little over a year, so that a yearly date to renew them is never missed by a day."""
TOKEN_MINUTES = 60
MAX_TAILS = 400
"""Histories that a withdrawn key's record can name, below the limit of a record."""


@dataclass
class Candidate:
    """A host that asks to join."""

    request: joining.JoinRequest
    fingerprint: str


@dataclass
class Removal:
    """What was taken from a host."""

    host: str
    under_way: list[str] = field(default_factory=list)
    """Migrations that had not ended, which wait for a person now."""
    unnamed: int = 0
    """Ended histories that the record has no room for: archive them first."""


@dataclass(frozen=True)
class Renewed:
    """A certificate that was made anew."""

    name: str
    ends: datetime.datetime
    file: Path | None = None
    """Where it lies; None for a host's, which fetches it by itself."""


# --- files ---------------------------------------------------------------------------------------


def make_files(directory: Path, etcd_names: Sequence[str], coordinators: Sequence[str]) -> list[str]:
    """The authority, and the keys and certificates that lie beside it. Says what was made. Raises CryptoError."""
    before = set(directory.iterdir()) if directory.is_dir() else set()
    authority = SigningAuthority.load_or_make(directory)
    if etcd_names:
        _certified(directory, "etcd", "etcd", authority, server_names=etcd_names)
    _certified(directory, OPERATOR, OPERATOR, authority)
    for name in coordinators:
        _certified(directory, f"coordinator-{name}", f"coordinator/{name}", authority)
        SigningKey.load_or_make(directory / f"coordinator-{name}.signing.key")
    return sorted(str(path) for path in set(directory.iterdir()) - before)


def _certified(
    directory: Path, stem: str, name: str, authority: SigningAuthority, server_names: Sequence[str] = ()
) -> None:
    """A key and its certificate, unless they are there."""
    key, certificate = directory / f"{stem}.key", directory / f"{stem}.crt"
    if not key.exists():
        write_private(key, new_tls_key())
    if not certificate.exists():
        request = certificate_request(read_file(key), name)
        made = authority.certify(request, name, datetime.timedelta(days=CERTIFICATE_DAYS), server_names=server_names)
        write_file(certificate, made, 0o644)


def renew_files(directory: Path, names: Sequence[str], within_days: int, days: int) -> list[Renewed]:
    """New certificates for the keys in ``directory``: of ``names``, or of what ends within ``within_days``.

    ``names`` are ``authority``, ``etcd``, ``operator``, ``coordinator/NAME``; others are passed over. The keys stay, and so do
    the names within the certificates. Raises CryptoError.
    """
    authority = SigningAuthority.load_or_make(directory)
    renewed = []
    if AUTHORITY in names or (not names and _ends_within(authority.pem, certificates.AUTHORITY_SOON_DAYS)):
        authority = authority.prolong(directory)
        renewed.append(Renewed(AUTHORITY, expiry(authority.pem), directory / "ca.crt"))
    for certificate in sorted(directory.glob("*.crt")):
        key, old = certificate.with_suffix(".key"), read_file(certificate)
        if certificate.name == "ca.crt" or not key.exists():
            continue
        name = common_name(old)
        if name in names or (not names and _ends_within(old, within_days)):
            request = certificate_request(read_file(key), name)
            valid = datetime.timedelta(days=days)
            made = authority.certify(request, name, valid, server_names=server_names(old))
            write_file(certificate, made, 0o644)
            renewed.append(Renewed(name, expiry(made), certificate))
    return renewed


def _ends_within(pem: bytes, days: int) -> bool:
    return expiry(pem) < datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


class Fleet:
    """The fleet behind ``store``, with the authority in ``directory``. Methods may raise StoreUnavailableError."""

    def __init__(self, store: EtcdStore, directory: Path) -> None:
        if not (directory / "ca.key").exists():
            raise PermanentError(f"there is no authority in {directory}: `cargoctl fleet init` makes one")
        self._directory = directory
        self._store = store
        self._keys = store.keys
        self._users = EtcdUsers(store)
        self._authority = SigningAuthority.load_or_make(directory)
        store.trust = Trust(store.keys, store.range, Authority(self._authority.pem))

    # --- init ------------------------------------------------------------------------------------

    def enable(self, coordinators: Sequence[str]) -> str:
        """Users of the operator and the coordinators, their pins, and authentication on. Returns etcd's version."""
        version = self._users.server_version()
        for user in (ROOT, OPERATOR, *(f"coordinator/{name}" for name in coordinators)):
            self._users.make_user(user, ROOT)
        self._users.enable()
        for name in coordinators:
            own = SigningKey.load_or_make(self._directory / f"coordinator-{name}.signing.key")
            member = f"coordinator/{name}"
            known = self._member(member)
            if known is None or known.signing_key != own.public:
                former = self._withdrawn(known) if known is not None else ()
                self._pin(Member(name=member, user=member, signing_key=own.public, since=utc_now_text(), former=former))
        return version

    # --- joining ---------------------------------------------------------------------------------

    def token(self, host: str, endpoints: Sequence[str], minutes: int = TOKEN_MINUTES) -> str:
        """A token with which ``host``, and only it, may ask to join."""
        self.prune()
        valid = datetime.timedelta(minutes=minutes)
        end = int((datetime.datetime.now(datetime.UTC) + valid).timestamp())
        user = f"join/{host}/{end}-{secrets.token_hex(4)}"
        self._drop_joining(host)
        for stale in (self._keys.join_request(host), self._keys.join_answer(host)):  # of an earlier token
            self._store.delete(stale)
        self._users.make_user(user, user, sorted(joining_permissions(self._keys, host)))
        key = new_tls_key()
        cert = self._authority.certify(certificate_request(key, user), user, valid)
        return joining.encode_token(
            joining.Token(
                host=host,
                endpoints=tuple(endpoints),
                prefix=self._keys.prefix,
                ca=self._authority.pem.decode(),
                cert=cert.decode(),
                key=key.decode(),
                expires=expiry(cert).isoformat(timespec="seconds"),
            )
        )

    def candidate(self, host: str) -> Candidate:
        """What ``host`` has asked for. Raises SchemaError, PermanentError when it has not asked."""
        stored = self._store.get(self._keys.join_request(host))
        if stored is None:
            raise PermanentError(
                f"{host} has not asked to join: run `cargo-hostd join TOKEN` there, with a token of "
                f"`cargoctl fleet token {host}`"
            )
        return Candidate(joining.decode_request(stored.value, host), joining.request_fingerprint(stored.value))

    def approve(self, candidate: Candidate, days: int = CERTIFICATE_DAYS) -> Member:
        """Make ``candidate``, which a person has compared, a member. Whatever the host had before is withdrawn.

        Raises PermanentError for a key that was withdrawn already: whoever made it necessary may still have it.
        """
        request = candidate.request
        name, host = f"hostd/{request.host}", request.host
        known = self._member(name)
        for old in () if known is None else known.former:
            if old.signing_key == request.signing_key:
                raise PermanentError(
                    f"{host} brings the signing key that was withdrawn on {old.withdrawn_at}. Nothing was approved. Remove "
                    "trust/ and ssh/id_ed25519* below its /etc/cargo, so that it makes new keys, and join again"
                )
        user = f"{name}/{secrets.token_hex(4)}"  # never used before: an old certificate of this host stays worthless
        cert = self._authority.certify(request.csr.encode(), user, datetime.timedelta(days=days))
        if known is not None and known.user:
            self._users.drop_user(known.user)
        former = () if known is None else known.former
        if known is not None and known.signing_key != request.signing_key:
            former = self._withdrawn(known)
        member = Member(
            name=name,
            user=user,
            signing_key=request.signing_key,
            ssh_host_key=request.ssh_host_key,
            ssh_client_key=request.ssh_client_key,
            address=request.address,
            since=utc_now_text(),
            former=former,
        )
        self._users.make_user(user, user, sorted(base(self._keys, host)))
        self._pin(member)
        answer = joining.JoinAnswer(user=user, cert=cert.decode())
        self._store.put(self._keys.join_answer(host), joining.encode_answer(answer))
        for stale in (self._keys.join_request(host), self._keys.renewal(host), self._keys.renewed(host)):
            self._store.delete(stale)
        return member

    # --- renewal ---------------------------------------------------------------------------------

    def renew(
        self, hosts: Sequence[str], within_days: int, days: int = CERTIFICATE_DAYS, *, every: bool = False
    ) -> tuple[list[Renewed], list[str]]:
        """New certificates for ``hosts``, or for those whose end within ``within_days``, or with ``every`` for all.

        Also says in words of whom it is not known. A host gets what its own key has asked for: its user, key and rights stay, so
        nothing that is under way notices. Raises PermanentError for a host in ``hosts`` that cannot be renewed.
        """
        renewed, silent = [], []
        for name, member in sorted(self.members()[0].items()):
            kind, _, host = name.partition("/")
            if kind != "hostd" or not member.active or (hosts and host not in hosts):
                continue
            try:
                one = self._renew(host, member, days, None if hosts or every else within_days)
            except CargoError as error:
                if hosts:
                    raise
                silent.append(str(error))
                continue
            renewed += [] if one is None else [one]
        missing = set(hosts) - {one.name.partition("/")[2] for one in renewed}
        if missing:
            raise PermanentError(
                f"{', '.join(sorted(missing))}: no member of this fleet; `cargoctl fleet list` shows them all"
            )
        return renewed, silent

    def _renew(self, host: str, member: Member, days: int, within_days: int | None) -> Renewed | None:
        stored = self._store.get(self._keys.renewal(host))
        if stored is None:
            raise PermanentError(
                f"{host} has not asked for its next certificate, as its agent does when it starts: start it there. With a "
                f"certificate that has ended it cannot; then `cargoctl fleet token {host}` and `cargo-hostd join` make another"
            )
        request = joining.decode_renewal(stored.value, host, member.signing_key)
        ends = datetime.datetime.fromisoformat(request.ends)
        if within_days is not None and ends > datetime.datetime.now(datetime.UTC) + datetime.timedelta(
            days=within_days
        ):
            return None
        cert = self._authority.certify(request.csr.encode(), member.user, datetime.timedelta(days=days))
        answer = joining.JoinAnswer(user=member.user, cert=cert.decode(), ca=self._authority.pem.decode())
        self._store.put(self._keys.renewed(host), joining.encode_answer(answer))
        return Renewed(member.name, expiry(cert))

    # --- members ---------------------------------------------------------------------------------

    def members(self) -> tuple[dict[str, Member], dict[str, str]]:
        """All members by name, also those that were removed; and why other records are none."""
        assert self._store.trust is not None
        return self._store.trust.members(), self._store.trust.refused()

    def asking(self) -> dict[str, str]:
        """Hosts that ask to join, with the fingerprint of their request, or why it is none."""
        found = {}
        for item in self._store.range(self._keys.joins):
            host, _, what = item.key[len(self._keys.joins) :].partition("/")
            if what != "request":
                continue
            try:
                joining.decode_request(item.value, host)
                found[host] = joining.request_fingerprint(item.value)
            except SchemaError as error:
                found[host] = str(error)
        return found

    def under_way(self, host: str) -> list[str]:
        """Migrations of ``host`` that have not ended."""
        heads = self._store.heads().heads
        return [one for one, head in heads.items() if host in (head.source, head.target) and not head.terminal]

    def remove(self, host: str) -> Removal:
        """Withdraw everything: user, role, pins, what it has told. Raises PermanentError for no member."""
        name = f"hostd/{host}"
        member = self._member(name)
        if member is None or not member.active:
            raise PermanentError(f"{host} is no member of this fleet; `cargoctl fleet list` shows them all")
        self._users.drop_user(member.user)  # first: from now on it can add nothing to what is looked at next
        self._drop_joining(host)
        removal = Removal(host, self.under_way(host))
        former = self._withdrawn(member)
        removal.unnamed = max(0, self._unnamed)
        self._pin(Member(name=name, since=utc_now_text(), former=former))
        keys = self._keys
        for key in (
            keys.host(host),
            keys.join_request(host),
            keys.join_answer(host),
            keys.renewal(host),
            keys.renewed(host),
        ):
            self._store.delete(key)
        for prefix in (self._keys.inventory(host), self._keys.inbox(host)):
            self._store.delete_prefix(prefix)
        self.prune()
        return removal

    def prune(self) -> None:
        """Away with users that no member has: of removals that were cut off, and of tokens that have ended."""
        members, _ = self.members()
        wanted = {member.user for member in members.values() if member.active}
        for user in self._users.names():
            kind, _, rest = user.partition("/")
            if kind == "hostd" and user not in wanted:
                self._users.drop_user(user)
            elif kind == "join" and self._ended(user):
                self._users.drop_user(user)
                host = rest.partition("/")[0]
                if valid_host_name(host):
                    self._store.delete(self._keys.join_answer(host))

    # --- inside ----------------------------------------------------------------------------------

    _unnamed = 0

    @staticmethod
    def _ended(user: str) -> bool:
        """Whether the token of a user ``join/<host>/<end>-<random>`` has ended. Certificates end by themselves, too."""
        end = user.rpartition("/")[2].partition("-")[0]
        return end.isdecimal() and int(end) < datetime.datetime.now(datetime.UTC).timestamp()

    def _member(self, name: str) -> Member | None:
        stored = self._store.get(self._keys.member(name))
        return None if stored is None else decode_member(stored.value, name, self._authority)

    def _pin(self, member: Member) -> None:
        self._store.put(self._keys.member(member.name), encode_member(member, self._authority))

    def _drop_joining(self, host: str) -> None:
        for user in self._users.names():
            if user.startswith(f"join/{host}/"):
                self._users.drop_user(user)

    def _withdrawn(self, member: Member) -> tuple[FormerKey, ...]:
        """Its former keys, with the one that it has now. What it has written last stays readable where it is needed."""
        if not member.active:
            return member.former
        tails: dict[str, str] = {}
        own = member.name.partition("/")[2]
        coordinates = member.name.startswith("coordinator/")
        heads = self._store.heads().heads
        for migration, head in sorted(heads.items(), key=lambda item: (item[1].phase in ARCHIVABLE_PHASES, item[0])):
            if not coordinates and own not in (head.source, head.target):
                continue
            try:
                events = self._store.read(migration)
            except SchemaError:
                continue  # it is held already, and stays so
            if events and events[-1].by == member.name:
                tails[migration] = events[-1].digest
        self._unnamed = len(tails) - MAX_TAILS
        kept = dict(list(tails.items())[:MAX_TAILS])
        now = FormerKey(signing_key=member.signing_key, withdrawn_at=utc_now_text(), tails=kept)
        return (*member.former, now)


def fingerprints(request: joining.JoinRequest) -> dict[str, str]:
    """Each key of a request by what ``ssh-keygen -l`` and ``cargo-hostd join`` show for it."""
    return {
        "signing key": fingerprint(request.signing_key.encode()),
        "SSH host key": _ssh_fingerprint(request.ssh_host_key),
        "SSH client key": _ssh_fingerprint(request.ssh_client_key),
    }


def _ssh_fingerprint(line: str) -> str:
    try:
        return fingerprint(base64.b64decode(line.split()[1], validate=True))
    except (ValueError, IndexError) as error:
        raise CargoError(f"{line[:80]!r} is no SSH key") from error
