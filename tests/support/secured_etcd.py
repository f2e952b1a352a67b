"""A real etcd with TLS and authentication on, a fleet of members on it, and their credentials."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.access import Access
from coordinator.fleet import Candidate, Fleet, make_files
from events.crypto import Authority, SigningKey, certificate_request, new_tls_key, write_private
from events.errors import StoreUnavailableError
from events.etcd import EtcdAccess, EtcdStore
from events.etcd_users import EtcdUsers
from events.joining import JoinRequest, decode_answer
from events.keyspace import Keyspace
from events.membership import Member
from events.schema import Data, Event
from events.stamp import Stamper
from events.trust import Trust, about
from tests.support.etcd import START_SECONDS, free_port
from tests.support.records import wait_until

SSH_KEY = "ssh-ed25519 " + "A" * 68


@dataclass
class Credential:
    """What a member has on its disk, and so whoever steals it: a client of etcd with its certificate, its signing key."""

    name: str
    member: Member
    store: EtcdStore
    own: SigningKey
    access: EtcdAccess

    def append(self, migration: str, previous: Event | None, data: Data, by: str = "") -> Event:
        """With its own rights and key, under whatever name."""
        trust = self.store.trust
        assert trust is not None
        if by and by != self.name:
            self.store.trust = _Careless(self)
        try:
            return self._append(migration, previous, data, by)
        finally:
            self.store.trust = trust

    def _append(self, migration: str, previous: Event | None, data: Data, by: str) -> Event:
        cause = 0 if previous is None else previous.seq
        return self.store.append(
            migration, previous, data, cause=cause, stamp=Stamper(by or self.name).stamp(1), deadline_seconds=3
        )


class _Careless(Trust):
    """Signs whatever it is given, as a thief would."""

    def __init__(self, thief: Credential) -> None:
        super().__init__(thief.store.keys, thief.store.range, Authority.load(thief.access.ca or Path()))
        self._thief = thief

    def sign(self, migration: str, by: str, text: bytes) -> str:
        return self._thief.own.sign(about(migration) + text)


class SecuredEtcd:
    """One member of etcd in ``directory``. ``fleet`` is the operator."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "fleet"
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.peer = f"127.0.0.1:{free_port()}"
        self.data = directory / "data"
        self.log = directory / "etcd.log"
        self.keys = Keyspace()
        self.process: subprocess.Popen[bytes] | None = None
        self._stores: list[EtcdStore] = []

    def make_files(self) -> None:
        make_files(self.directory, ["127.0.0.1"], ["c1"])

    def start(self) -> None:
        """Start etcd with the fleet's certificates and wait until it serves."""
        url = f"https://{self.endpoint}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL", "etcd", f"--data-dir={self.data}",
                    f"--listen-client-urls={url}", f"--advertise-client-urls={url}",
                    f"--listen-peer-urls=https://{self.peer}", f"--initial-advertise-peer-urls=https://{self.peer}",
                    f"--initial-cluster=default=https://{self.peer}", "--peer-cert-allowed-cn=etcd",
                    f"--peer-cert-file={self.directory}/etcd.crt", f"--peer-key-file={self.directory}/etcd.key",
                    f"--peer-trusted-ca-file={self.directory}/ca.crt", "--peer-client-cert-auth",
                    f"--cert-file={self.directory}/etcd.crt", f"--key-file={self.directory}/etcd.key",
                    f"--trusted-ca-file={self.directory}/ca.crt", "--client-cert-auth",
                    "--heartbeat-interval=50", "--election-timeout=250",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
        operator = self.store("operator")

        def answers() -> bool:
            with contextlib.suppress(StoreUnavailableError):
                return operator.revision() > 0
            return False

        wait_until(answers, "etcd starts", START_SECONDS)

    def secure(self) -> None:
        """Users, pins, authentication on; and the coordinator's rights at work."""
        self.fleet = Fleet(self.store("operator"), self.directory)
        self.version = self.fleet.enable(["c1"])
        own = SigningKey.load(self.directory / "coordinator-c1.signing.key")
        store = self.store("coordinator-c1", own)
        assert store.trust is not None
        self.access = Access(self.keys, EtcdUsers(store), store.trust)
        access = self.files("coordinator-c1")
        self.coordinator = Credential("coordinator/c1", store.trust.members()["coordinator/c1"], store, own, access)

    def files(self, stem: str, directory: Path | None = None) -> EtcdAccess:
        place = directory or self.directory
        return EtcdAccess(ca=self.directory / "ca.crt", cert=place / f"{stem}.crt", key=place / f"{stem}.key")

    def store(self, stem: str, own: SigningKey | None = None, directory: Path | None = None) -> EtcdStore:
        """A client with a certificate of the operator's directory, or of another."""
        made = EtcdStore([self.endpoint], self.keys, access=self.files(stem, directory), call_timeout_seconds=3)
        made.trust = Trust(self.keys, made.range, Authority.load(self.directory / "ca.crt"), own)
        self._stores.append(made)
        return made

    def join(self, host: str) -> Credential:
        """A member, without a token: what `cargo-hostd join` and an approval leave. Again: with a new certificate."""
        place = self.directory.parent / host
        key = place / "etcd.key"
        if not key.exists():
            write_private(key, new_tls_key())
        own = SigningKey.load_or_make(place / "signing.key")
        request = JoinRequest(
            host=host,
            address="10.0.0.1",
            csr=certificate_request(key.read_bytes(), host).decode(),
            signing_key=own.public,
            ssh_host_key=SSH_KEY,
            ssh_client_key=SSH_KEY,
        )
        member = self.fleet.approve(Candidate(request, ""))
        stored = self.fleet._store.get(self.keys.join_answer(host))
        assert stored is not None
        stem = f"etcd-{member.user.rpartition('/')[2]}"
        (place / f"{stem}.crt").write_text(decode_answer(stored.value).cert)
        (place / f"{stem}.key").write_bytes(key.read_bytes())
        return Credential(f"hostd/{host}", member, self.store(stem, own, place), own, self.files(stem, place))

    def etcdctl(self, access: EtcdAccess, *arguments: str) -> subprocess.CompletedProcess[str]:
        """etcdctl with these credentials."""
        return subprocess.run(
            [
                "etcdctl", f"--endpoints=https://{self.endpoint}", "--command-timeout=3s",
                f"--cacert={access.ca}", f"--cert={access.cert}", f"--key={access.key}", *arguments,
            ],
            env={"PATH": os.environ["PATH"], "ETCDCTL_API": "3"},
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip

    def close(self) -> None:
        for store in self._stores:
            store.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


@contextlib.contextmanager
def secured_etcd(directory: Path) -> Iterator[SecuredEtcd]:
    """Started and secured; gone afterwards."""
    made = SecuredEtcd(directory)
    try:
        made.make_files()
        made.start()
        made.secure()
        yield made
    finally:
        made.close()
