"""Every event that a migration's history may hold: one frozen class each.

A docstring names the author (c = coordinator, s = source agent, t = target agent) and the moment.
``EVENT_TYPES`` at the end is the table that everything else is generated from: the decoder, the
authorship check, the phase shown in ``head``, the diagrams in ``docs/``.

This module is pure: no clock, no randomness, no I/O. ``at``, ``uuid`` and ``boot`` are stamped by the
shell that appends (``events/stamp.py``). Fields may be added with a default; they are never renamed,
removed or given another meaning, so that old histories fold the same way in later versions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from events.errors import ChainError, SchemaError

ENVELOPE_VERSION = 1
SIGNED_VERSION = 2
"""Of an event that ends in its author's signature, as all do in a secured fleet; nothing else is different."""
GENESIS = "0" * 64
"""``prev`` of the first event of a history."""
MAX_EVENT_BYTES = 64 * 1024
"""DESIGN: etcd refuses requests over 1.5 MiB; larger things travel as files, events carry a FileRef."""


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all event payloads and of the structures inside them."""


# --- parts of payloads -------------------------------------------------------------------------


class FileRef(Data, frozen=True, kw_only=True):
    """A file on the host that wrote the event; too large, or too secret, for an event itself."""

    path: str
    size_bytes: int
    sha256: str


Strategy = Literal["hybrid", "postcopy", "precopy", "cold", "auto"]
"""How the data travels. ``auto`` is only asked for; the order to cut over names what it came to."""


class Request(Data, frozen=True, kw_only=True):
    """What a person asked for: the value of ``requests/<id>``, with the defaults filled in."""

    container: str
    source: str
    target: str
    strategy: Strategy = "hybrid"
    max_rounds: int = 5
    """Upper bound of pre-copy rounds, 1..50."""
    bwlimit_kib: int = 0
    """Limit of the background transfers in KiB/s; 0 means none."""
    downtime_budget_seconds: float = 0.0
    """A remainder that is expected to arrive within this time is brought inside the stop window, so that no union
    is needed; 0 federates whatever the open view of the source does not give at once."""
    stop_timeout_seconds: int | None = None
    """Grace before the container is killed; None takes the container's own, or Docker's 10 s."""
    on_release: Literal["keep", "remove"] = "keep"
    """What becomes of the source's stopped container and volumes after the release."""
    image: Literal["transfer", "pull", "refuse"] = "transfer"
    """What to do about an image that the target lacks: bring it from the source, from its registry, or give up."""
    remote: Literal["", "sshfs", "nfs"] = ""
    """How the target looks at what has not arrived yet; empty: as the source host's setting says."""
    start: Literal["warm", "cold"] = "warm"
    """Whether the target may start the container up to its gate while the source still runs, where it can."""
    without: tuple[str, ...] = ()
    """What the container may go without on the target, by the names that a refusal says: ``device:/dev/kvm``."""
    privileged: bool = False
    """Consent to move a privileged container with that right."""
    rootfs: bool = True
    """Whether what the container wrote outside of its mounts (its writable layer) travels."""


class Mount(Data, frozen=True, kw_only=True):
    """One tree of the container's data: a named volume, a bind mount, or its own writable layer."""

    kind: Literal["volume", "bind", "rootfs"]
    """``rootfs``: what the container wrote outside of its mounts, as its overlay's upper directory holds it."""
    name: str
    """Volume name, or the bind's path on the host; empty for the writable layer."""
    destination: str
    """Path inside the container; ``/`` for the writable layer, and for nothing else."""
    tree: str
    """Directory (or, for a bind of one file, the file) on the source host that holds the data."""
    read_only: bool = False
    single_file: bool = False
    """The bind is of one file, which no union can carry: it is copied as a whole."""
    size_bytes: int = 0
    """Apparent: what there is to transfer and to compare."""
    files: int = 0
    allocated_bytes: int = 0
    """What it takes on a disk: sparse files count what they hold. 0 with ``entries`` 0 in older histories."""
    entries: int = 0
    """Of every kind, directories included: what it takes in inodes."""


