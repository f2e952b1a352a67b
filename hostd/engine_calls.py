"""What the parts of the Docker adapter share: results, errors, and the one way to make a request.

``hostd/engine.py`` implements ``_call``; nothing in here or in the parts imports Docker's library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from events.errors import PermanentError
from events.schema import PortBinding

if TYPE_CHECKING:
    from hostd.ending import Ending


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ``docker version`` and ``docker info`` say of an engine."""

    engine_version: str
    api_version: str
    storage_driver: str
    containerd_snapshotter: bool
    """Images and layers are in containerd's store, not in Docker's own."""
    cgroup_version: str
    live_restore: bool
    userns_remap: bool
    data_root: str
    host_name: str
    kernel: str
    architecture: str
    """The kernel's name: ``x86_64``."""
    runtimes: tuple[str, ...]
    user_namespace: str = ""
    """``uid.gid`` that ids 0 are mapped to, with ``userns_remap``; empty otherwise."""
    log_drivers: tuple[str, ...] = ()
    security: tuple[str, ...] = ()
    """Names of what Docker enforces here: ``seccomp``, ``apparmor``, ``selinux``, ``cgroupns`` …"""
    abilities: tuple[str, ...] = ()
    """Names of the switches in ``docker info`` that are on, kinds of limits among them."""
    cpus: int = 0
    cgroup_driver: str = ""


class ContainerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``docker ps --all``."""

    id: str
    name: str
    image: str
    image_id: str
    state: str
    labels: dict[str, str]
    volumes: tuple[str, ...]
    """Names of the volumes it mounts."""
    published: tuple[PortBinding, ...]

    @property
    def running(self) -> bool:
        return self.state in ("running", "paused", "restarting")


class StopResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a container ended."""

    exit_code: int
    unclean: bool
    """Its first process was killed (by Docker after the grace, by the kernel for memory, by a person)."""
    finished_at: str
    """As Docker writes it, RFC 3339 in UTC."""


class DiskFree(msgspec.Struct, frozen=True, kw_only=True):
    """Room where Docker keeps its data, for a process without special rights."""

    free_bytes: int
    free_inodes: int


class DockerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A wake-up: something may have changed. ``kind`` is ``lost`` when no more come, ``resync`` when some may have been missed."""

    kind: str
    action: str = ""
    id: str = ""
    name: str = ""


class MissingError(PermanentError):
    """The container, image, volume or network does not exist."""


class NameTakenError(PermanentError):
    """Docker answered 409: the name is in use, or the object is in a state that does not allow this."""


class Calls(ABC):
    """Requests to one Docker engine."""

    timeout_seconds: float
    """Of one request, unless the request says otherwise."""

    starting: set[str]

    ending: dict[str, Ending]

    @abstractmethod
    def _call(
        self,
        method: str,
        path: str,
        *names: str,
        what: str,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
    ) -> Any:
        """One request and its answer, decoded if it is JSON.

        ``path`` has a place ``{0}`` for each of ``names``; ``what`` begins the text of an error. Raises
        MissingError (404), NameTakenError (409), PermanentError (other 4xx) and TransientError.
        """

    def _json(self, method: str, path: str, *names: str, what: str, **options: Any) -> dict[str, Any]:
        value = self._call(method, path, *names, what=what, **options)
        if not isinstance(value, dict):
            raise PermanentError(f"{what}: Docker's answer is not a JSON object")
        return value

    def _json_list(self, method: str, path: str, *names: str, what: str, **options: Any) -> list[Any]:
        value = self._call(method, path, *names, what=what, **options)
        if not isinstance(value, list):
            if value is None:
                return []  # Go's empty list
            raise PermanentError(f"{what}: Docker's answer is not a JSON list")
        return value
