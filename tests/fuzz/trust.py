"""Targets: what a secured fleet reads before it believes anybody: tokens, requests to join, answers, members' records, signed events."""

from __future__ import annotations

import atexit
import base64
import contextlib
import datetime
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.fleet import fingerprints
from events import joining
from events.crypto import SigningKey, certificate_request, new_tls_key, write_private
from events.errors import CargoError
from events.membership import Member, decode_member, encode_member
from events.schema import GENESIS, SIGNED_VERSION, Event, decode_event
from events.trust import about
from hostd.pins import HEADER, authorized_keys, known_hosts
from tests.fuzz.bus import _histories
from tests.fuzz.campaign import Target
from tests.support.secured import ALPHA, SecuredFleet

SSH_KEY = "ssh-ed25519 " + "A" * 68
TOKEN = joining.Token(
    host="alpha", endpoints=("10.0.0.1:2379",), prefix="/cargo", ca="c", cert="c", key="k", expires="t"
)
MEMBER = Member(
    name=ALPHA, user="u", signing_key="A" * 43 + "=", ssh_host_key=SSH_KEY, ssh_client_key=SSH_KEY, address="10.0.0.9"
)
ROWS = 12


@cache
def fleet() -> SecuredFleet:
    """One for the whole run, with keys that are always the same, so that a kept input means the same again."""
    place = Path(tempfile.mkdtemp(prefix="cargo-fuzz-trust-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    write_private(place / "ca/ca.key", _pem(ec.derive_private_key(2**200 + 1, ec.SECP256R1())))
    write_private(place / "hostd-alpha.key", _pem(Ed25519PrivateKey.from_private_bytes(b"alpha" + bytes(27))))
    return SecuredFleet(place)


def _pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


@cache
def _own() -> SigningKey:
    return fleet().key(ALPHA)


@cache
def _request() -> bytes:
    return msgspec.json.encode(
        joining.JoinRequest(
            host="alpha", address="10.0.0.9", csr=certificate_request(new_tls_key(), "x").decode(),
            signing_key=_own().public, ssh_host_key=SSH_KEY, ssh_client_key=SSH_KEY,
        )
    )  # fmt: skip


def run_request(raw: bytes) -> None:
    """A request that its sender has signed, whatever it says: what becomes of it are one-line keys, and a certificate of our naming."""
    with contextlib.suppress(CargoError):
        joining.decode_request(raw, "alpha")
    text = raw.decode("utf-8", "replace")
    signed = json.dumps({"request": text, "sig": _own().sign(b"cargo join 1\0" + text.encode())}).encode()
    request = joining.decode_request(signed, "alpha")
    fingerprints(request)
    member = Member(
        name=ALPHA, signing_key="x", ssh_host_key=request.ssh_host_key, ssh_client_key=request.ssh_client_key,
    )  # fmt: skip
    for made in (known_hosts({ALPHA: member}), authorized_keys({ALPHA: member}, "beta")):
        assert made.startswith(HEADER) and made.count("\n") == HEADER.count("\n") + 1, made
    fleet().authority.certify(
        request.csr.encode("utf-8", "surrogatepass"), "hostd/alpha/1", datetime.timedelta(hours=1)
    )


def run_renewal(raw: bytes) -> None:
    """A request for the next certificate: as it is found, and as if the host had signed it."""
    with contextlib.suppress(CargoError):
        joining.decode_renewal(raw, "alpha", _own().public)
    text = raw.decode("utf-8", "replace")
    signed = json.dumps({"request": text, "sig": _own().sign(b"cargo renewal 1\0" + text.encode())}).encode()
    request = joining.decode_renewal(signed, "alpha", _own().public)
    datetime.datetime.fromisoformat(request.ends).astimezone(datetime.UTC)
    fleet().authority.certify(
        request.csr.encode("utf-8", "surrogatepass"), "hostd/alpha/1", datetime.timedelta(hours=1)
    )


@cache
def _renewal() -> bytes:
    csr = certificate_request(_key(), "x").decode()
    return msgspec.json.encode(joining.RenewalRequest(host="alpha", csr=csr, ends="2030-01-01T00:00:00+00:00"))


def run_answer(raw: bytes) -> None:
    """What a host finds as its certificate: taken only if it is one."""
    answer = joining.decode_answer(raw)
    fleet().authority.check_certificate(answer.cert.encode("utf-8", "surrogatepass"), answer.user, _key())


@cache
def _key() -> bytes:
    return _pem(ec.derive_private_key(2**200 + 3, ec.SECP256R1()))


@cache
def _answer() -> bytes:
    cert = fleet().authority.certify(certificate_request(_key(), "x"), "hostd/alpha/1", datetime.timedelta(hours=1))
    return joining.encode_answer(joining.JoinAnswer(user="hostd/alpha/1", cert=cert.decode()))


def run_token(raw: bytes) -> None:
    """What somebody has copied, and what somebody has made."""
    with contextlib.suppress(CargoError):
        joining.decode_token(raw.decode("utf-8", "surrogateescape"))
    inner = base64.urlsafe_b64encode(raw).decode()
    joining.decode_token(f"cargo1.{inner}")


def run_member(raw: bytes) -> None:
    """A record under ``members/``: as it is found, and as if the authority had signed it."""
    with contextlib.suppress(CargoError):
        decode_member(raw, ALPHA, fleet().authority)
    text = raw.decode("utf-8", "replace")
    signed = json.dumps({"record": text, "sig": fleet().authority.sign(b"cargo member 1\0" + text.encode())}).encode()
    decode_member(signed, ALPHA, fleet().authority)


def run_proof(raw: bytes) -> None:
    """Histories by anybody, signed by alpha or by nobody knows whom: nothing that alpha may not write is believed."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return
    events = _signed(document if isinstance(document, list) else [])
    if not events:
        return
    trust = fleet().trust()
    troubles = dict(trust.troubles("m", events, lambda: events[0]))
    for event in events:
        if event.by.startswith("coordinator/"):
            assert event.seq in troubles, "alpha has written it"
    assert all(words.isprintable() for words in troubles.values())


def _signed(rows: list[Any]) -> list[Event]:
    """``[type, by, epoch, boot, cause, data, ours]`` as a chain; ``ours``: signed by alpha, else what it says."""
    events: list[Event] = []
    for row in rows[:ROWS]:
        if not isinstance(row, list) or len(row) != 7:
            continue
        kind, by, epoch, boot, cause, data, ours = row
        previous = events[-1] if events else None
        envelope = {
            "v": SIGNED_VERSION, "seq": len(events) + 1, "uuid": f"u{len(events)}", "prev": previous.digest if previous else GENESIS,
            "type": kind, "at": "2030-01-01T00:00:00.000Z", "by": by, "boot": boot, "cause": cause, "epoch": epoch, "data": data,
        }  # fmt: skip
        text = json.dumps(envelope, separators=(",", ":")).encode()
        sig = ours if isinstance(ours, str) else _own().sign(about("m") + text)
        with contextlib.suppress(CargoError):
            events.append(decode_event(text[:-1] + b',"sig":' + json.dumps(sig).encode() + b"}"))
    return events


def _proof_rows() -> bytes:
    events = _histories()[0][:ROWS]
    return json.dumps(
        [[e.type, e.by, e.epoch, e.boot, e.cause, json.loads(e.raw)["data"], True] for e in events]
    ).encode()


TARGETS = (
    Target("join-request", run_request, [_request()], "json", 2),
    Target("renewal", run_renewal, [_renewal()], "json", 2),
    Target("join-answer", run_answer, [_answer()], "json", 2),
    Target("token", run_token, [msgspec.json.encode(TOKEN), joining.encode_token(TOKEN).encode()], weight=2),
    Target("member", run_member, [msgspec.json.encode(MEMBER), encode_member(MEMBER, fleet().authority)], "json", 2),
    Target("proof", run_proof, [_proof_rows()], "json", 2),
)