class SharedMount(Data, frozen=True, kw_only=True):
    """A mount on storage that the target reaches too: attached there, never copied.

    What it takes to attach it may hold a password; it travels in the specification.
    """

    kind: Literal["volume", "bind"]
    name: str
    """Volume name, or the bind's path, the same on both hosts."""
    destination: str
    file_system: str
    """As the mount table calls it: ``nfs4``, ``cifs``."""


class PortBinding(Data, frozen=True, kw_only=True):
    """One published port."""

    container_port: str
    """As Docker writes it: ``6379/tcp``."""
    host_ip: str
    host_port: int


class DirtyManifest(Data, frozen=True, kw_only=True):
    """What changed in one mount since its last complete pre-copy round began."""

    destination: str
    manifest: FileRef
    stale_files: int
    """Regular files whose contents must still come from the source."""
    stale_bytes: int
    everything: bool = False
    """Tracking was lost, so the manifest lists the whole tree."""
    why: str = ""
    inline: str = ""
    """A small manifest itself (zlib, then base64): it saves the stop window a transfer."""


class TreeDigest(Data, frozen=True, kw_only=True):
    """A full manifest, with contents' digests, of one mount of the frozen source."""

    destination: str
    manifest: FileRef
    files: int
    size_bytes: int


# --- admission ---------------------------------------------------------------------------------


class Requested(Data, frozen=True, kw_only=True):
    """c: a request was found possible; the migration begins. ``logic`` selects the rules it runs by."""

    request: Request
    container_id: str
    logic: int = 1
    target_address: str = ""
    """As the target was registered: the only one that may look at exported trees."""
    source_address: str = ""
    """As the source was registered: where the target connects to, while the source still prepares."""


class Rejected(Data, frozen=True, kw_only=True):
    """c: the request cannot work. Every reason is listed; nothing was changed. Terminal."""

    reasons: tuple[str, ...]
    request_key: str
    request_text: str
    """The value as it was put, escaped, cut to 1000 characters."""


# --- prepare -----------------------------------------------------------------------------------


class PrepareOrdered(Data, frozen=True, kw_only=True):
    """c: both sides get ready; the container keeps running on the source."""


class SourcePrepared(Data, frozen=True, kw_only=True):
    """s: the container is described, its mounts are measured and tracked. Tracking precedes copying."""

    container_id: str
    container_name: str
    spec: FileRef
    """The full specification. It holds environment values, so it never enters an event."""
    image_id: str
    image_tags: tuple[str, ...]
    mounts: tuple[Mount, ...]
    """Those whose data moves."""
    ports: tuple[PortBinding, ...]
    restart_policy: str
    restart_max_retries: int = 0
    address: str
    """Where the target's data plane reaches the source."""
    warnings: tuple[str, ...] = ()
    shared: tuple[SharedMount, ...] = ()
    """Mounts on shared storage, which the target attaches itself."""
    remote: Literal["sshfs", "nfs"] = "sshfs"
    """How the target is to look at the trees."""
    remote_port: int = 0
    """Where the source serves them, for ``nfs``."""


class ImageWanted(Data, frozen=True, kw_only=True):
    """t: the container's image is not here; the source is to pack what is missing of it."""

    image_id: str
    layers: tuple[str, ...] = ()
    """Diff ids of its lowest layers, which are here already and need not travel."""
    blobs: tuple[str, ...] | None = None
    """None: those layers need not travel in whatever form. Otherwise this host must put them back into the archive, and
    can do so for plain ones, and for compressed ones with these digests."""


class ImagePacked(Data, frozen=True, kw_only=True):
    """s: the missing layers of the image are in a file that the target may fetch."""

    archive: FileRef
    layers: int
    """How many are in it."""
    left_out_bytes: int = 0
    """Size of those that the target has."""


class TargetPrepared(Data, frozen=True, kw_only=True):
    """t: image present, names, ports and space checked, container created but not started."""

    container_id: str
    warnings: tuple[str, ...] = ()


