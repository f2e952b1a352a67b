"""Keeps this host's certificate for etcd good: asks for the next one, all the time, and takes what the operator has signed.

    join/<host>/renewal    the request: this host's own key, signed by its pinned signing key; published at every start
    join/<host>/renewed    a certificate, when the operator has run `cargoctl fleet renew`

The key stays, and so do the user and its rights. The new file takes the old one's place as a whole, and the next connection to
etcd is made with it (``events/etcd.py``): nothing is restarted, and a migration under way does not notice.

It must never write a certificate that the authority has not signed for the very key and user that are here, nor an authority
with another key. Only in a secured fleet.
"""

from __future__ import annotations

import datetime
import threading
import time
from pathlib import Path

import structlog

from events import certificates, joining
from events.crypto import (
    Authority,
    SigningKey,
    certificate_request,
    common_name,
    expiry,
    read_file,
    write_file,
)
from events.errors import CargoError
from events.settings import EtcdSettings
from events.store import Store

LOOK_SECONDS = 15.0
TELL_SECONDS = 24 * 3600.0


class Renewal:
    """A thread that looks every LOOK_SECONDS."""

    def __init__(
        self, host: str, store: Store, etcd: EtcdSettings, own: SigningKey, log: structlog.stdlib.BoundLogger
    ) -> None:
        """``etcd`` names the three TLS files."""
        assert etcd.ca is not None and etcd.cert is not None and etcd.key is not None
        self._host = host
        self._store = store
        self._settings = etcd
        self._ca, self._cert, self._key = etcd.ca, etcd.cert, etcd.key
        self._own = own
        self._log = log
        self._asked_for: datetime.datetime | None = None
        self._told_at: float | None = None
        self._said = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def start(self) -> None:
        """Look in the background, from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking; the files stay."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)

    def look(self) -> None:
        """Take a certificate that is there, and ask for the next. What is wrong is logged, and tried again."""
        self._tell()
        try:
            self._take()
            self._ask()
        except CargoError as error:
            if str(error) != self._said:
                self._log.warning("the certificate stays as it is", reason=str(error))
            self._said = str(error)
        else:
            self._said = ""

    def _ask(self) -> None:
        ends = expiry(read_file(self._cert))
        place = self._store.keys.renewal(self._host)
        if ends == self._asked_for and self._store.get(place) is not None:
            return
        request = joining.RenewalRequest(
            host=self._host,
            csr=certificate_request(read_file(self._key), f"hostd/{self._host}").decode(),
            ends=ends.isoformat(),
        )
        self._store.put(place, joining.encode_renewal(request, self._own))
        self._asked_for = ends

    def _take(self) -> None:
        stored = self._store.get(self._store.keys.renewed(self._host))
        if stored is None:
            return
        answer = joining.decode_answer(stored.value)
        here, certificate = read_file(self._cert), answer.cert.encode("utf-8", "surrogatepass")
        authority = Authority.load(self._ca)
        authority.check_certificate(certificate, common_name(here), read_file(self._key))
        if answer.ca:
            self._take_authority(authority, answer.ca.encode("utf-8", "surrogatepass"))
        if expiry(certificate) > expiry(here):
            write_file(self._cert, certificate, 0o644)
            self._log.info("certificate renewed", until=f"{expiry(certificate):%Y-%m-%d}", file=str(self._cert))

    def _take_authority(self, known: Authority, pem: bytes) -> None:
        offered = Authority(pem)
        if not offered.is_same_as(known) or expiry(pem) <= expiry(known.pem):
            return
        write_file(Path(self._ca), pem, 0o644)
        self._log.info("the authority's certificate renewed", until=f"{expiry(pem):%Y-%m-%d}", file=str(self._ca))

    def _tell(self) -> None:
        """Once a day, what is about to end."""
        now = time.monotonic()
        if self._told_at is not None and now - self._told_at < TELL_SECONDS:
            return
        self._told_at = now
        for words in certificates.warnings(self._settings):
            self._log.warning(words)

    def _run(self) -> None:
        self.look()
        while not self._closing.wait(LOOK_SECONDS):
            self.look()
