"""Keys, signatures and certificates: the only module that imports ``cryptography``.

Three kinds of keys, each for one thing. The *authority's* (ECDSA, P-256) signs certificates for etcd and the records
of members; it stays with the operator. A *member's signing key* (Ed25519) signs its events. A member's *TLS key*
(ECDSA, P-256; gRPC's TLS library verifies no Ed25519 certificates) is who it is to etcd. Keys are PEM files, written
with mode 0600 and never overwritten.

It must never decide whom to trust: it only says whether a signature is one.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from events.errors import PermanentError

CLOCK_SKEW = datetime.timedelta(minutes=5)
"""A certificate is valid from so much earlier: hosts' clocks differ."""
AUTHORITY_DAYS = 3650
_ENCODING, _PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
_PLAIN = serialization.NoEncryption()


_UNUSABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.AttributeNotFound,
)
"""What the library raises for what is no key, certificate or request, or one of another kind."""


class CryptoError(PermanentError):
    """A key, certificate or signature is not what it should be."""


def fingerprint(text: bytes) -> str:
    """SHA-256 as ssh-keygen shows it: what two people compare."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")


# --- files ---------------------------------------------------------------------------------------


def write_private(path: Path, text: bytes) -> None:
    """Write a file that is its owner's alone and was not there before. Raises CryptoError."""
    write_file(path, text, 0o600, fresh=True)


def write_file(path: Path, text: bytes, mode: int, *, fresh: bool = False) -> None:
    """Write ``path`` as a whole, durably; ``fresh``: it must not exist. Raises CryptoError."""
    partial = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(text)
            file.flush()
            os.fsync(fd)
        if fresh:
            os.link(partial, path)
            partial.unlink()
        else:
            partial.replace(path)
    except OSError as error:
        raise CryptoError(f"{path} cannot be written: {error.strerror}. Nothing that was there has changed") from error


