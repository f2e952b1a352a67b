"""A real etcd, and a real coordinator, for the cases that need no Docker hosts. Nothing of it is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coordinator.embedded import EmbeddedEtcd
from events.connecting import connect
from events.errors import PermanentError
from events.settings import EtcdSettings
from events.store import Store
from labkit.errors import LabError
from labkit.spec import REPOSITORY

STOP_SECONDS = 20.0


class Backbone:
    """The bus, and one coordinator that can be started, stopped and weighed."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        self.endpoint = endpoint
        self.store = self.connect()
        self._directory = directory
        self._child: subprocess.Popen[bytes] | None = None

    def connect(self) -> Store:
        """A connection of one's own."""
        return connect(EtcdSettings(endpoints=(self.endpoint,)))

    @property
    def pid(self) -> int:
        """The coordinator's."""
        assert self._child is not None
        return self._child.pid

    @property
    def log(self) -> Path:
        """Of all lives of the coordinator."""
        return self._directory / "coordinator.log"

    def start_coordinator(self) -> None:
        """Start it; returns at once."""
        settings = self._directory / "coordinator.cfg"
        settings.write_text(f"[etcd]\nendpoints = {self.endpoint}\n[coordinator]\nname = bench\n[log]\nformat = json\n")
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "coordinator.main", "-c", str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )

    def stop_coordinator(self) -> None:
        """End it cleanly; harmless when it does not run."""
        if self._child is not None:
            self._child.terminate()
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None


@contextlib.contextmanager
def backbone() -> Iterator[Backbone]:
    """An empty etcd on a disk and free ports of its own. Raises LabError."""
    directory = Path(tempfile.mkdtemp(prefix="cargo-bench-", dir="/var/tmp"))
    etcd = EmbeddedEtcd(directory / "etcd", *_free_ports(2))
    made: Backbone | None = None
    try:
        try:
            etcd.start()
        except PermanentError as error:
            raise LabError(str(error)) from error
        made = Backbone(directory, etcd.endpoint)
        yield made
    finally:
        if made is not None:
            made.stop_coordinator()
            made.store.close()
        etcd.stop()
        shutil.rmtree(directory)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def resident_mib(pid: int, what: str = "VmRSS") -> float:
    """Memory of a process: VmRSS, or VmHWM for its highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024
    raise LabError(f"/proc/{pid}/status does not tell {what}")


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / tick, (int(fields[13]) + int(fields[14])) / tick
