"""The store on etcd. The only module that imports etcd3 or grpc; every error of theirs is translated here.

From etcd3 come the connection and the messages. Watches, paged reads and timeouts use the raw stubs, because
etcd3's own ignore limits, never resume, and may block for ever. Every call has a timeout; every answer is
checked to come from the cluster of the first one, and not from its past (FAULTS B13, B17, E26). Reads are
linearizable, always. A failed call moves on to the next endpoint; repetition is decided in
``events/store.py``.

Watches have connections of their own: reads on the same one can starve them (E34).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from events import etcd_messages, tls_files
from events.lean_imports import postponed

# Agents start many child processes. They exec at once, so gRPC need not follow a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

# Without gRPC's half for coroutines.
with etcd_messages.made_here(), postponed("asyncio", "grpc.aio"):
    import etcd3
    from etcd3 import etcdrpc as etcdrpc  # noqa: PLC0414 - events.etcd_users takes its messages from here
import grpc
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from events.errors import StoreUnavailableError, WrongClusterError
from events.following import TICK_SECONDS, Change, KeyValue
from events.keyspace import Keyspace, key_bytes, key_text, prefix_end
from events.leases import LeaseGoneError
from events.resuming import Batch, ResumingFollower
from events.store import (
    PAGE_KEYS,
    CompactedError,
    Compare,
    Delete,
    NoAnswerError,
    Outcome,
    Page,
    Put,
    RightsChangedError,
    Store,
)

CALL_TIMEOUT_SECONDS = 5.0
"""Longer than an election (1 s) and a slow disk's fsync (2 s), so neither is taken for an outage (B16)."""
RETIRED_SECONDS = 60.0
"""A call that began on the connection of an older certificate has ended long since."""
HEARTBEAT_SECONDS = 10.0
"""How often a watch is asked for a sign of life."""
SILENCE_SECONDS = 25.0
"""A watch that gave no sign of life for so long, though asked, is dead."""
RECEIVE_BYTES = 64 * 1024 * 1024
"""Two pages of the largest events. gRPC's own default is 4 MiB."""
WINDOW_BYTES = 1024 * 1024
"""What etcd may send ahead in one answer: 50 MB/s over 20 ms of distance. HTTP/2's own default is 64 KiB."""

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", RECEIVE_BYTES),
    # gRPC would find the window out by a ping after every answer, and each ping keeps its threads awake for seconds:
    # a third of what an idle agent would cost (docs/performance.md).
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Without it channels of equal options share one connection, and watches would not have their own.
    ("grpc.use_local_subchannel_pool", 1),
]
if hasattr(grpc._common, "MAXIMUM_WAIT_TIMEOUT"):
    # A thread that waits for an answer is told when it comes; gRPC has it look ten times a second nevertheless, for the
    # sake of Python 2. That is most of what an idle agent would cost.
    grpc._common.MAXIMUM_WAIT_TIMEOUT = 5.0
_WATCH_ID_FIELD, _FRAGMENT_FIELD, _RESPONSE_FRAGMENT_FIELD = 7, 8, 7
"""Fields of WatchCreateRequest and WatchResponse since etcd 3.4, which etcd3's older messages lack."""
_PROGRESS_REQUEST = b"\x1a\x00"
"""A WatchRequest with its field 3, ``progress_request``, which etcd3's older messages lack too."""
_KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
_OLD_AUTH_REVISION = ("auth store is old", "revision in header is old")
"""etcd's words for ErrAuthOldRevision, by the way that it came (etcd, auth/store.go and rpctypes/error.go)."""
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