def read_file(path: Path) -> bytes:
    """The file's contents. Raises CryptoError in words."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CryptoError(f"{path} cannot be read: {error.strerror}") from error


# --- a member's signature ------------------------------------------------------------------------


class SigningKey:
    """An Ed25519 key. ``public`` is the base64 of its 32 public bytes."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        self.public = base64.b64encode(raw).decode()

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in a PEM file. Raises CryptoError."""
        try:
            key = serialization.load_pem_private_key(read_file(path), None)
        except _UNUSABLE as error:
            raise CryptoError(f"{path} holds no usable private key: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise CryptoError(f"{path} holds no Ed25519 key, which events are signed with")
        return cls(key)

    @classmethod
    def load_or_make(cls, path: Path) -> SigningKey:
        """The key in ``path``, made if there is none."""
        if not path.exists():
            write_private(path, Ed25519PrivateKey.generate().private_bytes(_ENCODING, _PKCS8, _PLAIN))
        return cls.load(path)

    def sign(self, text: bytes) -> str:
        """Base64 of the signature over ``text``."""
        return base64.b64encode(self._key.sign(text)).decode()


def signature_holds(public: str, text: bytes, signature: str) -> bool:
    """Whether the owner of the Ed25519 key ``public`` has signed ``text``."""
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), text)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


# --- the authority -------------------------------------------------------------------------------


class Authority:
    """The fleet's certificate authority, as everybody knows it: its certificate."""

    def __init__(self, pem: bytes) -> None:
        try:
            self.certificate = x509.load_pem_x509_certificate(pem)
            key = self.certificate.public_key()
        except _UNUSABLE as error:
            raise CryptoError(f"this is no certificate: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CryptoError("the authority's certificate is not of the kind that `cargoctl fleet init` makes")
        self._public = key
        self.pem = pem

    @classmethod
    def load(cls, path: Path) -> Authority:
        """From a PEM file. Raises CryptoError."""
        return cls(read_file(path))

    def is_same_as(self, other: Authority) -> bool:
        """Whether it is the same authority, perhaps with another certificate: what signs is the key."""
        return _spki(self._public) == _spki(other._public)

    def has_signed(self, text: bytes, signature: str) -> bool:
        """Whether the authority's key has signed ``text``."""
        try:
            self._public.verify(base64.b64decode(signature, validate=True), text, ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError, binascii.Error):
            return False
        return True

    def check_certificate(self, pem: bytes, name: str, key_pem: bytes) -> None:
        """Raise CryptoError unless ``pem`` is a certificate of ours for ``name`` and the private key ``key_pem``."""
        try:
            made = x509.load_pem_x509_certificate(pem)
            made.verify_directly_issued_by(self.certificate)
            own = serialization.load_pem_private_key(key_pem, None).public_key()
        except (*_UNUSABLE, InvalidSignature) as error:
            raise CryptoError(f"the certificate is not one that the fleet's authority signed: {error}") from error
        if _spki(own) != _spki(made.public_key()) or _common_name(made.subject) != name:
            raise CryptoError(f"the certificate is not for {name} and the key of this host")


class SigningAuthority(Authority):
    """The authority with its private key: the operator's."""

    def __init__(self, pem: bytes, key_pem: bytes) -> None:
        super().__init__(pem)
        key = _tls_key(key_pem, "the authority's key")
        if _spki(key.public_key()) != _spki(self._public):
            raise CryptoError("the authority's key does not belong to its certificate")
        self._key = key

    @classmethod
    def load_or_make(cls, directory: Path) -> SigningAuthority:
        """From ``ca.crt`` and ``ca.key`` in ``directory``, made if there are none. Raises CryptoError."""
        certificate, key_file = directory / "ca.crt", directory / "ca.key"
        if not key_file.exists():
            if certificate.exists():
                raise CryptoError(f"{certificate} is there without {key_file}: bring the key back, nothing was changed")
            write_private(key_file, new_tls_key())
        if not certificate.exists():
            write_file(certificate, _self_signed(_tls_key(read_file(key_file), "the authority's key")), 0o644)
        return cls(read_file(certificate), read_file(key_file))

    def prolong(self, directory: Path) -> SigningAuthority:
        """The same key with a new certificate in ``directory``; what it has signed stays signed. Raises CryptoError."""
        write_file(directory / "ca.crt", _self_signed(self._key), 0o644)
        return SigningAuthority.load_or_make(directory)

    def sign(self, text: bytes) -> str:
        """Base64 of the signature over ``text``."""
        return base64.b64encode(self._key.sign(text, ec.ECDSA(hashes.SHA256()))).decode()

    def certify(
        self, request_pem: bytes, name: str, valid: datetime.timedelta, *, server_names: Sequence[str] = ()
    ) -> bytes:
        """A certificate for the key in ``request_pem``, under ``name`` whatever the request calls itself.

        It is for clients; with ``server_names`` (addresses and DNS names) for an etcd server, which is also a client of
        its peers. Raises CryptoError for a request that its own key has not signed.
        """
        try:
            asked = x509.load_pem_x509_csr(request_pem)
            public = asked.public_key()
            signed = asked.is_signature_valid
        except _UNUSABLE as error:
            raise CryptoError(f"this is no certificate request: {error}") from error
        if not signed or not isinstance(public, ec.EllipticCurvePublicKey):
            raise CryptoError("the certificate request is not signed by an elliptic-curve key of its own")
        now = datetime.datetime.now(datetime.UTC)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if server_names else [])
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + valid)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        )
        if server_names:
            names = x509.SubjectAlternativeName([_general(one) for one in server_names])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(_ENCODING)


def new_tls_key() -> bytes:
    """A new P-256 private key, PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(_ENCODING, _PKCS8, _PLAIN)


def certificate_request(key_pem: bytes, name: str) -> bytes:
    """A request for a certificate, PEM. Raises CryptoError."""
    key = _tls_key(key_pem, "the TLS key")
    request = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(_ENCODING)


def expiry(pem: bytes) -> datetime.datetime:
    """Until when a certificate is valid, UTC. Raises CryptoError."""
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except _UNUSABLE as error:
        raise CryptoError(f"this is no certificate: {error}") from error


def common_name(pem: bytes) -> str:
    """Whose certificate it is. Raises CryptoError."""
    try:
        return _common_name(x509.load_pem_x509_certificate(pem).subject)
    except _UNUSABLE as error:
        raise CryptoError(f"this is no certificate: {error}") from error


def server_names(pem: bytes) -> list[str]:
    """The addresses and DNS names that a server's certificate is for; none of a client's. Raises CryptoError."""
    try:
        found = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except _UNUSABLE as error:
        raise CryptoError(f"this is no certificate: {error}") from error
    return [str(one.value) for one in found.value]


def _tls_key(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except _UNUSABLE as error:
        raise CryptoError(f"{what} cannot be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CryptoError(f"{what} is not an elliptic-curve key")
    return key


def _self_signed(key: ec.EllipticCurvePrivateKey) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    name = _name("Cargo fleet authority")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return certificate.sign(key, hashes.SHA256()).public_bytes(_ENCODING)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _spki(key: object) -> bytes:
    public: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public