# --- pre-copy ----------------------------------------------------------------------------------


class SyncOrdered(Data, frozen=True, kw_only=True):
    """c: one pre-copy round. Round 1 copies everything, later rounds what became dirty."""

    round: int
    why: str
    contents: bool = True
    """False: only names and metadata of the whole tree; contents follow after the cut-over (``postcopy``)."""


class SyncArmed(Data, frozen=True, kw_only=True):
    """s: a new tracking generation has begun, so the target may copy. Changes from here on belong to it.

    ``dirty`` lists what the generation before it saw, which is what this round must bring. ``compare``
    says that the list cannot be trusted and everything has to be compared by checksum.
    """

    round: int
    dirty: tuple[DirtyManifest, ...] = ()
    compare: bool = False
    why: str = ""
    plain: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a first round: destinations of the trees in which, as the generation began, nothing had a second name, an attribute,
    an ACL, or fewer blocks than its size takes. What comes to have one is listed afterwards."""


class SyncFinished(Data, frozen=True, kw_only=True):
    """t: the round's data is on the target's disk, durably."""

    round: int
    bytes_moved: int
    files: int
    duration_seconds: float


# --- cut-over ----------------------------------------------------------------------------------


class BraceOrdered(Data, frozen=True, kw_only=True):
    """c: the target makes ready what can be ready before the stop; the container runs on meanwhile."""

    why: str
    """Why no further round is ordered."""
    strategy: Strategy | Literal[""] = ""
    """How the remainder will be brought; empty: as the request says."""


class TargetBraced(Data, frozen=True, kw_only=True):
    """t: ready for the stop."""

    start: Literal["warm", "cold"] = "cold"
    """``warm``: the new container waits at its gate."""
    why_cold: str = ""


class CutoverOrdered(Data, frozen=True, kw_only=True):
    """c: stop on the source, start on the target."""

    why: str
    untracked: bool = False
    """The source cannot track changes: stop all the same, and list the whole tree as changed."""
    strategy: Strategy | Literal[""] = ""
    """How the remainder is brought; empty: as the request says."""
    downtime_budget_seconds: float = 0.0
    """What bringing it inside the stop window may cost; 0: as the request says."""


class SourceStopped(Data, frozen=True, kw_only=True):
    """s: the restart policy is ``no``, the container has stopped, the tracker is drained.

    From here to ``source_released`` the source's data is frozen.
    """

    exit_code: int | None = None
    """None: its processes had ended, and Docker had not said how yet; ``source_digested`` says it."""
    unclean: bool = False
    """The container had to be killed after its grace."""
    stopped_at: str = ""
    dirty: tuple[DirtyManifest, ...]


class TargetClaimed(Data, frozen=True, kw_only=True):
    """t: the point of no return. The target alone may run the container from here on."""

    remainder: Literal["", "none", "finished", "federated"] = ""
    """What became of contents that had not arrived before the stop; empty in histories from before it was told."""
    remainder_why: str = ""


class TargetStarted(Data, frozen=True, kw_only=True):
    """t: the container's process runs on the target, on the union."""

    container_id: str
    started_at: str
    ports: tuple[PortBinding, ...] = ()
    milestones: dict[str, float] = {}
    """Seconds since the claim at which each part of the start was done."""
    start: Literal["warm", "cold"] = "cold"
    """Warm: the container had waited at its gate."""
    why_cold: str = ""


class HealthReported(Data, frozen=True, kw_only=True):
    """t: the container's own health check has come to a verdict on the target."""

    status: Literal["healthy", "unhealthy"]
    log: str = ""
    """The end of what the check said, without values of the environment."""


# --- fill and verification ---------------------------------------------------------------------


class FillFinished(Data, frozen=True, kw_only=True):
    """t: everything that was remote has a local copy."""

    bytes_moved: int
    files: int
    duration_seconds: float


