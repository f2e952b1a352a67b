"""etcd over TLS with client certificates."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from events import bus_check
from events.crypto import new_tls_key
from events.errors import StoreUnavailableError
from events.etcd import EtcdAccess, EtcdStore
from events.settings import EtcdSettings
from tests.support.etcd import START_SECONDS, free_port
from tests.support.records import append, wait_until

pytestmark = pytest.mark.etcd


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)


def make_certificates(directory: Path) -> None:
    """A CA, and one certificate that serves for server and client."""
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(
        directory, "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test ca", "-days", "2"
    )
    openssl(directory, "req", *new, "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=node")
    (directory / "ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    signing = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext"]
    openssl(directory, "x509", "-req", "-in", "node.csr", "-out", "node.crt", *signing)


@pytest.fixture
def tls_etcd(tmp_path: Path) -> Iterator[str]:
    make_certificates(tmp_path)
    endpoint = f"https://127.0.0.1:{free_port()}"
    with (tmp_path / "etcd.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "setpriv", "--pdeathsig", "KILL", "etcd",
                f"--data-dir={tmp_path / 'data'}",
                f"--listen-client-urls={endpoint}", f"--advertise-client-urls={endpoint}",
                f"--listen-peer-urls=http://127.0.0.1:{free_port()}",
                f"--cert-file={tmp_path / 'node.crt'}", f"--key-file={tmp_path / 'node.key'}",
                f"--trusted-ca-file={tmp_path / 'ca.crt'}", "--client-cert-auth",
            ],
            stdout=log,
            stderr=log,
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
    yield endpoint
    process.kill()
    process.wait(10)


def test_reads_appends_and_watches_work_over_tls(tls_etcd: str, tmp_path: Path) -> None:
    """E30: a client certificate says who we are; without one, or with plain text, etcd is out of reach."""
    access = EtcdAccess(ca=tmp_path / "ca.crt", cert=tmp_path / "node.crt", key=tmp_path / "node.key")
    store = EtcdStore([tls_etcd], access=access)

    def answers() -> bool:
        try:
            return store.revision() > 0
        except StoreUnavailableError:
            return False

    wait_until(answers, "etcd starts", START_SECONDS)
    with store.follow(store.keys.inbox("alpha")) as follower:
        assert follower.poll(10) is not None
        append(store, "m1", None, notify=("alpha",))
        assert follower.poll(10) is not None
    store.close()
    stranger = EtcdStore([tls_etcd], access=EtcdAccess(ca=tmp_path / "ca.crt"))
    with pytest.raises(StoreUnavailableError):
        append(stranger, "m1", None, deadline_seconds=0.5)
    stranger.close()


def test_incomplete_tls_settings_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together"):
        EtcdAccess(ca=tmp_path, cert=tmp_path)
    with pytest.raises(ValueError, match="CA"):
        EtcdAccess(cert=tmp_path, key=tmp_path)
    with pytest.raises(ValueError, match="together"):
        EtcdAccess(user="root")
    with pytest.raises(ValueError, match="TLS"):
        EtcdStore(["https://127.0.0.1:1"])
    missing = EtcdStore(["https://127.0.0.1:1"], access=EtcdAccess(ca=tmp_path / "no-such-file"))
    with pytest.raises(StoreUnavailableError, match=r"cannot be used: .*no-such-file"):
        missing.revision()


def test_files_that_are_cut_or_do_not_belong_together_are_refused_in_words(tls_etcd: str, tmp_path: Path) -> None:
    """E30: gRPC would end the process for them."""
    ca, cert, key = (tmp_path / name for name in ("ca.crt", "node.crt", "node.key"))
    (tmp_path / "cut.crt").write_bytes(cert.read_bytes()[:200])
    (tmp_path / "empty").touch()
    (tmp_path / "other.key").write_bytes(new_tls_key())
    for access in (
        EtcdAccess(ca=ca, cert=tmp_path / "cut.crt", key=key),
        EtcdAccess(ca=ca, cert=tmp_path / "empty", key=key),
        EtcdAccess(ca=ca, cert=cert, key=tmp_path / "other.key"),
        EtcdAccess(ca=ca, cert=cert, key=tmp_path / "empty"),
        EtcdAccess(ca=tmp_path / "cut.crt", cert=cert, key=key),
    ):
        store = EtcdStore([tls_etcd], access=access)
        with pytest.raises(StoreUnavailableError, match="cannot be used"):
            store.revision()
        store.close()


def test_the_check_of_the_bus_speaks_tls_as_the_store_does(tls_etcd: str, tmp_path: Path) -> None:
    settings = EtcdSettings((tls_etcd,), ca=tmp_path / "ca.crt", cert=tmp_path / "node.crt", key=tmp_path / "node.key")
    wait_until(lambda: not bus_check.look(settings, [tls_etcd])[0].trouble, "etcd does not answer over TLS")
    assert bus_check.look(settings, [tls_etcd])[0].healthy
    [stranger] = bus_check.look(EtcdSettings((tls_etcd,), ca=tmp_path / "ca.crt"), [tls_etcd])
    assert stranger.trouble, "without a certificate it gets no answer"