@dataclass(frozen=True, kw_only=True)
class EtcdAccess:
    """Who we are to etcd: TLS files and, or, a user with a password."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate and its key must be given together")
        if self.cert is not None and self.ca is None:
            raise ValueError("a client certificate needs the CA that signed the server's certificate")
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password must be given together")


class _Client(etcd3.Etcd3Client):  # type: ignore[misc]
    """Takes the contents of the TLS files, not their names, and keeps leases alive without a stream."""

    @cached_property
    def keep_alive_once(self) -> Any:
        """One question of the stream ``LeaseKeepAlive``, and its answer: on the wire a call like any other, and as such it
        costs no threads, two for each refresh otherwise."""
        return self.channel.unary_unary(
            _KEEP_ALIVE,
            request_serializer=etcdrpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=etcdrpc.LeaseKeepAliveResponse.FromString,
        )

    def _get_secure_creds(self, ca_cert: bytes, cert_key: bytes | None = None, cert_cert: bytes | None = None) -> Any:
        return grpc.ssl_channel_credentials(ca_cert, cert_key, cert_cert)


class _Connections:
    """One lazily made client per endpoint; one endpoint is in use until it fails."""

    def __init__(self, endpoints: Sequence[str], access: EtcdAccess) -> None:
        self._addresses = [_address(endpoint, access) for endpoint in endpoints]
        if not self._addresses:
            raise ValueError("at least one etcd endpoint is needed")
        self._access = access
        self._clients: dict[tuple[str, int], tuple[Any, tls_files.Identity]] = {}
        self._retired: list[tuple[float, Any]] = []
        self._index = 0
        self._lock = threading.Lock()
        self.closed = False

    @property
    def address(self) -> str:
        host, port = self._addresses[self._index]
        return f"{host}:{port}"

    def client(self) -> Any:
        """The client in use: another one once a TLS file was replaced, with which the next connection is made.

        May raise grpc.RpcError when it has to log in, StoreUnavailableError for a TLS file.
        """
        with self._lock:
            if self.closed:
                raise NoAnswerError("the connection to etcd was closed")
            self._close_retired()
            address = self._addresses[self._index]
            access = self._access
            known, made_of = self._clients.get(address, (None, ()))
            files = tls_files.identity((access.ca, access.cert, access.key))
            if known is not None and files == made_of:
                return known
            try:
                made = self._make(address, tls_files.read(access.ca, access.cert, access.key))
            except tls_files.TlsFilesError as error:
                if known is not None:  # one of them is just being replaced
                    return known
                raise StoreUnavailableError(f"a TLS file for etcd cannot be used: {error}") from error
            self._clients[address] = (made, files)
            if known is not None:
                self._retired.append((time.monotonic(), known))
            return made

    def _make(self, address: tuple[str, int], files: tls_files.TlsFiles) -> Any:
        return _Client(
            host=address[0],
            port=address[1],
            ca_cert=files.ca,
            cert_cert=files.cert,
            cert_key=files.key,
            timeout=CALL_TIMEOUT_SECONDS,
            user=self._access.user,
            password=self._access.password,
            grpc_options=_CHANNEL_OPTIONS,
        )

    def _close_retired(self) -> None:
        """Close those on which no call can be under way any more."""
        if not self._retired:
            return
        long_ago = time.monotonic() - RETIRED_SECONDS
        for at, client in self._retired:
            if at < long_ago:
                client.close()
        self._retired = [(at, client) for at, client in self._retired if at >= long_ago]

    def move_on(self) -> None:
        """Use the next endpoint from now on."""
        with self._lock:
            self._index = (self._index + 1) % len(self._addresses)

    def log_in_again(self) -> None:
        """Forget the client in use, with its token."""
        with self._lock:
            client, _ = self._clients.pop(self._addresses[self._index], (None, ()))
        if client is not None:
            client.close()

    def close(self) -> None:
        with self._lock:
            self.closed = True
            clients = [client for client, _ in self._clients.values()] + [client for _, client in self._retired]
            self._clients.clear()
            self._retired.clear()
        for client in clients:
            client.close()


class EtcdStore(Store):
    """See the module. ``expected_cluster_id`` pins the cluster from the start, else the first answer does."""

    def __init__(
        self,
        endpoints: Sequence[str],
        keys: Keyspace | None = None,
        *,
        access: EtcdAccess | None = None,
        expected_cluster_id: int | None = None,
        call_timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> None:
        """``endpoints`` are ``host:port`` or URLs. Connects with the first call. Raises ValueError."""
        super().__init__(keys if keys is not None else Keyspace())
        self._endpoints = list(endpoints)
        self._access = access if access is not None else EtcdAccess()
        self._connections = _Connections(self._endpoints, self._access)
        self._call_timeout_seconds = call_timeout_seconds
        self._lock = threading.Lock()
        self._cluster_id = expected_cluster_id
        self._newest_revision = 0
        self._followers: list[_EtcdFollower] = []

    @property
    def cluster_id(self) -> int | None:
        return self._cluster_id

    def close(self) -> None:
        with self._lock:
            followers, self._followers = self._followers, []
        for follower in followers:
            follower.close()
        self._connections.close()

    # --- primitives ----------------------------------------------------------------------------

    def _page(self, start: bytes, end: bytes, limit: int, revision: int, keys_only: bool) -> Page:
        while True:
            request = etcdrpc.RangeRequest(
                key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only
            )
            try:
                answer = self._range(self._connections, request)
            except _AnswerTooLargeError:
                if limit == 1:
                    raise
                limit //= 2
                continue
            return Page([_key_value(kv) for kv in answer.kvs], answer.more, answer.header.revision)

    def _range(self, connections: _Connections, request: Any) -> Any:
        return self._call(connections, lambda client, options: client.kvstub.Range(request, **options))

    def look(self, *places: str) -> list[list[KeyValue]]:
        request = _questions(places)
        try:
            answer = self._reading(
                lambda: self._call(self._connections, lambda client, options: client.kvstub.Txn(request, **options))
            )
        except _AnswerTooLargeError:
            return super().look(*places)
        found = [response.response_range for response in answer.responses]
        if any(part.more for part in found):
            return super().look(*places)
        return [[_key_value(kv) for kv in part.kvs] for part in found]

    def _transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        request = etcdrpc.TxnRequest(
            compare=[_compare(item) for item in compares], success=[_operation(item) for item in operations]
        )
        answer = self._call(self._connections, lambda client, options: client.kvstub.Txn(request, **options))
        deleted = sum(response.response_delete_range.deleted for response in answer.responses)
        return Outcome(answer.succeeded, answer.header.revision, deleted)

    def _grant(self, ttl_seconds: int) -> tuple[int, int]:
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_seconds)
        answer = self._call(self._connections, lambda client, options: client.leasestub.LeaseGrant(request, **options))
        return answer.ID, answer.TTL

    def _keep_alive(self, lease_id: int) -> int:
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease_id)

        answer = self._call(
            self._connections, lambda client, options: client.keep_alive_once(request, **options), ordered=False
        )
        ttl: int = answer.TTL
        return max(ttl, 0)

    def _revoke(self, lease_id: int) -> None:
        request = etcdrpc.LeaseRevokeRequest(ID=lease_id)
        try:
            self._call(self._connections, lambda client, options: client.leasestub.LeaseRevoke(request, **options))
        except LeaseGoneError:
            return

    def follow(
        self,
        prefixes: str | Sequence[str],
        *,
        stop: threading.Event | None = None,
        tick_seconds: float = TICK_SECONDS,
        contents: bool = True,
    ) -> ResumingFollower:
        names = [prefixes] if isinstance(prefixes, str) else list(prefixes)
        follower = _EtcdFollower(
            _WatchConnection(self, _Connections(self._endpoints, self._access)),
            names,
            stop=stop,
            tick_seconds=tick_seconds,
            contents=contents,
        )
        with self._lock:
            self._followers = [known for known in self._followers if not known.closed]
            self._followers.append(follower)
        return follower

    # --- calls and answers ---------------------------------------------------------------------

    def _call(
        self,
        connections: _Connections,
        ask: Callable[[Any, dict[str, Any]], Any],
        *,
        ordered: bool = True,
    ) -> Any:
        """One call; its answer, after checking where it comes from. Raises translated errors only."""
        newest = self._newest_revision
        try:
            client = connections.client()
            answer = ask(client, {"timeout": self._call_timeout_seconds, "metadata": client.metadata})
        except grpc.RpcError as error:
            raise self._translated(connections, error) from error
        except ValueError as error:
            if "closed channel" not in str(error):
                raise
            raise NoAnswerError("the connection to etcd was closed") from error
        self._check_origin(connections, answer.header, newest if ordered else None)
        return answer

    def _check_origin(self, connections: _Connections, header: Any, newest: int | None) -> None:
        """Raise WrongClusterError unless the answer is of our cluster, and no older than ``newest``.

        None is for answers that tell a member's own view, which may lag.
        """
        with self._lock:
            if self._cluster_id is None:
                self._cluster_id = header.cluster_id
            if header.cluster_id != self._cluster_id:
                raise WrongClusterError(
                    f"etcd at {connections.address} is cluster {header.cluster_id:x}, but this process works "
                    f"with {self._cluster_id:x}. Nothing is done for any migration until the endpoint is "
                    "corrected, or a person has compared the histories and restarts this process"
                )
            if newest is None:
                return
            if header.revision < newest:
                raise WrongClusterError(
                    f"etcd at {connections.address} is at revision {header.revision}, but revision {newest} "
                    "was seen before: it was restored from an older snapshot. Nothing is done for any "
                    "migration until a person has compared the histories and restarts this process"
                )
            self._newest_revision = max(self._newest_revision, header.revision)

    def _translated(self, connections: _Connections, error: Any) -> Exception:
        code, details = error.code(), error.details() or ""
        where = f"etcd at {connections.address}"
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return _AnswerTooLargeError(f"{where} holds values too large to be read: {details}")
        if code == grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
            return CompactedError(details)
        if code == grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseGoneError(f"the lease is gone: {details}")
        rights_changed = any(words in details for words in _OLD_AUTH_REVISION)
        if rights_changed or code == grpc.StatusCode.UNAUTHENTICATED:
            if self._access.user is not None:
                connections.log_in_again()
            if rights_changed:
                return RightsChangedError(f"{where} changed its users or roles meanwhile: {details}")
            return NoAnswerError(f"{where} no longer accepts our login: {details}")
        if "space exceeded" in details:
            return NoAnswerError(
                f"{where} is out of space: {details}. Running migrations wait; compact and defragment every "
                "member, then disarm the alarm"
            )
        if code in _TRANSIENT:
            connections.move_on()
            return NoAnswerError(f"{where} did not answer: {code.name.lower()}, {details}")
        return StoreUnavailableError(
            f"{where} refuses this process: {code.name.lower()}, {details}. This does not mean that there "
            "are no migrations; they wait until access is restored"
        )


class _AnswerTooLargeError(NoAnswerError):
    """A page does not fit what the connection accepts."""


class _EtcdFollower(ResumingFollower):
    """Also closes the connection that its watches own."""

    def __init__(self, watching: _WatchConnection, prefixes: list[str], **options: Any) -> None:
        self._watching = watching
        super().__init__(watching, prefixes, **options)

    def close(self) -> None:
        super().close()
        self._watching.close()


class _WatchConnection:
    """What a follower needs: reads by the store's connection, watches by their own."""

    def __init__(self, store: EtcdStore, connections: _Connections) -> None:
        self._store = store
        self._connections = connections

    def snapshot(self, prefix: str) -> tuple[list[KeyValue], int]:
        return self._store.snapshot(prefix)

    def revision(self) -> int:
        return self._store.revision()

    def open_watches(self, cursors: Mapping[str, int]) -> _EtcdWatchSession:
        # A linearizable read first: this very member then has every revision that we have seen (E33).
        nowhere = key_bytes(self._store.keys.root)
        self._store._range(self._connections, etcdrpc.RangeRequest(key=nowhere, count_only=True))
        return _EtcdWatchSession(self._store, self._connections, cursors)

    def close(self) -> None:
        self._connections.close()