class SourceDigested(Data, frozen=True, kw_only=True):
    """s: the manifests, with digests, of the frozen source are ready to be compared against."""

    trees: tuple[TreeDigest, ...]
    exit_code: int | None = None
    """Of the container's stop, where ``source_stopped`` could not tell it; None if nobody knows."""
    unclean: bool = False
    stopped_at: str = ""


class Verified(Data, frozen=True, kw_only=True):
    """t: everything the container has not changed itself equals the frozen source; the link is cut.

    Nothing on the target refers to the source any more.
    """

    files: int
    size_bytes: int
    changed_by_container: int
    """Entries that the container itself changed since it started, which therefore differ rightly."""
    digests: dict[str, str] = {}
    """Digest of each mount's source tree, by destination."""


# --- release -----------------------------------------------------------------------------------


class ReleaseOrdered(Data, frozen=True, kw_only=True):
    """c: the source may let go. The container keeps running on the target."""


class SourceReleased(Data, frozen=True, kw_only=True):
    """s: the source's container is kept under ``kept_as``, disarmed, or removed with its volumes."""

    kept_as: str | None


class Completed(Data, frozen=True, kw_only=True):
    """c: the migration is done. Terminal, but for ``finalise``."""


class FinaliseOrdered(Data, frozen=True, kw_only=True):
    """c: fold the union into a plain volume; ``stop_now`` costs a restart of the container."""

    by_person: str = ""
    why: str = ""
    stop_now: bool = False


class Finalised(Data, frozen=True, kw_only=True):
    """t: the mounts are plain volumes again and the original restart policy is back. Terminal, but for a
    roll-back while the source's copy is kept."""

    outage_seconds: float = 0.0


# --- abort -------------------------------------------------------------------------------------


class AbortOrdered(Data, frozen=True, kw_only=True):
    """c: give up before the claim. It contends with ``target_claimed`` for the same number."""

    reason: str
    by_person: bool = False


class SourceRestored(Data, frozen=True, kw_only=True):
    """s: the container runs on the source again, with its own restart policy (or was left stopped
    because it had not been running)."""

    running: bool
    note: str = ""


class TargetCleaned(Data, frozen=True, kw_only=True):
    """t: nothing of the migration is left on the target."""


class Aborted(Data, frozen=True, kw_only=True):
    """c: both sides are as they were. Terminal."""


# --- roll back ---------------------------------------------------------------------------------


class RollbackOrdered(Data, frozen=True, kw_only=True):
    """c: after the claim, go back. The target's writes are carried back unless a person gave them up."""

    reason: str
    discard_target_writes: bool = False
    by_person: bool = True


class TargetAssertedOff(Data, frozen=True, kw_only=True):
    """c: a person vouches that the target is powered off, so the source may run without hearing from it.

    What the target wrote is thereby given up. The person's name is kept.
    """

    who: str
    words: str = ""


class TargetStopped(Data, frozen=True, kw_only=True):
    """t: the container does not run on the target, and what it wrote there is listed.

    ``trees`` holds one manifest a mount, of the whole tree, in which ``stale`` marks the files whose
    contents the container has changed since the cut-over.
    """

    exit_code: int
    trees: tuple[DirtyManifest, ...] = ()
    address: str = ""
    """Where the source's data plane reaches the target."""
    places: dict[str, str] = {}
    """Where each mount's tree lies there, by destination."""


class CarriedBack(Data, frozen=True, kw_only=True):
    """s: what the container changed on the target is in the source's tree."""

    bytes_moved: int
    files: int
    duration_seconds: float = 0.0


class RolledBack(Data, frozen=True, kw_only=True):
    """c: the container runs on the source again. Terminal."""


# --- any time ----------------------------------------------------------------------------------


class BwlimitOrdered(Data, frozen=True, kw_only=True):
    """c: from now on transfers are limited to ``kib`` KiB/s, 0 for no limit, those under way included."""

    kib: int


