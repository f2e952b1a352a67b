"""What a new host and the operator tell each other; all of it comes from outside."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.crypto import CryptoError, SigningAuthority, SigningKey, certificate_request, new_tls_key
from events.errors import SchemaError
from events.joining import (
    JoinRequest,
    Token,
    decode_answer,
    decode_request,
    decode_token,
    encode_request,
    encode_token,
)

SSH_KEY = "ssh-ed25519 " + "A" * 68
TOKEN = Token(host="alpha", endpoints=("10.0.0.1:2379",), prefix="/cargo", ca="c", cert="c", key="k", expires="t")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return SigningKey.load_or_make(tmp_path_factory.mktemp("own") / "signing.key")


def request(own: SigningKey, **other: str) -> JoinRequest:
    fields = {"host": "alpha", "address": "10.0.0.9", "csr": "x", "ssh_host_key": SSH_KEY, "ssh_client_key": SSH_KEY}
    return JoinRequest(signing_key=own.public, **(fields | other))


def test_a_token_survives_being_copied_and_nothing_else_is_one() -> None:
    assert decode_token(f"  {encode_token(TOKEN)}\n") == TOKEN
    for text in ("", "x", encode_token(TOKEN)[:-3], encode_token(msgspec.structs.replace(TOKEN, host="../x"))):
        with pytest.raises(SchemaError):
            decode_token(text)
    with pytest.raises(SchemaError, match="prefix"):
        decode_token(encode_token(msgspec.structs.replace(TOKEN, prefix="no slash")))


def test_a_request_is_signed_by_the_key_that_it_brings(own: SigningKey, tmp_path: Path) -> None:
    raw = encode_request(request(own), own)
    assert decode_request(raw, "alpha") == request(own)
    with pytest.raises(SchemaError, match="is one of 'alpha'"):
        decode_request(raw, "beta")
    another = SigningKey.load_or_make(tmp_path / "another")
    with pytest.raises(SchemaError, match="not signed by the key"):
        decode_request(encode_request(request(own), another), "alpha")
    with pytest.raises(SchemaError, match="not signed by the key"):
        decode_request(raw.replace(b"10.0.0.9", b"10.0.0.8"), "alpha")


@pytest.mark.parametrize(
    "fields",
    [
        {"ssh_client_key": f'command="sh" {SSH_KEY}'},
        {"ssh_client_key": f"{SSH_KEY}\n{SSH_KEY}"},
        {"ssh_host_key": f"* {SSH_KEY}"},
        {"ssh_host_key": ""},
        {"address": "10.0.0.9 ProxyCommand=sh"},
    ],
)
def test_what_would_end_up_in_a_file_of_ssh_is_one_key_and_nothing_more(
    own: SigningKey, fields: dict[str, str]
) -> None:
    """P15: a line of authorized_keys with options of the host's own choice would be a shell."""
    with pytest.raises(SchemaError):
        decode_request(encode_request(request(own, **fields), own), "alpha")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    for decode in (lambda: decode_request(raw, "alpha"), lambda: decode_answer(raw)):
        with pytest.raises(SchemaError):
            decode()
    with pytest.raises(SchemaError):
        decode_token("cargo1." + raw.decode("latin-1"))


def test_a_certificate_says_the_name_that_the_operator_gave(tmp_path: Path) -> None:
    """P15: whatever name a request asks for."""
    authority = SigningAuthority.load_or_make(tmp_path / "ca")
    assert SigningAuthority.load_or_make(tmp_path / "ca").pem == authority.pem, "made once"
    key, hour = new_tls_key(), datetime.timedelta(hours=1)
    cert = authority.certify(certificate_request(key, "root"), "hostd/alpha/1", hour)
    authority.check_certificate(cert, "hostd/alpha/1", key)
    for name, another in (("root", key), ("hostd/alpha/1", new_tls_key())):
        with pytest.raises(CryptoError):
            authority.check_certificate(cert, name, another)
    rogue = SigningAuthority.load_or_make(tmp_path / "rogue")
    with pytest.raises(CryptoError):
        authority.check_certificate(
            rogue.certify(certificate_request(key, "x"), "hostd/alpha/1", hour), "hostd/alpha/1", key
        )
    with pytest.raises(CryptoError, match="no certificate request"):
        authority.certify(b"x", "hostd/alpha/1", hour)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    first = SigningKey.load_or_make(tmp_path / "k").public
    assert SigningKey.load_or_make(tmp_path / "k").public == first
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    (tmp_path / "k").write_text("broken")
    with pytest.raises(CryptoError, match="no usable private key"):
        SigningKey.load_or_make(tmp_path / "k")
    (tmp_path / "ca").mkdir()
    SigningAuthority.load_or_make(tmp_path / "ca")
    (tmp_path / "ca/ca.key").unlink()
    with pytest.raises(CryptoError, match="bring the key back"):
        SigningAuthority.load_or_make(tmp_path / "ca")


def test_a_request_with_a_damaged_certificate_request_is_refused_in_words(tmp_path: Path) -> None:
    """F2: found by fuzzing; it ended `cargoctl fleet approve` with a stack trace."""
    authority = SigningAuthority.load_or_make(tmp_path / "ca")
    lines = certificate_request(new_tls_key(), "x").decode().splitlines()
    for number in range(1, len(lines) - 1):
        for letter in range(0, len(lines[number]), 3):
            line = lines[number]
            damaged = [*lines[:number], f"{line[:letter]}{'A' if line[letter] != 'A' else 'B'}{line[letter + 1 :]}"]
            with pytest.raises(CryptoError):
                authority.certify(
                    "\n".join([*damaged, *lines[number + 1 :]]).encode(), "n", datetime.timedelta(hours=1)
                )
