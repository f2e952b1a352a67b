"""How long the certificates of a secured fleet are good for, in words: for ``check``, and for the daemons' logs.

A certificate is only asked for when a connection is made: one that has ended stops nothing at once, and everything at
etcd's next restart. So it is said long before. Loaded only where a configuration names certificates.

It must never change a file.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from events.checkup import Finding, advice, ok, problem
from events.crypto import expiry, read_file
from events.errors import CargoError
from events.settings import EtcdSettings

SOON_DAYS = 30
"""What `cargoctl fleet renew` renews by itself; from then on it is said."""
AUTHORITY_SOON_DAYS = 365
"""A new certificate of the authority has to be brought to etcd, which then has to be restarted."""
RENEW = "run `cargoctl fleet renew` where the authority's key is, and see docs/operators-guide.md, Certificates and their renewal"


def findings(settings: EtcdSettings) -> list[Finding]:
    """Of this process's own certificate, and the authority's; nothing where none is configured."""
    found = []
    if settings.cert is not None:
        found.append(_of_file("certificate", f"this process's certificate {settings.cert}", settings.cert, SOON_DAYS))
    if settings.ca is not None:
        words = f"the authority's certificate {settings.ca}"
        found.append(_of_file("authority", words, settings.ca, AUTHORITY_SOON_DAYS))
    return found


def _of_file(about: str, what: str, path: Path, soon_days: int) -> Finding:
    try:
        ends = expiry(read_file(path))
    except CargoError as error:
        return problem(about, f"{what} cannot be used: {error}", "bring it back, or make it again: " + RENEW)
    return judge(about, what, ends, soon_days)


def judge(about: str, what: str, ends: datetime.datetime, soon_days: int) -> Finding:
    """``what`` is good until ``ends``."""
    days = (ends - datetime.datetime.now(datetime.UTC)).days
    if days < 0:
        return problem(about, f"{what} has ended on {ends:%Y-%m-%d}: no new connection is made with it", RENEW)
    words = f"{what} ends on {ends:%Y-%m-%d}, in {days} days"
    return advice(about, words, RENEW) if days < soon_days else ok(about, words)


def warnings(settings: EtcdSettings) -> list[str]:
    """What is not ``ok`` of the files, in words for a log."""
    return [f"{found.says}; {found.remedy}" for found in findings(settings) if found.level != "ok"]