class _EtcdWatchSession:
    """Watches on one stream, told apart by id. A revision split over messages is put together (E15)."""

    def __init__(self, store: EtcdStore, connections: _Connections, cursors: Mapping[str, int]) -> None:
        self._store = store
        self._connections = connections
        self._prefixes = dict(enumerate(cursors, start=1))
        self._parts: dict[int, list[Change]] = {watch_id: [] for watch_id in self._prefixes}
        self._ended = threading.Event()
        self._heard_at = time.monotonic()
        self._busy = False
        try:
            client = connections.client()
            # hasleader: a member cut off from the others ends the watch instead of keeping silent (E18).
            metadata = (*(client.metadata or ()), ("hasleader", "true"))
            stub = etcdrpc.WatchStub(client.channel)
            self._call = stub.Watch(self._requests(dict(cursors)), metadata=metadata)
        except grpc.RpcError as error:
            raise store._translated(connections, error) from error
        except ValueError as error:
            raise NoAnswerError("the connection to etcd was closed") from error

    def __iter__(self) -> Iterator[Batch]:
        try:
            for response in self._call:
                self._heard_at = time.monotonic()
                batch = self._batch(response)
                if batch is not None:
                    self._busy = True
                    yield batch
                    self._heard_at = time.monotonic()
                    self._busy = False
        except grpc.RpcError as error:
            raise self._store._translated(self._connections, error) from error
        raise NoAnswerError("etcd ended the watch")

    def close(self) -> None:
        self._ended.set()
        self._call.cancel()

    def _requests(self, cursors: dict[str, int]) -> Iterator[Any]:
        """The watches, then a question for a sign of life every so often; cancels a silent stream."""
        for watch_id, prefix in self._prefixes.items():
            create = etcdrpc.WatchCreateRequest(
                key=key_bytes(prefix),
                range_end=prefix_end(key_bytes(prefix)),
                start_revision=cursors[prefix] + 1,
                progress_notify=True,
            )
            # protobuf keeps fields that a message does not know, and sends them along.
            extra = bytes([_WATCH_ID_FIELD << 3, watch_id, _FRAGMENT_FIELD << 3, 1])
            create = etcdrpc.WatchCreateRequest.FromString(create.SerializeToString() + extra)
            yield etcdrpc.WatchRequest(create_request=create)
        while not self._ended.wait(HEARTBEAT_SECONDS):
            if not self._busy and time.monotonic() - self._heard_at > SILENCE_SECONDS:
                self._call.cancel()
                return
            yield etcdrpc.WatchRequest.FromString(_PROGRESS_REQUEST)

    def _batch(self, response: Any) -> Batch | None:
        """What ``response`` tells; None while a revision is incomplete."""
        self._store._check_origin(self._connections, response.header, None)
        prefix = self._prefixes.get(response.watch_id)
        if response.canceled:
            if response.compact_revision and prefix is not None:
                return Batch(prefix, compacted=True)
            if "auth" in response.cancel_reason and self._store._access.user is not None:
                self._connections.log_in_again()
            raise NoAnswerError(f"etcd cancelled the watch: {response.cancel_reason or 'no reason given'}")
        if prefix is None or response.created:
            return Batch()
        parts = self._parts[response.watch_id]
        parts += [_change(event) for event in response.events]
        if any(field.field_number == _RESPONSE_FRAGMENT_FIELD for field in UnknownFieldSet(response)):
            return None
        self._parts[response.watch_id] = []
        # A message without events is a progress notice: everything up to its revision has been sent.
        return Batch(prefix, tuple(parts), 0 if parts else response.header.revision)


