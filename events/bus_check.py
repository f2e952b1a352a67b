"""Is the bus fit for use by this process? Reach, version, health, clock and permissions of etcd, for ``check``.

What it must never do: leave anything in etcd. Permission to write is tried with a transaction whose condition cannot
hold: etcd asks for the permission before it looks at the condition.

``look`` asks each endpoint over HTTP, which needs no login; ``judge`` turns the answers into findings, and is pure.
"""

from __future__ import annotations

import datetime
import http.client
import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from events import certificates
from events.checkup import Finding, advice, ok, problem
from events.errors import CargoError, StoreUnavailableError
from events.settings import EtcdSettings
from events.store import Compare, Delete, Store

TIMEOUT_SECONDS = 5.0
OLDEST_VERSION = (3, 4)
"""Leases that survive a change of leader, watches that tell progress, and the messages that events.etcd speaks."""
CLOCK_ADVICE_SECONDS = 2.0
"""The answer's date has a resolution of one second."""
CLOCK_PROBLEM_SECONDS = 60.0
"""Histories become unreadable for people, and certificates and tokens expire at the wrong moment."""
IMPOSSIBLE_REVISION = 1 << 62


@dataclass(frozen=True)
class Answer:
    """What one endpoint said. ``trouble`` is empty when it answered."""

    endpoint: str
    version: str = ""
    healthy: bool = True
    skew_seconds: float | None = None
    """This machine's clock minus the endpoint's."""
    trouble: str = ""
    certificate_ends: datetime.datetime | None = None
    """Of the endpoint's own, where it has one."""


def look(settings: EtcdSettings, endpoints: Sequence[str]) -> list[Answer]:
    """Ask every endpoint for its version, health and time."""
    try:
        context = _tls(settings)
    except OSError as error:
        return [Answer(endpoint, trouble=f"the TLS files cannot be used: {error}") for endpoint in endpoints]
    return [_ask(endpoint, context) for endpoint in endpoints]


def _tls(settings: EtcdSettings) -> ssl.SSLContext | None:
    if settings.ca is None:
        return None
    context = ssl.create_default_context(cafile=str(settings.ca))
    if settings.cert is not None and settings.key is not None:
        context.load_cert_chain(str(settings.cert), str(settings.key))
    return context


def _ask(endpoint: str, context: ssl.SSLContext | None) -> Answer:
    split = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    host, port = split.hostname or "", split.port or 2379
    connection = (
        http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)
    )
    try:
        began = time.time()
        connection.request("GET", "/version")
        answer = connection.getresponse()
        body = answer.read(4096)
        ends = _certificate_ends(connection)
        middle = (began + time.time()) / 2
        told = answer.getheader("Date")
        # The date is cut to the second.
        skew = middle - parsedate_to_datetime(told).timestamp() - 0.5 if told else None
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read(4096))
        return Answer(
            endpoint,
            str(json.loads(body)["etcdserver"]),
            str(health.get("health")).lower() == "true",
            skew,
            certificate_ends=ends,
        )
    except (OSError, http.client.HTTPException) as error:
        return Answer(endpoint, trouble=str(error) or type(error).__name__)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Answer(endpoint, trouble="what answers there is no etcd")
    finally:
        connection.close()


def _certificate_ends(connection: http.client.HTTPConnection) -> datetime.datetime | None:
    told = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
    if not told or not isinstance(told.get("notAfter"), str):
        return None
    return datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(str(told["notAfter"])), datetime.UTC)


def judge(answers: Sequence[Answer]) -> list[Finding]:
    """Reach, version, health and clock, in words."""
    found = [_reach(answers)]
    for answer in answers:
        if answer.trouble:
            continue
        if _number(answer.version) < OLDEST_VERSION:
            found.append(
                problem(
                    "etcd-version",
                    f"etcd at {answer.endpoint} is {answer.version}, older than 3.4",
                    "upgrade it, one minor version after the other; Debian's etcd-server is new enough",
                )
            )
        else:
            found.append(ok("etcd-version", f"etcd at {answer.endpoint} is {answer.version}"))
        if answer.certificate_ends is not None:
            what = f"the certificate of etcd at {answer.endpoint}"
            found.append(certificates.judge("etcd-certificate", what, answer.certificate_ends, certificates.SOON_DAYS))
        if not answer.healthy:
            found.append(
                problem(
                    "etcd-health",
                    f"etcd at {answer.endpoint} says that it is not healthy: it has no leader, or no space",
                    "look at `etcdctl endpoint status` and `etcdctl alarm list`; after NOSPACE compact, defragment, "
                    "and disarm the alarm",
                )
            )
    skews = [answer.skew_seconds for answer in answers if answer.skew_seconds is not None]
    if skews:
        found.append(_clock(max(skews, key=abs)))
    return found


def _reach(answers: Sequence[Answer]) -> Finding:
    silent = [answer for answer in answers if answer.trouble]
    names = ", ".join(f"{answer.endpoint} ({answer.trouble})" for answer in silent)
    if not silent:
        return ok("etcd", f"reached: {', '.join(answer.endpoint for answer in answers)}")
    remedy = "see that etcd runs and listens there, that [etcd] endpoints, ca, cert and key are right, and that no firewall is in between"
    if len(silent) == len(answers):
        return problem("etcd", f"not reached: {names}", remedy)
    return advice("etcd", f"only some members are reached; not these: {names}", remedy)


def _clock(skew_seconds: float) -> Finding:
    words = f"this machine's clock is {abs(skew_seconds):.0f} s {'ahead of' if skew_seconds > 0 else 'behind'} etcd's"
    remedy = "run a time service on all machines, such as Debian's systemd-timesyncd or chrony"
    if abs(skew_seconds) >= CLOCK_PROBLEM_SECONDS:
        return problem("clock", words, remedy)
    if abs(skew_seconds) >= CLOCK_ADVICE_SECONDS:
        return advice("clock", f"{words}; nothing depends on it, but times in histories mislead", remedy)
    return ok("clock", "it agrees with etcd's")


def permissions(store: Store, *, reads: str, writes: str) -> list[Finding]:
    """Whether this process may read below ``reads`` and write ``writes``. Changes nothing."""
    found = []
    user = "give the etcd user of this process the role that it needs; docs/protocol.md says what each may do"
    for about, what, act in (
        ("etcd-read", f"read {reads}", lambda: store.range(reads)),
        ("etcd-write", f"write {writes}", lambda: _try_to_write(store, writes)),
    ):
        try:
            act()
        except StoreUnavailableError as error:
            found.append(problem(about, f"may not {what}: {error}", user))
        except CargoError as error:
            found.append(problem(about, f"cannot {what}: {error}", user))
        else:
            found.append(ok(about, f"may {what}"))
    return found


def _try_to_write(store: Store, key: str) -> None:
    store.transact([Compare(key, "mod", IMPOSSIBLE_REVISION)], [Delete(key)])


def _number(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else (0,)
