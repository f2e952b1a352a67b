"""Certificates are renewed against a real etcd: by whom, for whom, and without anybody who is at work noticing."""

from __future__ import annotations

import datetime
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from coordinator import cargoctl
from events import bus_check, certificates, joining
from events.crypto import (
    SigningAuthority,
    SigningKey,
    certificate_request,
    common_name,
    expiry,
    new_tls_key,
    server_names,
    write_private,
)
from events.errors import StoreUnavailableError
from events.etcd import EtcdAccess, EtcdStore
from events.settings import EtcdSettings
from events.store import Changes
from hostd.renewal import Renewal
from tests.support.histories import SAMPLES
from tests.support.secured_etcd import Credential, SecuredEtcd, secured_etcd

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredEtcd]:
    with secured_etcd(tmp_path_factory.mktemp("renewal")) as made:
        yield made


class Host:
    """A member with the files that its agent has, and a certificate that ends in some days."""

    def __init__(self, etcd: SecuredEtcd, name: str, days: int) -> None:
        self.etcd = etcd
        self.name = name
        self.credential: Credential = etcd.join(name)
        self.trust = etcd.directory.parent / name / "trust"
        self.trust.mkdir()
        self.ca, self.cert, self.key = (self.trust / file for file in ("ca.crt", "etcd.crt", "etcd.key"))
        shutil.copy(etcd.directory / "ca.crt", self.ca)
        assert self.credential.access.key is not None
        shutil.copy(self.credential.access.key, self.key)
        self.certify(days)
        self.settings = EtcdSettings((etcd.endpoint,), ca=self.ca, cert=self.cert, key=self.key)
        access = EtcdAccess(ca=self.ca, cert=self.cert, key=self.key)
        self.store = EtcdStore([etcd.endpoint], etcd.keys, access=access, call_timeout_seconds=3)
        self.store.trust = self.credential.store.trust
        etcd._stores.append(self.store)
        self.renewal = Renewal(name, self.store, self.settings, self.credential.own, structlog.get_logger())

    def certify(self, days: int, user: str = "") -> None:
        authority = SigningAuthority.load_or_make(self.etcd.directory)
        request = certificate_request(self.key.read_bytes(), "x")
        name = user or self.credential.member.user
        self.cert.write_bytes(authority.certify(request, name, datetime.timedelta(days=days)))

    @property
    def days(self) -> int:
        return (expiry(self.cert.read_bytes()) - datetime.datetime.now(datetime.UTC)).days


