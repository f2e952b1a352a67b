"""What a new host and the operator tell each other: the token, the request under ``join/``, and its answer.

The token is the operator's, and a secret for its hour: with it one may write ``join/<host>/request`` and read
``join/<host>/answer``, nothing else. The request holds public keys only, and is signed by the new signing key, so that
nobody can join with a key that is not his. What makes it trustworthy is the person who compares its fingerprint.

Pure but for signatures. Everything here comes from outside and is checked.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
import re
from typing import TypeVar

import msgspec

from events.crypto import SigningKey, fingerprint, signature_holds
from events.errors import SchemaError
from events.keyspace import Keyspace, valid_host_name

VERSION = 1
MAX_BYTES = 32 * 1024
_TOKEN = "cargo1."  # noqa: S105 - what tokens begin with
_CONTEXT = b"cargo join 1\0"
_RENEWAL = b"cargo renewal 1\0"
_SSH_KEY = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{68}")
"""The only kind: one short line, without options or comment."""


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a host needs to ask for membership."""

    v: int = VERSION
    host: str
    endpoints: tuple[str, ...]
    prefix: str
    ca: str
    """PEM, as the next two."""
    cert: str
    key: str
    expires: str


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host's public keys."""

    v: int = VERSION
    host: str
    address: str
    csr: str
    """For the host's etcd certificate, PEM."""
    signing_key: str
    ssh_host_key: str
    ssh_client_key: str


class RenewalRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a member wants its next certificate for: the key that it has, under the name that it has."""

    v: int = VERSION
    host: str
    csr: str
    ends: str
    """Of the present certificate, as ISO 8601: whoever renews sees which ones are due."""


class JoinAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The certificate, PEM, for that user."""

    v: int = VERSION
    user: str
    cert: str
    ca: str = ""
    """With a renewal: the authority's certificate, which may have been made anew for the same key."""


class _Signed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request: str
    sig: str


_Kind = TypeVar("_Kind", Token, JoinRequest, RenewalRequest, JoinAnswer, _Signed)


def encode_token(token: Token) -> str:
    """One line without blanks."""
    return _TOKEN + base64.urlsafe_b64encode(msgspec.json.encode(token)).decode()


def decode_token(text: str) -> Token:
    """Raises SchemaError in words."""
    text = text.strip()
    if not text.startswith(_TOKEN):
        raise SchemaError("this is no token; `cargoctl fleet token HOST` makes one")
    try:
        raw = base64.b64decode(text[len(_TOKEN) :], altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise SchemaError("the token is incomplete; copy it again as a whole") from error
    token = _decoded(raw, Token, "the token")
    if not valid_host_name(token.host) or not token.endpoints:
        raise SchemaError("the token names no host or no etcd; make a new one")
    try:
        Keyspace(token.prefix)
    except ValueError as error:
        raise SchemaError(f"the token cannot be used: {error}") from error
    return token


def encode_request(request: JoinRequest, own: SigningKey) -> bytes:
    """The value for ``join/<host>/request``."""
    text = msgspec.json.encode(request).decode()
    return msgspec.json.encode(_Signed(request=text, sig=own.sign(_CONTEXT + text.encode())))


def decode_request(raw: bytes, host: str) -> JoinRequest:
    """The request in a stored value. Raises SchemaError unless it is one of ``host``, signed by its own key."""
    signed = _decoded(raw, _Signed, f"the request of {host} to join")
    request = _decoded(signed.request.encode("utf-8", "surrogatepass"), JoinRequest, f"the request of {host} to join")
    if not signature_holds(request.signing_key, _CONTEXT + signed.request.encode(), signed.sig):
        raise SchemaError(f"the request of {host} to join is not signed by the key that it brings")
    if request.host != host:
        raise SchemaError(f"the request of {host} to join is one of {request.host[:80]!r}")
    for key in (request.ssh_host_key, request.ssh_client_key):
        if not _SSH_KEY.fullmatch(key):
            raise SchemaError(f"the request of {host} to join holds {key[:80]!r}, which is no ssh-ed25519 key")
    try:
        ipaddress.ip_address(request.address)
    except ValueError as error:
        raise SchemaError(f"the request of {host} to join holds {request.address[:80]!r}, no IP address") from error
    return request


def request_fingerprint(raw: bytes) -> str:
    """What both sides show, and a person compares: it covers every key of the request."""
    return fingerprint(raw)


def encode_renewal(request: RenewalRequest, own: SigningKey) -> bytes:
    """The value for ``join/<host>/renewal``."""
    text = msgspec.json.encode(request).decode()
    return msgspec.json.encode(_Signed(request=text, sig=own.sign(_RENEWAL + text.encode())))


def decode_renewal(raw: bytes, host: str, public: str) -> RenewalRequest:
    """The request in a stored value. Raises SchemaError unless ``host`` has signed it with its pinned key ``public``."""
    what = f"the request of {host} for a new certificate"
    signed = _decoded(raw, _Signed, what)
    if not signature_holds(public, _RENEWAL + signed.request.encode("utf-8", "surrogatepass"), signed.sig):
        raise SchemaError(f"{what} is not signed by the key that is pinned for it")
    request = _decoded(signed.request.encode("utf-8", "surrogatepass"), RenewalRequest, what)
    try:
        ends = datetime.datetime.fromisoformat(request.ends)
    except ValueError as error:
        raise SchemaError(f"{what} says {request.ends[:80]!r}, which is no time") from error
    if request.host != host or ends.tzinfo is None:
        raise SchemaError(f"{what} is one of {request.host[:80]!r}, or its time has no zone")
    return request


def encode_answer(answer: JoinAnswer) -> bytes:
    """The value for ``join/<host>/answer``."""
    return msgspec.json.encode(answer)


def decode_answer(raw: bytes) -> JoinAnswer:
    """Raises SchemaError. Whether the certificate is one of the authority's is for the caller to check."""
    return _decoded(raw, JoinAnswer, "the answer to the request to join")


def _decoded(raw: bytes, kind: type[_Kind], what: str) -> _Kind:
    if len(raw) > MAX_BYTES:
        raise SchemaError(f"{what} has {len(raw)} bytes, over the limit of {MAX_BYTES}")
    try:
        found = msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise SchemaError(f"{what} cannot be read: {error}") from error
    if getattr(found, "v", VERSION) != VERSION:
        raise SchemaError(f"{what} has a version that is not known here")
    return found