def _address(endpoint: str, access: EtcdAccess) -> tuple[str, int]:
    split = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    if split.scheme not in ("", "http", "https") or split.hostname is None or split.path not in ("", "/"):
        raise ValueError(f"{endpoint!r} is no etcd endpoint; write host:port or http(s)://host:port")
    if split.scheme == "https" and access.ca is None:
        raise ValueError(f"{endpoint!r} needs TLS: give the CA that signed its certificate")
    host = f"[{split.hostname}]" if ":" in split.hostname else split.hostname
    return host, split.port if split.port is not None else 2379


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(key_text(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.lease)


def _change(event: Any) -> Change:
    removed = event.type == 1
    return Change(key_text(event.kv.key), None if removed else event.kv.value, event.kv.mod_revision)


def _compare(compare: Compare) -> Any:
    message = etcdrpc.Compare(key=key_bytes(compare.key), result=etcdrpc.Compare.EQUAL)
    if compare.what == "version":
        message.target, message.version = etcdrpc.Compare.VERSION, compare.equals
    elif compare.what == "mod":
        message.target, message.mod_revision = etcdrpc.Compare.MOD, compare.equals
    else:
        message.target, message.create_revision = etcdrpc.Compare.CREATE, compare.equals
    return message


@lru_cache(maxsize=8)
def _questions(places: tuple[str, ...]) -> Any:
    """What is in ``places``, as one transaction; kept, because the same is asked every few seconds."""
    asked = []
    for place in places:
        key = key_bytes(place)
        end = prefix_end(key) if place.endswith("/") else b""
        asked.append(etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key, range_end=end, limit=PAGE_KEYS)))
    return etcdrpc.TxnRequest(success=asked)


def _operation(operation: Put | Delete) -> Any:
    if isinstance(operation, Delete):
        return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key_bytes(operation.key)))
    put = etcdrpc.PutRequest(key=key_bytes(operation.key), value=operation.value, lease=operation.lease)
    return etcdrpc.RequestOp(request_put=put)
