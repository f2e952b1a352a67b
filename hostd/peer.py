"""Another host's sshd: who it is, and the ssh settings with which this host talks to it.

The settings go into a generated file, so that neither a user's nor the machine's own ssh configuration
matters, and no option has to survive another program's quoting. What they must never allow: an unpinned host
key, a question to a person, or an address in place of an identity.

Stands below ``hostd/transport.py``.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from events.errors import PermanentError

ALIVE_INTERVAL_SECONDS = 15
ALIVE_COUNT = 3
"""A peer that answers nothing for 45 s is gone (C6); anything shorter breaks slow and lossy links."""
CONNECT_TIMEOUT_SECONDS = 10

AES_CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"
"""Preferred where the processor has instructions for AES, as OpenSSH itself does since 10.0: a transfer over a fast network
takes a fifth less time. A peer that does not offer them gets OpenSSH's own choice."""

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
_DNS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
SETTING = re.compile(r"[^\x00-\x1f\x7f\"'\\%$]+")
"""What a path in an ssh configuration may hold: nothing that ssh expands, unquotes or ends a line with."""


@dataclass(frozen=True)
class Peer:
    """Another host's sshd. Raises PermanentError on construction when a field cannot be one."""

    host: str
    """The host's name in Cargo. Its key is pinned under this name, not under its address (C9)."""
    address: str
    """IP address or DNS name."""
    port: int
    user: str
    identity: Path
    known_hosts: Path

    def __post_init__(self) -> None:
        wrong = []
        if not _HOST.fullmatch(self.host):
            wrong.append(f"host name {self.host!r}")
        if not _DNS.fullmatch(self.address) and not _is_ip(self.address):
            wrong.append(f"address {self.address!r}")
        if not 0 < self.port < 65536:
            wrong.append(f"port {self.port}")
        if not _USER.fullmatch(self.user):
            wrong.append(f"user {self.user!r}")
        for name, path in (("identity", self.identity), ("known_hosts", self.known_hosts)):
            if not path.is_absolute() or not SETTING.fullmatch(str(path)):
                wrong.append(f"{name} file {str(path)!r}")
        if wrong:
            raise PermanentError(f"this cannot be another host's sshd: {', '.join(wrong)}. Nothing was contacted.")

    @property
    def alias(self) -> str:
        """The name by which ssh, rsync and sshfs call this peer; the configuration gives it a meaning."""
        return f"cargo-{self.host}"


def ssh_config(peer: Peer, control: Path | None) -> str:
    lines = [
        f"Host {peer.alias}",
        f"  HostName {peer.address}",
        f"  HostKeyAlias {peer.host}",
        f"  Port {peer.port}",
        f"  User {peer.user}",
        f'  IdentityFile "{peer.identity}"',
        "  IdentitiesOnly yes",
        "  IdentityAgent none",
        f'  UserKnownHostsFile "{peer.known_hosts}"',
        "  GlobalKnownHostsFile /dev/null",
        "  StrictHostKeyChecking yes",
        "  UpdateHostKeys no",
        "  CheckHostIP no",
        "  BatchMode yes",
        "  PreferredAuthentications publickey",
        "  ForwardAgent no",
        "  ForwardX11 no",
        "  ClearAllForwardings yes",
        f"  ConnectTimeout {CONNECT_TIMEOUT_SECONDS}",
        f"  ServerAliveInterval {ALIVE_INTERVAL_SECONDS}",
        f"  ServerAliveCountMax {ALIVE_COUNT}",
        "  TCPKeepAlive yes",
        # Users of the shared connection join it or connect for themselves; only the master is ours to end.
        "  ControlMaster no",
        f'  ControlPath "{control}"' if control is not None else "  ControlPath none",
        "  ControlPersist no",
        "  LogLevel ERROR",
    ]
    if _encrypts_aes():
        lines.append(f"  Ciphers ^{AES_CIPHERS}")
    return "\n".join(lines) + "\n"


@functools.cache
def _encrypts_aes() -> bool:
    """Whether this host's processor has instructions for AES."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(
        "aes" in line.split() for line in described.splitlines() if line.lower().startswith(("flags", "features"))
    )


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
