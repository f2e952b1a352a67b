"""The adapter to Docker: the only module that imports its client library.

Everything here is *observe, then act, then observe*: ``inspect`` is the truth, a reply that got lost is
looked up before anything is repeated, and what is done already is not an error. Docker's exceptions become
events.errors here and nowhere else: what may pass is a TransientError, what a repetition does not mend a
PermanentError, a precondition that does not hold a RefusedError.

It must never start, stop or remove anything by itself, never force, and never touch a container or volume
that exists already without the label of our migration. Requests carry Docker's JSON as it is, because the
library's own keyword arguments lag behind the API and would drop what they don't know.

What can be asked and done is in hostd/engine_containers.py and hostd/engine_volumes.py; here are the
engine itself, streams (images, events), and the requests. Thread-safe: each thread gets a client of its own
(requests' sessions are not to be shared).
"""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from events.lean_imports import absent

# Docker speaks JSON: no encoding has to be guessed.
with warnings.catch_warnings(), absent("charset_normalizer", "chardet"):
    warnings.filterwarnings("ignore", "Unable to find acceptable character detection")
    import docker
    import docker.errors
    import requests
    import urllib3

from events.errors import CargoError, PermanentError, TransientError
from hostd.docker_json import InfoView, VersionView, view
from hostd.engine_calls import (
    ContainerSummary,
    DiskFree,
    DockerEvent,
    EngineInfo,
    MissingError,
    NameTakenError,
    StopResult,
)
from hostd.engine_containers import ContainerCalls
from hostd.engine_volumes import VolumeCalls
from hostd.shared_storage import without_secrets

if TYPE_CHECKING:
    from hostd.ending import Ending

__all__ = [
    "ContainerSummary",
    "DiskFree",
    "DockerEvent",
    "Engine",
    "EngineInfo",
    "MissingError",
    "NameTakenError",
    "StopResult",
]

DEFAULT_TIMEOUT_SECONDS = 60.0
"""Of one request. Creating and removing containers on a busy disk takes many seconds."""
IMAGE_TIMEOUT_SECONDS = 1800.0
"""Silence allowed while Docker packs or unpacks layers; it reports nothing meanwhile."""
EVENT_KINDS = ("container", "volume", "network", "daemon")
RECONNECT_SECONDS = (0.1, 5.0)
"""First and longest pause before the event stream is opened again."""
GUARD_SECONDS = 30.0
"""How long the guard of an event stream that broke off may outlive it. An idle agent pays for every look."""
CHUNK_BYTES = 1024 * 1024
PORT_TAKEN = ("port is already allocated", "address already in use")
"""Docker says so with status 500, but no repetition mends it."""


