"""What the peer of a migration may ask of this host by SSH, as a function of the migration's history.

    source  ── from ``source_prepared`` until an abort, the release, or ``target_stopped`` ──►  the target may copy
               and look at the trees, and fetch the specification, the image and the lists that this host made
    target  ── from ``target_stopped`` until the source runs the container again ──►  the source may copy the trees
               and fetch the lists of changes

An admission is there before the event that lets the peer ask: ``foreseen`` is the history as it will be. It does not
change in between, so the stop window never waits for one to become durable.

Pure: no clock, no randomness, no I/O, no logging. ``hostd/ssh_gatekeeper.py`` writes it down, ``hostd/ssh_gate.py``
obeys it.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from events.schema import TYPE_OF, Data, TargetStopped
from hostd.layer import ROOTFS
from hostd.plan import Plan, View

SOURCE_FILES = ("spec.json", "image.tar", "round-*.manifest", "stopped-*.manifest", "digest-*.manifest")
"""Of the migration's directory on the source; ``*`` stands for digits and dashes."""
TARGET_FILES = ("changes-*.manifest",)

_SOURCE_SERVES = frozenset(
    {"prepared", "packing", "arming", "armed", "stopping", "frozen", "yielded", "digesting", "digested"}
)
_SOURCE_RECALLS = "recalling"
"""Before the target stops, it brings what it lacks, and may have to look at the trees once more."""
_TARGET_OFFERS = "yielded"


@dataclass(frozen=True)
class AdmittedTree:
    """One tree, or a single file."""

    path: str
    single_file: bool = False
    viewed: bool = False
    """It may be looked at by SFTP, not only be copied."""


@dataclass(frozen=True)
class Admission:
    """What ``peer`` may ask for."""

    peer: str
    role: str
    """This host's in the migration."""
    trees: tuple[AdmittedTree, ...]
    names: tuple[str, ...]
    """Files of the migration's own directory."""


def admission(plan: Plan, view: View) -> Admission | None:
    """What the other host of this migration may ask of this one now; None for nothing at all."""
    if plan.role == "source":
        return _by_source(view)
    return _by_target(view)


def foreseen(plan: Plan, view: View, data: Data) -> View:
    """``view`` once this host's event ``data`` is in the history. Raises IllegalEventError."""
    kind = TYPE_OF[type(data)]
    return replace(view, state=plan.table.next(view.state, kind), facts={**view.facts, kind: data})


def _by_source(view: View) -> Admission | None:
    if "source_prepared" not in view.facts:
        return None
    recalls = view.state == _SOURCE_RECALLS and "source_released" not in view.facts
    if view.state not in _SOURCE_SERVES and not recalls:
        return None
    prepared = view.source_prepared
    viewed = prepared.remote == "sshfs"
    trees = tuple(
        AdmittedTree(mount.tree, mount.single_file, viewed and not mount.single_file and mount.kind != ROOTFS)
        for mount in prepared.mounts
    )
    return Admission(view.request.target, "source", trees, SOURCE_FILES)


def _by_target(view: View) -> Admission | None:
    stopped = view.facts.get("target_stopped")
    if view.state != _TARGET_OFFERS or not isinstance(stopped, TargetStopped) or not stopped.trees:
        return None
    single = {mount.destination for mount in view.source_prepared.mounts if mount.single_file}
    trees = tuple(AdmittedTree(path, destination in single) for destination, path in sorted(stopped.places.items()))
    return Admission(view.request.source, "target", trees, TARGET_FILES)