def fleet(etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cargoctl.main(["--etcd", etcd.endpoint, "fleet", "--directory", str(etcd.directory), *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_certificate_that_ends_soon_is_renewed_with_one_command_of_the_operators(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]
) -> None:
    """P15: key, user and rights stay; the host has only to be running."""
    host = Host(etcd, "alpha", 5)
    [own, _] = certificates.findings(host.settings)
    assert (own.about, own.level) == ("certificate", "advice")
    assert "cargoctl fleet renew" in own.remedy
    code, _, err = fleet(etcd, capsys, "renew", "alpha")
    assert (code, "has not asked for its next certificate" in err) == (1, True)
    with capture_logs() as logs:
        host.renewal.look()
    assert any("ends on" in line["event"] for line in logs), "the log says it, too"
    code, out, err = fleet(etcd, capsys, "renew", "--json")
    assert code == 0, err
    assert set(json.loads(out)["renewed"]) == {"hostd/alpha"}, "everything else is good for a year"
    host.renewal.look()
    assert host.days > 390
    assert common_name(host.cert.read_bytes()) == host.credential.member.user
    host.store.put(etcd.keys.host("alpha"), b"{}")
    assert [one.level for one in certificates.findings(host.settings)] == ["ok", "ok"]
    code, out, _ = fleet(etcd, capsys, "renew")
    assert (code, out.endswith("nothing ends within 30 days\n")) == (0, True)
    code, _, err = fleet(etcd, capsys, "renew", "nobody")
    assert (code, "nobody: no member of this fleet" in err) == (1, True)
    code, _, err = fleet(etcd, capsys, "renew", "coordinator/c9")
    assert (code, "no certificate of coordinator/c9" in err) == (2, True)


def test_the_next_call_is_made_with_the_file_that_lies_there_now(etcd: SecuredEtcd) -> None:
    """The store of a running process, without a word to it; calls of others on the old connection come to their end."""
    host, other = Host(etcd, "beta", 100), Host(etcd, "gamma", 100)
    host.store.put(etcd.keys.host("beta"), b"1")
    failures: list[Exception] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                host.store.put(etcd.keys.host("beta"), b"2")
            except StoreUnavailableError as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        host.certify(100)
        host.store.put(etcd.keys.host("beta"), b"3")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    # A certificate of another user shows that it is really taken.
    shutil.copy(other.key, host.key)
    shutil.copy(other.cert, host.cert)
    host.store.put(etcd.keys.host("gamma"), b"4")
    with pytest.raises(StoreUnavailableError, match="permission denied"):
        host.store.put(etcd.keys.host("beta"), b"5")
    host.cert.unlink()
    host.store.put(etcd.keys.host("gamma"), b"6")  # one that is just being replaced


def test_a_migration_goes_on_while_everything_is_renewed_and_etcd_restarts_with_its_own(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]
) -> None:
    """B14: histories go on, watches come back, and etcd shows its new certificate without being told."""
    host, _ = Host(etcd, "delta", 3), etcd.join("epsilon")
    host.renewal.look()
    etcd.access.grant("renewed-1", "box", "delta", "epsilon")
    last = etcd.coordinator.append("renewed-1", None, SAMPLES["requested"])
    with host.store.follow(etcd.keys.inbox("delta")) as follower:
        assert follower.poll(5) is not None
        before = served(etcd)
        code, out, err = fleet(etcd, capsys, "renew", "delta", "etcd", "coordinator/c1", "operator", "--days", "40")
        assert code == 0, err
        assert f"bring {etcd.directory}/etcd.crt to every member of etcd" in out
        assert served(etcd) != before, "etcd reads it at the next connection"
        assert server_names((etcd.directory / "etcd.crt").read_bytes()) == ["127.0.0.1"]
        host.renewal.look()
        assert 38 <= host.days <= 40
        last = etcd.coordinator.append("renewed-1", last, SAMPLES["prepare_ordered"])
        assert etcd.process is not None
        etcd.process.kill()  # every connection is made anew
        etcd.process.wait(10)
        etcd.start()
        etcd.coordinator.store.put(etcd.keys.inbox_pointer("delta", "renewed-1"), b'{"seq":2}')
        assert any(isinstance(follower.poll(10), Changes) for _ in range(5))
    assert host.store.read("renewed-1")[-1] == last


def served(etcd: SecuredEtcd) -> str:
    """The serial number of the certificate that etcd shows."""
    access = etcd.files("operator")
    context = ssl.create_default_context(cafile=str(access.ca))
    context.load_cert_chain(str(access.cert), str(access.key))
    host, _, port = etcd.endpoint.partition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        told = secured.getpeercert()
    assert told is not None
    return str(told["serialNumber"])


def test_nobody_gets_a_certificate_in_another_hosts_name(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """P15: neither another host nor a coordinator, which may write every key; and a host takes none but its own."""
    host, thief = Host(etcd, "zeta", 3), Host(etcd, "eta", 100)
    for key in (etcd.keys.renewal("zeta"), etcd.keys.renewed("zeta"), etcd.keys.renewed("eta")):
        with pytest.raises(StoreUnavailableError, match="permission denied"):
            thief.store.put(key, b"x")
    key = new_tls_key()
    write_private(tmp_path / "mallory.key", key)
    ends = datetime.datetime.now(datetime.UTC).isoformat()
    wanted = joining.RenewalRequest(host="zeta", csr=certificate_request(key, "x").decode(), ends=ends)
    rogue = SigningKey.load_or_make(tmp_path / "rogue.key")
    for forged in (
        joining.encode_renewal(wanted, rogue),
        joining.encode_renewal(wanted, thief.credential.own),
        b"{}",
    ):
        etcd.coordinator.store.put(etcd.keys.renewal("zeta"), forged)
        code, _, err = fleet(etcd, capsys, "renew", "zeta")
        assert code == 1
        assert "zeta for a new certificate" in err

    before = (host.cert.read_bytes(), host.ca.read_bytes())
    rogue_authority = SigningAuthority.load_or_make(tmp_path / "ca")
    request, year = certificate_request(host.key.read_bytes(), "x"), datetime.timedelta(days=365)
    user = host.credential.member.user
    own = SigningAuthority.load_or_make(etcd.directory)
    for answer in (
        joining.JoinAnswer(user=user, cert=rogue_authority.certify(request, user, year).decode()),
        joining.JoinAnswer(user=user, cert=own.certify(certificate_request(key, "x"), user, year).decode()),
        joining.JoinAnswer(user="operator", cert=own.certify(request, "operator", year).decode()),
        joining.JoinAnswer(user=user, cert="x"),
    ):
        etcd.coordinator.store.put(etcd.keys.renewed("zeta"), joining.encode_answer(answer))
        host.renewal.look()
        assert (host.cert.read_bytes(), host.ca.read_bytes()) == before
    cert = own.certify(request, user, year).decode()
    answer = joining.JoinAnswer(user=user, cert=cert, ca=rogue_authority.pem.decode())
    etcd.coordinator.store.put(etcd.keys.renewed("zeta"), joining.encode_answer(answer))
    host.renewal.look()
    assert host.ca.read_bytes() == before[1], "an authority with another key is none"


def test_the_authoritys_certificate_is_made_anew_for_the_same_key_and_the_hosts_fetch_it(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(etcd, "theta", 100)
    host.renewal.look()
    before = host.ca.read_bytes()
    key = (etcd.directory / "ca.key").read_bytes()
    code, out, err = fleet(etcd, capsys, "renew", "authority")
    assert "hostd/theta is good until" in out, err
    assert code == (1 if err else 0), "hosts of other tests have never asked"
    assert (etcd.directory / "ca.key").read_bytes() == key
    host.store.get(etcd.keys.host("theta"))  # certificates of before hold
    host.renewal.look()
    assert host.ca.read_bytes() == (etcd.directory / "ca.crt").read_bytes() != before
    assert etcd.process is not None
    etcd.process.kill()
    etcd.process.wait(10)
    etcd.start()  # with the new one
    host.store.put(etcd.keys.host("theta"), b"{}")
    assert etcd.coordinator.store.trust is not None
    assert etcd.coordinator.store.trust.member("hostd/theta") is not None, "records are the same key's"


def test_check_sees_when_etcds_own_certificate_ends(etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]) -> None:
    fleet(etcd, capsys, "renew", "etcd", "--days", "7")
    own = etcd.directory / "operator"
    settings = EtcdSettings(
        (etcd.endpoint,), ca=etcd.directory / "ca.crt", cert=own.with_suffix(".crt"), key=own.with_suffix(".key")
    )
    [found] = [one for one in bus_check.judge(bus_check.look(settings, [etcd.endpoint])) if "certificate" in one.about]
    assert (found.about, found.level) == ("etcd-certificate", "advice")
    assert "in 6 days" in found.says
    _, out, _ = fleet(etcd, capsys, "renew")
    assert "etcd is good until" in out
    [found] = [one for one in bus_check.judge(bus_check.look(settings, [etcd.endpoint])) if "certificate" in one.about]
    assert found.level == "ok"


def test_a_certificate_that_has_ended_or_is_none_is_a_problem(tmp_path: Path) -> None:
    authority = SigningAuthority.load_or_make(tmp_path)
    key = new_tls_key()
    ended = authority.certify(certificate_request(key, "x"), "x", datetime.timedelta(minutes=-1))
    (tmp_path / "ended.crt").write_bytes(ended)
    (tmp_path / "none.crt").write_text("x")
    for file, words in (
        ("ended.crt", "has ended on"),
        ("none.crt", "cannot be used"),
        ("absent.crt", "cannot be read"),
    ):
        settings = EtcdSettings((), ca=tmp_path / "ca.crt", cert=tmp_path / file, key=tmp_path / "k")
        own, of_authority = certificates.findings(settings)
        assert own.level == "problem"
        assert words in own.says
        assert own.remedy
        assert of_authority.level == "ok"