class StepFailed(Data, frozen=True, kw_only=True):
    """s, t or c: a step did not succeed.

    ``retrying`` means that its author goes on trying by itself; otherwise the coordinator decides
    (abort before the claim) or a person must act (after it).
    """

    step: str
    reason: str
    """What happened, in words."""
    retrying: bool
    attempt: int
    advice: str
    """What it means for the container and its data, and what a person can do."""
    code: Literal["failed", "refused", "tracking_lost", "container_changed"] = "failed"
    reasons: tuple[str, ...] = ()


class StepRecovered(Data, frozen=True, kw_only=True):
    """s, t or c: a step that had failed goes on."""

    step: str


class ControlRefused(Data, frozen=True, kw_only=True):
    """c: a person's control cannot be obeyed now, and why."""

    control: str
    reason: str


class Paused(Data, frozen=True, kw_only=True):
    """c: a person asked to wait; nothing new is ordered until ``resumed``."""

    by_person: str = ""


class Resumed(Data, frozen=True, kw_only=True):
    """c: go on."""

    by_person: str = ""


# --- the table ---------------------------------------------------------------------------------

Role = Literal["coordinator", "source", "target"]

C: Role = "coordinator"
S: Role = "source"
T: Role = "target"


class EventType(NamedTuple):
    """One row: payload class, who may write it, and the phase that a migration is in after it."""

    data: type[Data]
    authors: tuple[Role, ...]
    phase: str | None
    """None leaves the phase as it was."""


EVENT_TYPES: dict[str, EventType] = {
    "requested": EventType(Requested, (C,), "admit"),
    "rejected": EventType(Rejected, (C,), "rejected"),
    "prepare_ordered": EventType(PrepareOrdered, (C,), "prepare"),
    "source_prepared": EventType(SourcePrepared, (S,), "prepare"),
    "image_wanted": EventType(ImageWanted, (T,), "prepare"),
    "image_packed": EventType(ImagePacked, (S,), "prepare"),
    "target_prepared": EventType(TargetPrepared, (T,), "pre_copy"),
    "sync_ordered": EventType(SyncOrdered, (C,), "pre_copy"),
    "sync_armed": EventType(SyncArmed, (S,), "pre_copy"),
    "sync_finished": EventType(SyncFinished, (T,), "pre_copy"),
    "brace_ordered": EventType(BraceOrdered, (C,), "pre_copy"),
    "target_braced": EventType(TargetBraced, (T,), "pre_copy"),
    "cutover_ordered": EventType(CutoverOrdered, (C,), "cut_over"),
    "source_stopped": EventType(SourceStopped, (S,), "cut_over"),
    "target_claimed": EventType(TargetClaimed, (T,), "claimed"),
    "target_started": EventType(TargetStarted, (T,), "fill"),
    "health_reported": EventType(HealthReported, (T,), None),
    "source_digested": EventType(SourceDigested, (S,), None),
    "fill_finished": EventType(FillFinished, (T,), "verify"),
    "verified": EventType(Verified, (T,), "release"),
    "release_ordered": EventType(ReleaseOrdered, (C,), "release"),
    "source_released": EventType(SourceReleased, (S,), "release"),
    "completed": EventType(Completed, (C,), "completed"),
    "finalise_ordered": EventType(FinaliseOrdered, (C,), "finalise"),
    "finalised": EventType(Finalised, (T,), "finalised"),
    "abort_ordered": EventType(AbortOrdered, (C,), "aborting"),
    "source_restored": EventType(SourceRestored, (S,), None),
    "target_cleaned": EventType(TargetCleaned, (T,), None),
    "aborted": EventType(Aborted, (C,), "aborted"),
    "rollback_ordered": EventType(RollbackOrdered, (C,), "rolling_back"),
    "target_asserted_off": EventType(TargetAssertedOff, (C,), "rolling_back"),
    "target_stopped": EventType(TargetStopped, (T,), "rolling_back"),
    "carried_back": EventType(CarriedBack, (S,), "rolling_back"),
    "rolled_back": EventType(RolledBack, (C,), "rolled_back"),
    "step_failed": EventType(StepFailed, (C, S, T), None),
    "step_recovered": EventType(StepRecovered, (C, S, T), None),
    "control_refused": EventType(ControlRefused, (C,), None),
    "paused": EventType(Paused, (C,), None),
    "resumed": EventType(Resumed, (C,), None),
    "bwlimit_ordered": EventType(BwlimitOrdered, (C,), None),
}

