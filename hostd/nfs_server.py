"""Serving a migration's trees by NFS: read-only, to the one target, by a process of the migration's own.

The server is nfs-ganesha, in user space, with a configuration and a port of its own, so nothing that the host itself
exports, or the kernel's server, is touched, and ending the migration ends the process. What it must never do: let
anybody write, answer any address but the target's, or show a path outside of the trees.

The configuration file is both the record and the order: it is written before the process starts, and a process that
runs by it is found again by it, after a restart of the agent. After a reboot the same file starts it again, on the same
port. It lies in the migration's private directory.

Stands below ``hostd/effects/export_trees.py``; the other side is ``hostd/nfs_client.py``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from events.errors import PermanentError, RefusedError, TransientError
from hostd import mounts
from hostd.fold import write_durably
from hostd.process import environment
from hostd.settings import DEFAULT_PORT

PROGRAM = "ganesha.nfsd"
PORTS_TRIED = 32
"""From the configured one on: each migration under way takes one."""
START_TIMEOUT_SECONDS = 30
END_SECONDS = 5.0
_SAFE_PATH = re.compile(r"/[A-Za-z0-9/._@:+,=~ -]*")
"""What may stand between quotes in ganesha's configuration without meaning anything."""
_PORT = re.compile(r"NFS_Port = (\d+);")
_READY = b"NFS SERVER INITIALIZED"
_FAILED = b"Could not create export"


def share_of(number: int) -> str:
    """The name by which the tree of mount ``number`` is exported."""
    return f"/cargo-{number}"


def problems(trees: Mapping[int, str]) -> list[str]:
    """Why this host cannot serve these trees, in words; empty when it can, as far as can be seen."""
    reasons = []
    if shutil.which(PROGRAM) is None:
        reasons.append(
            f"this host cannot serve NFS: {PROGRAM} is not installed (packages nfs-ganesha and nfs-ganesha-vfs); "
            "install it, or ask for remote sshfs"
        )
    reasons += [
        f"the path {tree!r} has characters that cannot be exported by NFS; ask for remote sshfs"
        for tree in trees.values()
        if not _SAFE_PATH.fullmatch(tree)
    ]
    return reasons


class NfsServer:
    """The server of one migration. Stateless: everything is found by looking."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is this server's own, private and on a disk that survives a reboot."""
        self.directory = directory.absolute()
        self._config = self.directory / "ganesha.conf"
        self._log = self.directory / "ganesha.log"

    def port(self) -> int:
        """The port that it was given; 0 when it never was."""
        try:
            found = _PORT.search(self._config.read_text())
        except FileNotFoundError:
            return 0
        return int(found.group(1)) if found else 0

    def serve(self, trees: Mapping[int, str], *, client: str, address: str, first_port: int = DEFAULT_PORT) -> int:
        """Export ``trees`` (by number) at ``address`` to the IP address ``client`` alone; returns the port.

        Harmless when repeated; a server that has died is started again, on its port. Raises RefusedError, with
        reasons, when this host cannot serve these trees, TransientError when the port is taken.
        """
        if reasons := problems(trees):
            raise RefusedError(reasons)
        port = self.port()
        if port and self.processes() and self._config.read_text() == self._configuration(trees, client, address, port):
            return port
        self.stop()
        port = port or _free_port(address, first_port)
        (self.directory / "recovery").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self._config, self._configuration(trees, client, address, port).encode())
        self._start(address, port)
        return port

    def stop(self) -> None:
        """End it; harmless when it does not run. Readers of the target get errors, and it unmounts by itself."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            processes = self.processes()
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if not mounts.wait_until_gone(processes, timeout_seconds=END_SECONDS):
                return
        raise TransientError(f"the NFS server of {self.directory} did not end; it can be tried again")

    def withdraw(self) -> None:
        """End it, and forget that it was ever there."""
        self.stop()
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def processes(self) -> list[int]:
        """Its living processes: one, or none."""
        return mounts.processes_with_argument(os.fsencode(self._config), program=PROGRAM.encode())

    def _start(self, address: str, port: int) -> None:
        self._log.unlink(missing_ok=True)
        command = [PROGRAM, "-f", str(self._config), "-L", str(self._log), "-p", str(self.directory / "pid")]
        # Away from the system's message bus: another ganesha of this host is its own master.
        apart = {**environment(), "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent"}
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=apart,
                cwd="/",
                start_new_session=True,
                timeout=START_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TransientError(f"the NFS server did not start within {START_TIMEOUT_SECONDS} s") from error
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            words = self._log.read_bytes() if self._log.exists() else b""
            if _FAILED in words:
                self.stop()
                raise RefusedError([f"this host cannot export the data by NFS: {_reason(words)}; ask for remote sshfs"])
            if _READY in words and self.processes():
                return
            if time.monotonic() > deadline or (words and not self.processes()):
                self.stop()
                raise TransientError(
                    f"the NFS server did not come up on {address} port {port}: {_reason(words) or 'it gave no reason'}. "
                    "The port may be taken; it is tried again"
                )
            time.sleep(0.01)

    # Attr_Expiration_Time, MDCACHE: by default the server goes on for a minute with sizes, times and listings that it
    # has seen before; the trees are exported before the container stops, and what it then changes must be seen.
    def _configuration(self, trees: Mapping[int, str], client: str, address: str, port: int) -> str:
        ipaddress.ip_address(client)  # anything else could widen who may read
        exports = "".join(
            f"""
EXPORT {{
  Export_Id = {number + 1}; Path = "{tree}"; Pseudo = "{share_of(number)}";
  Protocols = 4; Transports = TCP; SecType = sys; Access_Type = NONE; Squash = No_Root_Squash; PrivilegedPort = true;
  Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}
  CLIENT {{ Clients = {client}; Access_Type = RO; Squash = No_Root_Squash; Protocols = 4; }}
}}
"""
            for number, tree in sorted(trees.items())
        )
        return f"""# Made by cargo-hostd for one migration, and removed with it.
NFS_CORE_PARAM {{
  Protocols = 4; NFS_Port = {port}; Bind_addr = {ipaddress.ip_address(address)};
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
}}
NFSv4 {{
  Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{self.directory}/recovery"; Only_Numeric_Owners = true;
  Minor_Versions = 0, 1, 2;
}}
NFS_KRB5 {{ Active_krb5 = false; }}
MDCACHE {{ Dir_Chunk = 0; Use_Getattr_Directory_Invalidation = true; }}
EXPORT_DEFAULTS {{ Access_Type = NONE; }}
LOG {{ Default_Log_Level = EVENT; }}
{exports}"""


def _free_port(address: str, first: int) -> int:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(first, first + PORTS_TRIED):
        with contextlib.closing(socket.socket(kind, socket.SOCK_STREAM)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((address, port))
            except OSError:
                continue
            return port
    raise PermanentError(f"no port from {first} to {first + PORTS_TRIED - 1} is free at {address} to serve NFS on")


def _reason(words: bytes) -> str:
    """The line of ganesha's log that tells most."""
    lines = words.decode("utf-8", "replace").splitlines()
    telling = [
        line.rsplit(" :", 1)[-1] for line in lines if ":CRIT :" in line or ":FATAL :" in line or ":MAJ :" in line
    ]
    telling = [line for line in telling if "dbus" not in line.lower()]
    return telling[0][:300] if telling else ""
