"""``cargo-coordinator check``: what this machine and the bus lack, in words, before anything is started.

It changes nothing, and may run beside a coordinator that serves.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable

from coordinator.settings import CoordinatorSettings
from events import bus_check, certificates
from events.checkup import Finding, advice, ok, problem, report
from events.connecting import connect
from events.errors import CargoError


def check(settings: CoordinatorSettings, *, as_json: bool) -> int:
    """Look, and say. Returns the exit code."""
    findings = bus_findings(settings) if settings.etcd.endpoints else embedded_findings(settings)
    return report(f"coordinator {settings.name}", findings, as_json=as_json)


def bus_findings(settings: CoordinatorSettings) -> list[Finding]:
    """Of the etcd that is configured."""
    answers = bus_check.look(settings.etcd, settings.etcd.endpoints)
    found = bus_check.judge(answers) + certificates.findings(settings.etcd)
    if len(settings.etcd.endpoints) < 3:
        found.append(
            advice(
                "etcd-members",
                f"{len(settings.etcd.endpoints)} etcd endpoint{'s are' if len(settings.etcd.endpoints) > 1 else ' is'} "
                "configured: while it is away, no migration goes on, and no container is lost",
                "for a fleet, run three members and name all of them",
            )
        )
    if all(answer.trouble for answer in answers):
        return found
    try:
        store = connect(settings.etcd, trust=settings.trust)
    except CargoError as error:
        return [*found, problem("etcd-access", str(error), "correct the [etcd] section")]
    try:
        return found + bus_check.permissions(store, reads=store.keys.requests, writes=store.keys.leader)
    finally:
        store.close()


def embedded_findings(
    settings: CoordinatorSettings, which: Callable[[str], str | None] = shutil.which
) -> list[Finding]:
    """Of the etcd that the coordinator would run itself."""
    found = [
        advice(
            "etcd",
            "no endpoint is configured: the coordinator runs an etcd of its own, which only this machine reaches",
            "good for trying out; for a fleet set [etcd] endpoints",
        )
    ]
    if which("etcd") is None:
        found.append(problem("etcd-server", "there is no etcd here to run", "apt install etcd-server"))
    for option, port in (("client_port", settings.client_port), ("peer_port", settings.peer_port)):
        with socket.socket() as probe:
            probe.settimeout(1)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            found.append(
                problem(
                    f"port-{port}",
                    f"something listens on 127.0.0.1:{port} already, perhaps a coordinator with its etcd",
                    f"if it is an etcd, set [etcd] endpoints = 127.0.0.1:{settings.client_port}; else change {option}",
                )
            )
        else:
            found.append(ok(f"port-{port}", f"127.0.0.1:{port} is free"))
    return found