TERMINAL_PHASES = frozenset({"rejected", "completed", "finalised", "aborted", "rolled_back"})

TYPE_OF: dict[type[Data], str] = {row.data: name for name, row in EVENT_TYPES.items()}


# --- the envelope ------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One recorded fact. ``raw`` is the exact stored text, which the next event's ``prev`` hashes."""

    seq: int
    uuid: str
    prev: str
    type: str
    at: str
    """RFC 3339, UTC, milliseconds. For people: no decision is taken on it."""
    by: str
    """``coordinator/<name>`` or ``hostd/<host>``."""
    boot: str
    """The life of the process that wrote."""
    cause: int
    """``seq`` of the event that this one answers; 0 for the first."""
    epoch: int
    """The coordinator's leadership revision that was in force; agents refuse orders from an older one."""
    data: Data
    raw: bytes = b""
    digest: str = ""
    """SHA-256 of ``raw``, in hex: the next event's ``prev``."""
    signature: str = ""
    """Base64 of the author's signature over ``signed_text``; empty in a fleet that is not secured."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    v: int
    seq: int
    uuid: str
    prev: str
    type: str
    at: str
    by: str
    boot: str
    cause: int
    epoch: int
    data: msgspec.Raw
    sig: str = ""


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What the appending shell adds to a payload: identity, time and authorship."""

    uuid: str
    at: str
    by: str
    boot: str
    epoch: int


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The value of ``migrations/<id>/head``: the lock for appending and the cheap summary."""

    v: int = ENVELOPE_VERSION
    seq: int
    uuid: str
    """Of the newest event."""
    digest: str
    """Of the newest event's stored text."""
    phase: str
    container: str = ""
    container_id: str = ""
    source: str = ""
    target: str = ""
    at: str = ""
    """Time of the newest event."""

    @property
    def terminal(self) -> bool:
        return self.phase in TERMINAL_PHASES


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_head_decoder = msgspec.json.Decoder(Head)
_encoder = msgspec.json.Encoder(order="deterministic")
_data_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(row.data) for name, row in EVENT_TYPES.items()
}


_SIGNATURE = re.compile(rb',"sig":"([A-Za-z0-9+/]{86}==)"\}')
"""How a signed event ends. What was signed is the text without it, closed by a brace again."""
_SIGNATURE_BYTES = len(',"sig":""}') + 88


