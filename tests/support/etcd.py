"""A real etcd of one or three members, on free ports of 127.0.0.1, in a temporary directory.

Elections are quicker than by default (250 ms), so that tests are; everything else is as etcd comes. The
members die with the test process, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS = 20.0
STOP_SECONDS = 5.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EtcdMember:
    """One etcd process. ``endpoint`` is where its clients connect."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.peer_url = f"http://127.0.0.1:{free_port()}"
        self.log = directory / f"{name}.log"
        self.data_directory = directory / f"{name}.data"
        self.arguments: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; ``EtcdCluster.wait_until_healthy`` waits for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "etcd", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"]},
            )

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.kill()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)


class EtcdCluster:
    """All members. ``start`` before use, ``close`` after; or ``with etcd_cluster() as etcd``."""

    def __init__(self, members: int = 1, arguments: Sequence[str] = ()) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cargo-etcd-"))
        self.members = [EtcdMember(f"m{number}", self.directory) for number in range(members)]
        initial = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        for member in self.members:
            member.arguments = [
                f"--name={member.name}",
                f"--data-dir={member.data_directory}",
                f"--listen-client-urls=http://{member.endpoint}",
                f"--advertise-client-urls=http://{member.endpoint}",
                f"--listen-peer-urls={member.peer_url}",
                f"--initial-advertise-peer-urls={member.peer_url}",
                f"--initial-cluster={initial}",
                f"--initial-cluster-token={self.directory.name}",
                "--heartbeat-interval=50",
                "--election-timeout=250",
                *arguments,
            ]

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        for member in self.members:
            member.start()
        self.wait_until_healthy()

    def wait_until_healthy(self) -> None:
        """Return once a linearizable read works through every member that runs."""
        deadline = time.monotonic() + START_SECONDS
        running = [member for member in self.members if member.process is not None]
        for member in running:
            while self.etcdctl("get", "health", endpoint=member.endpoint).returncode != 0:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"etcd did not start: {member.log.read_text()[-2000:]}")
                time.sleep(0.05)

    def etcdctl(self, *arguments: str, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run etcdctl against one member (the first by default), or all."""
        return subprocess.run(
            [
                "etcdctl",
                f"--endpoints={endpoint if endpoint is not None else self.members[0].endpoint}",
                "--command-timeout=2s",
                *arguments,
            ],
            env={"PATH": os.environ["PATH"], "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def leader(self) -> EtcdMember:
        """The member that leads."""
        for member in self.members:
            answer = self.etcdctl("endpoint", "status", "-w", "json", endpoint=member.endpoint)
            for row in json.loads(answer.stdout or "[]") or []:
                if row["Status"]["header"]["member_id"] == row["Status"]["leader"]:
                    return member
        raise LookupError("no member leads")

    def close(self) -> None:
        for member in self.members:
            member.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def etcd_cluster(members: int = 1, arguments: Sequence[str] = ()) -> Iterator[EtcdCluster]:
    """A started cluster, gone afterwards."""
    cluster = EtcdCluster(members, arguments)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
