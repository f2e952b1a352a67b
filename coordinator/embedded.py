"""The embedded etcd: the system's ``etcd`` binary as a child of the coordinator, on loopback.

Only used when no endpoint is configured. Good for trying Cargo on one machine; a fleet needs its own
cluster of three. If the child dies it is started again, with its data; everybody holds meanwhile.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

from events.errors import PermanentError

START_SECONDS = 15.0
"""How long the child may take to open its port: it replays its log first."""
STOP_SECONDS = 10.0
RESTART_SECONDS = 1.0
"""Between the death of the child and its next start, so that one that cannot live does not eat the machine."""
BATCH_INTERVAL = "1s"
"""How often etcd brings its database up to date: writes wait while it does, ten times a second by default. What was
acknowledged is in its log before, whatever this is, and is taken from there after a crash."""
CLIENT_PORT = 2379
PEER_PORT = 2380


class EmbeddedEtcd:
    """One etcd member that lives and dies with this process."""

    def __init__(self, data_dir: Path, client_port: int = CLIENT_PORT, peer_port: int = PEER_PORT) -> None:
        self._data_dir = data_dir
        self._binary = ""
        self._client_port = client_port
        self._peer_port = peer_port
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="embedded etcd", daemon=True)
        self.endpoint = f"127.0.0.1:{client_port}"

    def start(self) -> None:
        """Start the child and wait until it listens. Raises PermanentError in words."""
        binary = shutil.which("etcd")
        if binary is None:
            raise PermanentError(
                "no etcd endpoint is configured, and there is no etcd binary to start one; "
                "install the package etcd-server, or set [etcd] endpoints"
            )
        if _listening(self._client_port):
            raise PermanentError(
                f"no etcd endpoint is configured, but something listens on {self.endpoint} already; "
                f"if that is your etcd, set [etcd] endpoints = {self.endpoint}"
            )
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        child = self._child = self._spawn(binary)
        waiter = threading.Event()
        waited = 0.0
        while not _listening(self._client_port):
            if child.poll() is not None or waited > START_SECONDS:
                self.stop()
                raise PermanentError(f"the embedded etcd did not start; its log is {self._data_dir}/etcd.log")
            waiter.wait(0.05)
            waited += 0.05
        self._binary = binary
        self._keeper.start()

    def _spawn(self, binary: str) -> subprocess.Popen[bytes]:
        client = f"http://127.0.0.1:{self._client_port}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        with (self._data_dir / "etcd.log").open("ab") as log:
            return subprocess.Popen(
                [
                    # However this process ends, its etcd must not stay behind and hold the port and the data.
                    *("setpriv", "--pdeathsig", "TERM", "--", binary),
                    *("--name", "cargo", "--data-dir", str(self._data_dir)),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"cargo={peer}"),
                    *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "1h"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={"ETCD_BACKEND_BATCH_INTERVAL": BATCH_INTERVAL, **os.environ},
                start_new_session=True,
            )

    def _keep(self) -> None:
        while not self._stopping.is_set():
            child = self._child
            if child is None:
                return
            child.wait()
            if self._stopping.wait(RESTART_SECONDS):
                return
            self._child = self._spawn(self._binary)
            if self._stopping.is_set():  # stop() has just ended the one before
                self._child.terminate()

    def stop(self) -> None:
        """End the child cleanly; harmless when it is not running."""
        self._stopping.set()
        if self._child is None:
            return
        self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._keeper.is_alive():
            self._keeper.join(STOP_SECONDS)
        self._child = None


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
