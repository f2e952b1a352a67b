"""The lab's etcd: a real one, of one or more members, in the machine's own network namespace."""

from __future__ import annotations

import signal as signals
from pathlib import Path

from labkit import probes
from labkit.process import Process
from labkit.spec import LabSpec

LOOPBACK = "127.0.0.1"


class Etcd:
    """All members together; ``members`` has each one as a Process."""

    def __init__(self, spec: LabSpec) -> None:
        self._spec = spec
        self._scheme = "https" if spec.secure else "http"
        self.endpoints = spec.endpoints
        """``address:port[,address:port…]``, reachable from the machine and from every host."""
        self.members = [self._member(number) for number in range(spec.etcd_members)]

    def _member(self, number: int) -> Process:
        spec = self._spec
        port = spec.client_ports()[number]
        peers = [f"m{n}={self._scheme}://{spec.gateway}:{port + 1}" for n, port in enumerate(spec.client_ports())]
        label = "etcd" if spec.etcd_members == 1 else f"etcd{number}"
        argv = [
            "etcd",
            f"--name=m{number}",
            f"--data-dir={self.data_directory(number)}",
            f"--listen-client-urls={self._scheme}://{spec.gateway}:{port}",
            f"--advertise-client-urls={self._scheme}://{spec.gateway}:{port}",
            f"--listen-peer-urls={self._scheme}://{spec.gateway}:{port + 1}",
            f"--initial-advertise-peer-urls={self._scheme}://{spec.gateway}:{port + 1}",
            f"--initial-cluster={','.join(peers)}",
            f"--initial-cluster-token=cargo-lab-{spec.name}",
            "--logger=zap",
            "--log-outputs=stderr",
        ]
        if spec.secure:
            files = spec.fleet_directory
            for role in ("", "peer-"):
                argv += [
                    f"--{role}client-cert-auth",
                    f"--{role}trusted-ca-file={files}/ca.crt",
                    f"--{role}cert-file={files}/etcd.crt",
                    f"--{role}key-file={files}/etcd.key",
                ]
            argv += [
                "--peer-cert-allowed-cn=etcd",  # every host's certificate is of the same authority
                f"--listen-metrics-urls=http://{spec.gateway}:{spec.health_ports()[number]}",
            ]
        return Process(
            label,
            argv,
            log=spec.logs / f"{label}.log",
            record=spec.records / f"{label}.json",
            mark=str(spec.root),
            ready=lambda: probes.etcd_answers(spec.gateway, spec.health_ports()[number]),
        )

    def data_directory(self, number: int = 0) -> Path:
        """Where a member keeps its data."""
        return self._spec.root / "etcd" / f"m{number}"

    @property
    def endpoint(self) -> str:
        """Of the first member, ``address:port``."""
        return self.endpoints.split(",")[0]

    @property
    def loopback(self) -> bool:
        """Whether it may also listen on 127.0.0.1 at its first port."""
        return self._spec.etcd_loopback

    def _listen_on_loopback(self) -> None:
        """Add 127.0.0.1 if the lab wants it and nobody else is there; decided anew at every start."""
        port = self._spec.client_ports()[0]
        flag = "--listen-client-urls="
        urls = [f"{self._scheme}://{self._spec.gateway}:{port}"]
        if self.loopback and probes.port_is_free(LOOPBACK, port):
            urls.append(f"{self._scheme}://{LOOPBACK}:{port}")
        argv = self.members[0].argv
        argv[:] = [flag + ",".join(urls) if part.startswith(flag) else part for part in argv]

    @property
    def running(self) -> bool:
        """Whether every member lives."""
        return all(member.running for member in self.members)

    @property
    def log(self) -> Path:
        """Of the first member."""
        return self.members[0].log

    def start(self, *, wait: bool = True) -> None:
        """Start what does not run."""
        (self._spec.root / "etcd").mkdir(mode=0o700, exist_ok=True)
        if not self.members[0].running:
            self._listen_on_loopback()
        for member in self.members:
            member.start(wait=False)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Return once every member serves. Raises LabError."""
        for member in self.members:
            member.wait_ready()

    def stop(self) -> None:
        """SIGTERM every member and wait."""
        for member in self.members:
            member.stop()

    def kill(self, signal: int = signals.SIGKILL) -> None:
        """Kill every member and wait."""
        for member in self.members:
            member.kill(signal)

    def freeze(self) -> None:
        """SIGSTOP every member: connections stay open and nobody answers."""
        for member in self.members:
            member.freeze()

    def thaw(self) -> None:
        """SIGCONT every member."""
        for member in self.members:
            member.thaw()
