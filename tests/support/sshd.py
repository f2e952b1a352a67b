"""A private sshd on 127.0.0.1, with its own keys, for tests that need a real peer without the lab.

It touches nothing of the machine's own ssh. Everything it started, sessions included, ends with ``stop``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from hostd.peer import Peer
from hostd.ssh_keys import authorized_line

START_SECONDS = 10.0


class Sshd:
    """Start with ``start``; ``peer`` is how to reach it. The directory holds keys, settings and log."""

    def __init__(self, directory: Path, host: str = "alpha") -> None:
        self.directory = directory
        self.host = host
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.host_key = self._key("host_key")
        self.identity = self._key("identity")
        self.known_hosts = directory / "known_hosts"
        self.authorized_keys = directory / "authorized_keys"
        self.authorized_keys.write_text((directory / "identity.pub").read_text())
        self.pin()

    @property
    def peer(self) -> Peer:
        """This sshd as the product sees it."""
        return Peer(self.host, "127.0.0.1", self.port, "root", self.identity, self.known_hosts)

    def pin(self) -> None:
        """Pin the host key, under the host's name, in ``known_hosts``."""
        kind, key = (self.directory / "host_key.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"{self.host} {kind} {key}\n")

    def change_host_key(self) -> None:
        """As after a reinstallation, or with somebody in between. Takes effect at the next start."""
        self.host_key.unlink()
        self._key("host_key")

    def gate(self, name: str, state: Path) -> None:
        """From now on, the key of ``peer`` is that of the host ``name``, and opens the gate of the agent with ``state``."""
        key = (self.directory / "identity.pub").read_text()
        self.authorized_keys.write_text(authorized_line(name, key, state_dir=state) + "\n")

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.directory / "sshd.log").read_text(errors="replace")

    def start(self, *more: str) -> Sshd:
        """Start, with ``more`` lines of configuration before the usual ones (the first word on a matter counts), and return when connections are accepted."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on its empty directory
        config = self.directory / "sshd_config"
        config.write_text(
            "".join(f"{line}\n" for line in more)
            + f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.authorized_keys}\nStrictModes no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\nMaxSessions 50\n"
            "Subsystem sftp internal-sftp\nPrintMotd no\nUseDNS no\n"
        )
        with (self.directory / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                log_text = (self.directory / "sshd.log").read_text(errors="replace")
                raise RuntimeError(f"sshd did not start: {log_text[-2000:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the listener and every session at once, as a crash of the host would. Harmless when stopped."""
        process, self._process = self._process, None
        if process is None:
            return
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=10)

    def freeze(self) -> None:
        """Stop answering without closing anything, as a partition would."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after ``freeze``."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _key(self, name: str) -> Path:
        file = self.directory / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, input=b"y\n")
        return file


def descendants(pid: int) -> list[int]:
    """Every living process below ``pid``."""
    parents: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(directory.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
