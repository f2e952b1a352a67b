"""What ``docker inspect`` says of a container, as Docker 20.10 writes it, for tests without a daemon."""

from __future__ import annotations

import copy
from typing import Any

CONTAINER_ID = "98f327c477688e0d3dc41a5eab792a4290ff2a4cb22c051470cf923f8408facd"
IMAGE_ID = "sha256:1dcbdef1b6997423ce9767c068528f751683d83ae9bcfa03ba7acff9dc36b7de"

_CONTAINER: dict[str, Any] = {
    "Id": CONTAINER_ID,
    "Name": "/web",
    "Image": IMAGE_ID,
    "RestartCount": 2,
    "State": {
        "Status": "running",
        "Running": True,
        "Paused": False,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": 274,
        "ExitCode": 0,
        "Error": "",
        "StartedAt": "2026-01-02T03:04:05.968650228Z",
        "FinishedAt": "0001-01-01T00:00:00Z",
    },
    "Config": {
        "Hostname": CONTAINER_ID[:12],
        "Domainname": "",
        "User": "",
        "ExposedPorts": {"80/tcp": {}},
        "Env": ["TOKEN=hush", "PATH=/bin"],
        "Cmd": ["/bin/sleep", "1000"],
        "Image": "busy:1",
        "Volumes": {"/anonymous": {}},
        "WorkingDir": "",
        "Entrypoint": None,
        "OnBuild": None,
        "Labels": {"a": "b"},
        "AFieldOfTomorrow": {"kept": True},
    },
    "HostConfig": {
        "Binds": ["data:/data", "/srv/www:/www:ro"],
        "NetworkMode": "default",
        "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]},
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "AutoRemove": False,
        "VolumesFrom": None,
        "Links": None,
        "IpcMode": "private",
        "PidMode": "",
        "Privileged": False,
        "PublishAllPorts": False,
        "SecurityOpt": None,
        "Memory": 67108864,
        "Devices": [],
        "DeviceRequests": None,
        "Runtime": "runc",
        "Mounts": [{"Type": "volume", "Source": "more", "Target": "/more", "VolumeOptions": {"NoCopy": True}}],
        "AnOptionOfTomorrow": [1, 2],
    },
    "Mounts": [
        {
            "Type": "volume",
            "Name": "data",
            "Source": "/var/lib/docker/volumes/data/_data",
            "Destination": "/data",
            "Driver": "local",
            "Mode": "z",
            "RW": True,
            "Propagation": "",
        },
        {
            "Type": "volume",
            "Name": "more",
            "Source": "/var/lib/docker/volumes/more/_data",
            "Destination": "/more",
            "Driver": "local",
            "Mode": "z",
            "RW": True,
            "Propagation": "",
        },
        {
            "Type": "volume",
            "Name": "fa836a88",
            "Source": "/var/lib/docker/volumes/fa836a88/_data",
            "Destination": "/anonymous",
            "Driver": "local",
            "Mode": "",
            "RW": True,
            "Propagation": "",
        },
        {
            "Type": "bind",
            "Source": "/srv/www",
            "Destination": "/www",
            "Mode": "ro",
            "RW": False,
            "Propagation": "rprivate",
        },
    ],
    "NetworkSettings": {
        "Ports": {
            "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}],
            "9000/tcp": None,
        },
        "Networks": {
            "bridge": {
                "IPAMConfig": None,
                "Links": None,
                "Aliases": None,
                "NetworkID": "ed4a7657",
                "IPAddress": "172.17.0.2",
                "MacAddress": "02:42:ac:11:00:02",
                "DriverOpts": None,
            }
        },
    },
}

_IMAGE: dict[str, Any] = {
    "Id": IMAGE_ID,
    "RepoTags": ["busy:1"],
    "Architecture": "amd64",
    "Os": "linux",
}


def container(**changes: Any) -> dict[str, Any]:
    """A fresh description; ``changes`` are dotted paths with ``__``: ``HostConfig__Privileged=True``."""
    raw = copy.deepcopy(_CONTAINER)
    for path, value in changes.items():
        *way, last = path.split("__")
        place = raw
        for step in way:
            place = place[step]
        place[last] = value
    return raw


def image() -> dict[str, Any]:
    """The description of its image."""
    return copy.deepcopy(_IMAGE)


def mount(**changes: Any) -> dict[str, Any]:
    """One more entry for ``Mounts``: a bind of /srv/x at /x unless changed."""
    base = {
        "Type": "bind",
        "Source": "/srv/x",
        "Destination": "/x",
        "Mode": "",
        "RW": True,
        "Propagation": "rprivate",
    }
    return {**base, **changes}