class Engine(ContainerCalls, VolumeCalls):
    """A Docker engine, by the path of its socket or by URL."""

    def __init__(self, address: str | Path, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        text = str(address)
        self.url = f"unix://{text}" if text.startswith("/") else text
        self.timeout_seconds = timeout_seconds
        self.starting: set[str] = set()
        """Containers that wait at their gate: Docker answers nothing about them meanwhile."""
        self.ending: dict[str, Ending] = {}
        """The last stop of each container that this process has ended early, by id."""
        self._local = threading.local()
        self._clients: dict[threading.Thread, docker.APIClient] = {}
        """One a thread, as the library's are not made for several. Threads come and go with every migration."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections of all threads; the engine may be used again."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
            self._local = threading.local()
        for client in clients:
            client.close()

    # --- the engine itself ---------------------------------------------------------------------

    def ping(self) -> None:
        """Raise TransientError unless the engine answers."""
        self._call("GET", "/_ping", what="asking whether Docker answers")

    def info(self) -> EngineInfo:
        """Versions and properties. Raises TransientError, PermanentError."""
        what = "asking Docker about itself"
        version = self._json("GET", "/version", what=what)
        return info_in(version, self._json("GET", "/info", what=what))

    version = info

    def disk_free(self, data_root: str = "") -> DiskFree:
        """Room in the data root, which must be visible to this process; Docker is asked where that is, unless it is given.

        Raises TransientError.
        """
        data_root = data_root or self.info().data_root
        try:
            found = os.statvfs(data_root)
        except OSError as error:
            raise TransientError(f"the free space of Docker's {data_root} is unknown: {error}") from error
        return DiskFree(free_bytes=found.f_bavail * found.f_frsize, free_inodes=found.f_favail)

    def save_image(self, references: Sequence[str]) -> Iterator[bytes]:
        """``docker save``: a tar archive in pieces. Tags among ``references`` travel along.

        Raises MissingError when one is not here, TransientError when the stream breaks off.
        """
        what = f"packing the image {' '.join(references)}"
        with self._translated(what):
            reply = self._send(
                "GET", "/images/get", (), query={"names": list(references)},
                stream=True, timeout_seconds=IMAGE_TIMEOUT_SECONDS,
            )  # fmt: skip
            with contextlib.closing(reply):
                yield from reply.iter_content(CHUNK_BYTES)

    def load_image(self, pieces: Iterable[bytes]) -> None:
        """``docker load`` of an archive. Loading the same again is harmless.

        Raises PermanentError when the archive is damaged or lacks a layer; what ``pieces`` raises, passes.
        """
        what = "loading an image"
        raised: list[Exception] = []
        with self._translated(what, raised):
            reply = self._send(
                "POST", "/images/load", (), query={"quiet": "1"}, data=_noting(pieces, raised),
                timeout_seconds=IMAGE_TIMEOUT_SECONDS,
            )  # fmt: skip
            with contextlib.closing(reply):
                lines = reply.content.splitlines()
        _raise_said_error(what, lines)

    def pull_image(self, reference: str) -> None:
        """``docker pull``, with the credentials that the engine itself has; ``reference`` has a tag or a digest.

        Raises PermanentError when the registry does not have it or cannot be asked.
        """
        what = f"pulling the image {reference!r}"
        with self._translated(what):
            reply = self._send(
                "POST", "/images/create", (), query={"fromImage": reference}, timeout_seconds=IMAGE_TIMEOUT_SECONDS
            )
            with contextlib.closing(reply):
                lines = reply.content.splitlines()
        _raise_said_error(what, lines)

    # --- events --------------------------------------------------------------------------------

    def events(self, stop: threading.Event) -> Iterator[DockerEvent]:
        """Wake-ups until ``stop`` is set; survives restarts of the engine.

        Begins, and goes on after each interruption, with a ``resync``: look at everything then, because
        Docker keeps only its newest 256 events. An interruption itself is told by a ``lost``.
        """
        first, longest = RECONNECT_SECONDS
        delay = first
        while not stop.is_set():
            try:
                with self._event_stream(stop) as lines:
                    yield DockerEvent(kind="resync")
                    delay = first
                    for event in filter(None, map(_event, lines)):
                        if event.action == "die" and (ending := self.ending.get(event.id)) is not None:
                            ending.told()
                        yield event
            except TransientError:
                pass  # an engine that is away announces itself by the resync when it is back
            if stop.is_set():
                return
            yield DockerEvent(kind="lost")
            stop.wait(delay)
            delay = min(delay * 2, longest)

    @contextlib.contextmanager
    def _event_stream(self, stop: threading.Event) -> Iterator[Iterator[bytes]]:
        over = threading.Event()
        query = {"filters": msgspec.json.encode({"type": EVENT_KINDS}).decode()}
        with self._translated("listening to Docker's events"):
            reply = self._send("GET", "/events", (), query=query, stream=True, timeout_seconds=None)
            guard = threading.Thread(target=_cut, args=(reply, stop, over), name="docker-events", daemon=True)
            guard.start()
            try:
                yield _lines(reply)
            finally:
                over.set()
                reply.close()

    # --- requests ------------------------------------------------------------------------------

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
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        with self._translated(what):
            reply = self._send(method, path, names, query=query, body=body, timeout_seconds=limit)
            if "json" not in reply.headers.get("Content-Type", ""):
                return None
            return reply.json()

    def _send(
        self,
        method: str,
        path: str,
        names: Sequence[str],
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        data: Iterable[bytes] | None = None,
        stream: bool = False,
        timeout_seconds: float | None,
    ) -> requests.Response:
        client = self._client()
        headers = {}
        payload: bytes | Iterable[bytes] | None = data
        if body is not None:
            payload, headers["Content-Type"] = msgspec.json.encode(body), "application/json"
        elif data is not None:
            headers["Content-Type"] = "application/x-tar"
        reply: requests.Response = client.request(
            method,
            f"{client.base_url}/v{client.api_version}" + path.format(*map(_segment, names)),
            params=query,
            data=payload,
            headers=headers,
            stream=stream,
            timeout=timeout_seconds,
        )
        try:
            reply.raise_for_status()
        except requests.exceptions.HTTPError as error:
            docker.errors.create_api_error_from_http_exception(error)
        return reply

    def _client(self) -> docker.APIClient:
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._inherited()
            if client is None:
                # "auto" asks the engine for its API version: what both sides know (F11).
                client = docker.APIClient(base_url=self.url, version="auto", timeout=ceil(self.timeout_seconds))
            self._local.client = client
            with self._lock:
                self._clients[threading.current_thread()] = client
        return client

    def _inherited(self) -> docker.APIClient | None:
        """The client of a thread that has ended, with its open connection. Those of all other such threads are closed."""
        with self._lock:
            ended = [thread for thread in self._clients if not thread.is_alive()]
            clients = [self._clients.pop(thread) for thread in ended]
        for spare in clients[1:]:
            spare.close()
        return clients[0] if clients else None

    def _forget_client(self) -> None:
        """After a broken connection negotiate anew: the engine may come back in another version."""
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is not None:
            del self._local.client
            with self._lock:
                if self._clients.get(threading.current_thread()) is client:
                    del self._clients[threading.current_thread()]
            client.close()

    @contextlib.contextmanager
    def _translated(self, what: str, raised: Sequence[Exception] = ()) -> Iterator[None]:
        """Turn what Docker's library raises into our errors. ``raised`` are errors of a caller's generator,
        which the library may have wrapped."""
        try:
            yield
        except CargoError:
            raise
        except docker.errors.APIError as error:
            _raise_api_error(what, error)
        except (
            docker.errors.DockerException,
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            if raised:
                raise raised[0] from error
            self._forget_client()
            raise TransientError(f"{what}: Docker cannot be reached or broke off ({error})") from error


def info_in(version: Mapping[str, Any], info: Mapping[str, Any]) -> EngineInfo:
    """What ``/version`` and ``/info`` answer. Raises PermanentError when a type is not as documented."""
    seen = view(InfoView, info, "itself")
    released = view(VersionView, version, "its version")
    options = [option.split(",")[0] for option in seen.security_options or ()]
    security = tuple(sorted(option.removeprefix("name=") for option in options))
    return EngineInfo(
        engine_version=released.version,
        api_version=released.api_version,
        storage_driver=seen.driver,
        containerd_snapshotter=["driver-type", "io.containerd.snapshotter.v1"] in (seen.driver_status or ()),
        cgroup_version=seen.cgroup_version,
        live_restore=bool(seen.live_restore_enabled),
        userns_remap="userns" in security,
        user_namespace=os.path.basename(seen.docker_root_dir) if "userns" in security else "",
        log_drivers=tuple(sorted((seen.plugins.log if seen.plugins is not None else None) or ())),
        security=security,
        abilities=tuple(sorted(name for name, value in info.items() if value is True)),
        cpus=seen.ncpu,
        cgroup_driver=seen.cgroup_driver,
        data_root=seen.docker_root_dir,
        host_name=seen.name,
        kernel=seen.kernel_version,
        architecture=seen.architecture,
        runtimes=tuple(sorted(name for name, how in (seen.runtimes or {}).items() if _is_there(how))),
    )


def _is_there(runtime: object) -> bool:
    """Whether what Docker was told to use lies where it was told: Docker itself notices that with the next start."""
    path = runtime.get("path") if isinstance(runtime, dict) else None
    return not (isinstance(path, str) and path.startswith("/")) or os.access(path, os.X_OK)


def _segment(name: str) -> str:
    """``name`` as a part of a URL's path. Names come from other hosts: none may lead to another request."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise PermanentError(f"{name[:200]!r} is not a name of anything in Docker")
    try:
        return urllib.parse.quote(name, safe="/:@")
    except UnicodeEncodeError:
        raise PermanentError(f"{name[:200]!r} is not a name of anything in Docker") from None


def _raise_api_error(what: str, error: docker.errors.APIError) -> NoReturn:
    status = error.status_code or 0
    words = without_secrets(f"{what}: Docker answered {str(error.explanation or error)[:1000]!r}")
    if status == 404:
        raise MissingError(words) from error
    if status == 409:
        raise NameTakenError(words) from error
    if status >= 500 and not any(mark in words for mark in PORT_TAKEN):
        raise TransientError(words) from error
    raise PermanentError(words) from error


def _raise_said_error(what: str, lines: Iterable[bytes]) -> None:
    """Docker answers such requests with success at once, and tells of a failure in the stream that follows."""
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            said = msgspec.json.decode(line)
            if isinstance(said, dict) and said.get("error"):
                raise PermanentError(f"{what} failed: {str(said['error'])[:1000]}; nothing was changed")


def _event(line: bytes) -> DockerEvent | None:
    """The wake-up in a line of the stream; what cannot be read still wakes."""
    if not line.strip():
        return None
    try:
        raw = msgspec.json.decode(line)
        actor = raw.get("Actor") or {}
        return DockerEvent(
            kind=str(raw.get("Type", "")),
            action=str(raw.get("Action", "")),
            id=str(actor.get("ID", "")),
            name=str((actor.get("Attributes") or {}).get("name", "")),
        )
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError, RecursionError):
        return DockerEvent(kind="resync")


def _lines(reply: requests.Response) -> Iterator[bytes]:
    # One byte at a time from urllib3's buffer would be slow, larger reads would wait for more events: a
    # chunked answer is read chunk by chunk, and Docker sends each event as one.
    rest = b""
    for piece in reply.raw.stream(CHUNK_BYTES, decode_content=False):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _cut(reply: requests.Response, stop: threading.Event, over: threading.Event) -> None:
    """Break the connection of ``reply`` as soon as ``stop`` is set, to end a read that has no time limit."""
    while not over.is_set():
        if stop.wait(GUARD_SECONDS):
            with contextlib.suppress(Exception):
                docker.types.daemon.CancellableStream(iter(()), reply).close()
            return


def _noting(pieces: Iterable[bytes], raised: list[Exception]) -> Iterator[bytes]:
    try:
        yield from pieces
    except Exception as error:
        raised.append(error)
        raise
