"""Would Docker see what this agent mounts? An agent in a mount namespace of its own federates for nobody.

A service manager's sandbox (``PrivateMounts=``, ``ProtectSystem=`` and their kin) gives a service its own namespace,
and then the container would start on the bare directory below the union. Asked before anything is created.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

from events.errors import TransientError
from hostd import mounts

TRIAL_OPTIONS = "size=4k,mode=700"
CONNECT_SECONDS = 5.0
CREDENTIALS = struct.Struct("=iII")
"""``struct ucred``: pid, uid, gid."""


def engine_pid(docker_socket: Path) -> int:
    """Who listens on Docker's socket: Docker itself, or the service manager that starts it; 0 when that cannot be seen.

    Raises TransientError when nobody answers.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(os.fsencode(docker_socket))
        except OSError as error:
            raise TransientError(f"Docker does not answer on {docker_socket}: {error}") from error
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(raw)[0])


def invisible_mounts(pid: int, directory: Path) -> str:
    """Why mounts of this process are not seen by process ``pid``; empty when they are, or when it cannot be told.

    ``directory`` is one of the agent's own, in which something is mounted for a moment when nothing else can tell.
    """
    with contextlib.suppress(OSError):
        if pid == 0 or mounts.namespace(pid) == mounts.namespace("self"):
            return ""
    trial = directory / "seen-by-docker"
    trial.mkdir(mode=0o700, parents=True, exist_ok=True)
    mounts.mount("tmpfs", "none", trial, TRIAL_OPTIONS)
    try:
        seen = any(record.point == mounts.resolved(trial) for record in mounts.read_mountinfo(pid))
    except OSError:
        return ""  # it has just ended; whoever comes after it is asked in the next attempt
    finally:
        mounts.unmount(trial)
        trial.rmdir()
    if seen:
        return ""
    return (
        f"what the agent mounts is not seen by Docker (process {pid}): the agent runs in a mount namespace of its own, and a "
        "container would start without its data. Run the agent without PrivateMounts, PrivateTmp, ProtectSystem and the like"
    )
