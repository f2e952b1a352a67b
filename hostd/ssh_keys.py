"""The line of authorized_keys by which another host's key opens the gate, and nothing else.

``restrict`` takes away every kind of forwarding, the pty and rc files, those that later versions of sshd invent included.
Its sshd needs no other setting; ``PermitRootLogin forced-commands-only`` refuses a line that lacks the command.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from events.errors import PermanentError
from events.keyspace import valid_host_name

_START = Path(__file__).with_name("ssh_gate_start.py").resolve()
_PUBLIC_KEY = re.compile(r"(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)|ssh-rsa|sk-[a-z0-9@.-]+) [A-Za-z0-9+/]+=*( .*)?")
_PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")


def gate_command(peer: str, *, state_dir: Path, python: str = sys.executable) -> str:
    """What is started for each request of ``peer``: the same as ``cargo-hostd gate``, sooner.

    Raises PermanentError for what a shell would not take as one word: sshd starts it by root's shell.
    """
    words = [python, str(_START), str(state_dir)]
    if not valid_host_name(peer) or not all(_PLAIN.fullmatch(word) for word in words):
        raise PermanentError(f"no forced command can be made of {peer!r} and {words}; choose plainer paths")
    return f"{python} -I -S {_START} --peer {peer} --state {state_dir}"


def authorized_line(peer: str, public_key: str, *, state_dir: Path, python: str = sys.executable) -> str:
    """One line, without its end. Raises PermanentError unless ``public_key`` is one public key."""
    key = public_key.strip()
    if not _PUBLIC_KEY.fullmatch(key):
        raise PermanentError(f"{peer}: this is not a public SSH key, so it is let in nowhere: {key[:60]!r}")
    return f'restrict,command="{gate_command(peer, state_dir=state_dir, python=python)}" {key}'
