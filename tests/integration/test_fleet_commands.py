"""``cargoctl fleet`` and ``cargo-hostd join`` against a real etcd: from nothing to members, and out again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import cargoctl
from events.crypto import Authority, SigningKey
from events.errors import StoreUnavailableError
from events.joining import decode_token
from hostd import main as hostd
from hostd.pins import HEADER, authorized_keys, known_hosts
from labkit.spec import REPOSITORY as ROOT
from tests.support.histories import SAMPLES
from tests.support.secured_etcd import SSH_KEY, SecuredEtcd

pytestmark = pytest.mark.etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[SecuredEtcd]:
    """Not started; its files are not there yet."""
    made = SecuredEtcd(tmp_path)
    yield made
    made.close()


def fleet(etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and complaints of ``cargoctl fleet …``, as the operator runs it."""
    code = cargoctl.main(["--etcd", etcd.endpoint, "fleet", "--directory", str(etcd.directory), *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def joining(etcd: SecuredEtcd, host: str, token: str) -> subprocess.Popen[str]:
    """``cargo-hostd join`` in a process of its own; the host's files lie in a directory of its name."""
    place = etcd.directory.parent / host
    place.mkdir(exist_ok=True)
    (place / "sshd.pub").write_text(f"{SSH_KEY} root@{host}\n")
    if not (place / "hostd.cfg").exists():
        shutil.copy(ROOT / "packaging/config/hostd.cfg", place)  # as the package leaves it, with nothing said
    words = ["join", "-", "--address", "10.0.0.9", "--directory", str(place), "--wait-seconds", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hostd.main", *words, "--ssh-host-key", str(place / "sshd.pub")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    process.stdin.write(token + "\n")
    process.stdin.close()
    process.stdin = None
    return process


def shown_fingerprint(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert "asks to join" in process.stdout.readline()
    return process.stdout.readline().strip()


def test_from_nothing_to_members_and_out_again(etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]) -> None:
    """P15: the whole way of a host: token, keys of its own, approval by fingerprint, and withdrawal at once."""
    names = ("--etcd-name", "127.0.0.1", "--coordinator", "c1")
    code, out, err = fleet(etcd, capsys, "init", "--files-only", *names)
    assert code == 0, err
    assert "ca.key" in out
    authority = (etcd.directory / "ca.key").read_bytes()
    etcd.start()
    code, _, err = fleet(etcd, capsys, "init", *names)
    assert code == 0, err
    assert "use 3.5.33" in err, "the etcd of Debian 12 is too old for a fleet that is not trusted, and it is said"
    code, out, _ = fleet(etcd, capsys, "init", *names)
    assert (code, "made" in out) == (0, False), "a second time changes nothing"
    assert (etcd.directory / "ca.key").read_bytes() == authority
    assert {path.stat().st_mode & 0o777 for path in etcd.directory.glob("*.key")} == {0o600}

    code, token, _ = fleet(etcd, capsys, "token", "alpha")
    assert code == 0
    host = joining(etcd, "alpha", token)
    try:
        print_ = shown_fingerprint(host)
        code, out, _ = fleet(etcd, capsys, "list")
        assert f"alpha asks to join: {print_}" in out
        code, _, err = fleet(etcd, capsys, "approve", "alpha", "--fingerprint", "SHA256:another")
        assert code == 2
        assert "not the fingerprint of the request" in err
        code, out, err = fleet(etcd, capsys, "approve", "alpha", "--fingerprint", print_)
        assert code == 0, err
        assert "SSH host key" in out
        said, complaints = host.communicate(timeout=30)
        assert host.returncode == 0, complaints
        assert "alpha is a member as hostd/alpha/" in said
    finally:
        host.kill()
    place = etcd.directory.parent / "alpha"
    assert {path.stat().st_mode & 0o777 for path in (place / "trust").glob("*.key")} == {0o600}
    assert "endpoints = " + etcd.endpoint in (place / "hostd.cfg").read_text()
    config = place / "hostd.cfg"
    written = config.read_text()
    again = joining(etcd, "alpha", token)
    assert again.communicate(timeout=30)[0].startswith("alpha is a member")
    assert config.read_text() == written, "joining again changes nothing"
    mine = written.replace("name = alpha", "name = another").replace("signing_key = ", "#signing_key = ")
    config.write_text(mine)
    again = joining(etcd, "alpha", token)
    _, complaints = again.communicate(timeout=30)
    assert again.returncode == 1
    assert "[host] name = alpha\n" in complaints
    assert f"[trust] signing_key = {place}/trust/signing.key\n" in complaints
    assert "[etcd]" not in complaints
    assert config.read_text() == mine, "what a person has written is left alone"
    member = etcd.store("etcd", SigningKey.load(place / "trust/signing.key"), place / "trust")
    member.put(etcd.keys.host("alpha"), b"{}")
    assert member.trust is not None
    pins = member.trust.members()
    assert known_hosts(pins) == HEADER + f"alpha {SSH_KEY}\n"
    assert authorized_keys(pins, "alpha") == HEADER, "nobody comes to himself"
    assert authorized_keys(pins, "beta").count("ssh-ed25519") == 1

    code, out, _ = fleet(etcd, capsys, "remove", "alpha")
    assert code == 0, out
    with pytest.raises(StoreUnavailableError):
        member.get(etcd.keys.host("alpha"))
    code, out, _ = fleet(etcd, capsys, "list")
    assert "hostd/alpha              removed" in out
    left = etcd.store("operator")
    assert left.trust is not None
    assert known_hosts(left.trust.members()) == HEADER
    assert "hostd/alpha" not in etcd.etcdctl(etcd.files("operator"), "user", "list").stdout
    code, _, err = fleet(etcd, capsys, "remove", "alpha")
    assert (code, "is no member" in err) == (1, True)

    _, token, _ = fleet(etcd, capsys, "token", "alpha")
    host = joining(etcd, "alpha", token)
    try:
        code, _, err = fleet(etcd, capsys, "approve", "alpha", "--fingerprint", shown_fingerprint(host))
        assert (code, "brings the signing key that was withdrawn" in err) == (1, True)
    finally:
        host.kill()
        host.communicate()


def test_a_token_opens_nothing_but_the_request(etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]) -> None:
    """P15: whoever reads the token over somebody's shoulder can ask, and a person sees another fingerprint."""
    etcd.make_files()
    etcd.start()
    etcd.secure()
    _, text, _ = fleet(etcd, capsys, "token", "beta", "--minutes", "5")
    token = decode_token(text)
    place = etcd.directory.parent / "beta/trust"
    place.mkdir(parents=True)
    (place / "ca.crt").write_text("another fleet's")
    elsewhere = joining(etcd, "beta", text)
    assert "trusts another fleet's authority" in elsewhere.communicate(timeout=60)[1]
    (place / "ca.crt").unlink()
    place = etcd.directory.parent / "thief"
    place.mkdir()
    (place / "t.crt").write_text(token.cert)
    (place / "t.key").write_text(token.key)
    assert token.ca.encode() == Authority.load(etcd.directory / "ca.crt").pem
    thief = etcd.store("t", directory=place)
    for key in (
        etcd.keys.host("beta"),
        etcd.keys.member("hostd/beta"),
        etcd.keys.join_request("alpha"),
        etcd.keys.root,
    ):
        with pytest.raises(StoreUnavailableError, match="permission denied"):
            thief.put(key, b"")
        with pytest.raises(StoreUnavailableError, match="permission denied"):
            thief.range(key)
    with pytest.raises(StoreUnavailableError, match="permission denied"):
        thief.put(etcd.keys.join_answer("beta"), b"")
    thief.put(etcd.keys.join_request("beta"), b'{"request":"{}","sig":""}')
    code, _, err = fleet(etcd, capsys, "approve", "beta", "--fingerprint", "x")
    assert code == 1
    assert "cannot be read" in err
    late = joining(etcd, "beta", text)
    said, complaints = late.communicate(timeout=30)
    assert late.returncode == 1, said
    assert "somebody else has asked to join as beta" in complaints
    _, again, _ = fleet(etcd, capsys, "token", "beta")
    with pytest.raises(StoreUnavailableError):
        thief.get(etcd.keys.join_request("beta"))
    assert decode_token(again).key != token.key


def test_a_forged_order_is_cut_off_and_a_host_at_work_is_not_removed_by_accident(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str]
) -> None:
    etcd.make_files()
    etcd.start()
    etcd.secure()
    alpha, _ = etcd.join("alpha"), etcd.join("beta")
    etcd.access.grant("web-1", "web", "alpha", "beta")
    first = etcd.coordinator.append("web-1", None, SAMPLES["requested"])

    alpha.append("web-1", first, SAMPLES["abort_ordered"], by="coordinator/c1")
    evidence = str(etcd.directory.parent / "evidence")
    code, _, err = fleet(etcd, capsys, "cut", "web-1", "--evidence", evidence, "--since", "1")
    assert (code, "begins with event 2" in err) == (2, True)
    code, out, err = fleet(etcd, capsys, "cut", "web-1", "--evidence", evidence, "--since", "2")
    assert code == 0, err
    assert "was not signed by coordinator/c1" in out
    assert etcd.coordinator.store.read("web-1") == [first]

    code, _, err = fleet(etcd, capsys, "remove", "alpha")
    assert code == 2
    assert "web-1" in err
    assert etcd.coordinator.store.get(etcd.keys.member("hostd/alpha")) is not None
    code, out, _ = fleet(etcd, capsys, "remove", "alpha", "--force", "--json")
    assert code == 0
    assert json.loads(out)["under_way"] == ["web-1"]


def test_an_etcd_that_does_not_serve_yet_is_told_how(
    etcd: SecuredEtcd, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("events.store.DEADLINE_SECONDS", 0.2)
    code, _, err = fleet(etcd, capsys, "init", "--etcd-name", "127.0.0.1")
    assert code == 1
    assert f"--trusted-ca-file {etcd.directory}/ca.crt" in err


@pytest.mark.parametrize("text", ["", "cargo1.", "cargo1.AAAA", "cargo2.e30=", "cargo1.e30="])
def test_what_is_no_token_is_refused_in_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hostd.main(["join", text or "x", "--address", "10.0.0.1"]) == 1
    assert "token" in capsys.readouterr().err