def next_event(
    previous: Event | None,
    data: Data,
    *,
    cause: int,
    stamp: Stamp,
    sign: Callable[[bytes], str] | None = None,
) -> Event:
    """The event that follows ``previous`` (None for the first), encoded and chained; signed, if ``sign`` is given.

    ``sign`` returns the base64 of an Ed25519 signature over the text that it is given. Raises SchemaError
    when ``data`` is no event's payload, holds text that is not Unicode, or exceeds MAX_EVENT_BYTES.
    """
    name = TYPE_OF.get(type(data))
    if name is None:
        raise SchemaError(f"{type(data).__name__} is not the payload of any event")
    seq = 1 if previous is None else previous.seq + 1
    prev = GENESIS if previous is None else previous.digest
    envelope = {
        "v": ENVELOPE_VERSION if sign is None else SIGNED_VERSION,
        "seq": seq,
        "uuid": stamp.uuid,
        "prev": prev,
        "type": name,
        "at": stamp.at,
        "by": stamp.by,
        "boot": stamp.boot,
        "cause": cause,
        "epoch": stamp.epoch,
        "data": data,
    }
    try:
        raw = _encoder.encode(envelope)
    except (UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise SchemaError(f"the event {name} holds what cannot be written ({error}); it was not written") from error
    if sign is not None:
        raw = raw[:-1] + b',"sig":"' + sign(raw).encode() + b'"}'
    if len(raw) > MAX_EVENT_BYTES:
        raise SchemaError(
            f"the event {name} would be {len(raw)} bytes, over the limit of {MAX_EVENT_BYTES}; it was not written"
        )
    return decode_event(raw)


def decode_event(raw: bytes) -> Event:
    """The event in a stored text. Raises SchemaError for anything that is not exactly one we know."""
    if len(raw) > MAX_EVENT_BYTES:
        raise SchemaError(f"a stored event of {len(raw)} bytes is over the limit")
    try:
        envelope = _envelope_decoder.decode(raw)
        if envelope.v not in (ENVELOPE_VERSION, SIGNED_VERSION):
            raise SchemaError(
                f"event version {envelope.v} is not known here (newest known: {SIGNED_VERSION}); upgrade this process"
            )
        signature = _signature(raw)
        if (envelope.v == SIGNED_VERSION) != bool(signature) or envelope.sig != signature:
            raise SchemaError("a stored event does not end in one signature, as its version says; it was changed")
        decoder = _data_decoders.get(envelope.type)
        if decoder is None:
            raise SchemaError(f"event type {envelope.type[:80]!r} is not known here")
        data = decoder.decode(envelope.data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SchemaError(f"a stored event cannot be read: {error}") from error
    return Event(
        seq=envelope.seq,
        uuid=envelope.uuid,
        prev=envelope.prev,
        type=envelope.type,
        at=envelope.at,
        by=envelope.by,
        boot=envelope.boot,
        cause=envelope.cause,
        epoch=envelope.epoch,
        data=data,
        raw=raw,
        digest=hashlib.sha256(raw).hexdigest(),
        signature=signature,
    )


def _signature(raw: bytes) -> str:
    found = _SIGNATURE.fullmatch(raw[-_SIGNATURE_BYTES:])
    return "" if found is None else found[1].decode()


def signed_text(event: Event) -> bytes:
    """What the author of ``event`` has signed: its stored text without the signature."""
    return event.raw[:-_SIGNATURE_BYTES] + b"}" if event.signature else event.raw


def check_chain(events: list[Event], previous: Event | None = None) -> None:
    """Raise ChainError unless ``events`` continue ``previous`` without gap, repeat or edit."""
    for event in events:
        seq = 1 if previous is None else previous.seq + 1
        prev = GENESIS if previous is None else previous.digest
        if event.seq != seq:
            raise ChainError(f"the history has event {event.seq} where {seq} belongs")
        if event.prev != prev:
            raise ChainError(f"event {event.seq} does not continue the one before it: the history was changed")
        previous = event


def head_after(head: Head | None, event: Event) -> Head:
    """The head that belongs to ``event``, given the one before it."""
    row = EVENT_TYPES[event.type]
    phase = row.phase if row.phase is not None else (head.phase if head else "admit")
    base = {
        "seq": event.seq,
        "uuid": event.uuid,
        "digest": event.digest,
        "phase": phase,
        "at": event.at,
    }
    if isinstance(event.data, Requested):
        request = event.data.request
        return Head(
            **base,  # type: ignore[arg-type]
            container=request.container,
            container_id=event.data.container_id,
            source=request.source,
            target=request.target,
        )
    if head is None:
        return Head(**base)  # type: ignore[arg-type]
    return msgspec.structs.replace(head, **base)


def encode_head(head: Head) -> bytes:
    """Deterministic JSON of ``head``."""
    return _encoder.encode(head)


def decode_head(raw: bytes) -> Head:
    """The head in a stored value. Raises SchemaError."""
    try:
        return _head_decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SchemaError(f"a migration's head cannot be read: {error}") from error


def plain(data: Data) -> dict[str, Any]:
    """``data`` as JSON-able dictionaries, for people and for ``--json``."""
    built: dict[str, Any] = msgspec.to_builtins(data)
    return built
