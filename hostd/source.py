"""The source agent's machine: the host that a container leaves.

1. Tracking begins before ``source_prepared``, and a new generation before each ``sync_armed``: whatever
   changes while the target copies belongs to a set that the target will be told of.
2. ``stop`` disarms the restart policy and reads it back *before* the container is stopped, so that no
   reboot and no restart of Docker revives it.
   Where trees are served by NFS, that begins before ``source_prepared`` and ends before ``source_released``, or
   before the container runs here again.
3. From ``source_stopped`` to ``source_released`` nothing here writes to the container's data.
4. The container starts here again only after ``abort_ordered``, which cannot follow a claim, or after
   ``target_stopped``, or after a person has vouched that the target is off.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from events.decision import Outcomes
from events.machine import Row, Table
from events.schema import (
    CarriedBack,
    Data,
    ImagePacked,
    SourceDigested,
    SourcePrepared,
    SourceReleased,
    SourceRestored,
    SourceStopped,
    SyncArmed,
)
from hostd.plan import Plan, Step, View, fields_for, warnings_of

_BEFORE_STOP = ("chosen", "preparing", "prepared", "packing", "arming", "armed", "stopping")
_AFTER_CLAIM = ("yielded", "digesting", "digested", "releasing", "released", "kept")

TABLE = Table(
    "source",
    states=(
        "new",
        *_BEFORE_STOP,
        "frozen",
        "yielded",
        "digesting",
        "digested",
        "releasing",
        "released",
        "kept",
        "restoring",
        "restored",
        "recalling",
        "carrying",
        "reviving",
        "revived",
        "ended",
    ),
    initial="new",
    rows=(
        Row("requested", ("new",), "chosen"),
        Row("prepare_ordered", ("chosen",), "preparing"),
        Row("source_prepared", ("preparing",), "prepared"),
        Row("image_wanted", ("prepared",), "packing"),
        Row("image_packed", ("packing",), "prepared"),
        Row("sync_ordered", ("prepared", "armed", "stopping"), "arming"),
        Row("sync_armed", ("arming",), "armed"),
        Row("cutover_ordered", ("prepared", "armed"), "stopping"),
        Row("source_stopped", ("stopping",), "frozen"),
        Row("target_claimed", ("frozen",), "yielded"),
        Row("target_started", ("yielded",), "digesting"),
        Row("source_digested", ("digesting",), "digested"),
        Row("release_ordered", ("digested",), "releasing"),
        Row("source_released", ("releasing",), "released"),
        Row("completed", ("released",), "kept"),
        Row("abort_ordered", (*_BEFORE_STOP, "frozen"), "restoring"),
        Row("source_restored", ("restoring",), "restored"),
        Row("aborted", ("restored",), "ended"),
        Row("rollback_ordered", _AFTER_CLAIM, "recalling"),
        Row("target_asserted_off", ("recalling", "carrying"), "carrying"),
        Row("target_stopped", ("recalling",), "carrying"),
        Row("carried_back", ("carrying",), "reviving"),
        Row("source_restored", ("reviving",), "revived"),
        Row("rolled_back", ("revived",), "ended"),
    ),
    ignored=(
        "rejected",
        "target_prepared",
        "sync_finished",
        "brace_ordered",
        "target_braced",
        "health_reported",
        "fill_finished",
        "verified",
        "finalise_ordered",
        "finalised",
        "target_cleaned",
        "step_failed",
        "step_recovered",
        "control_refused",
        "paused",
        "resumed",
        "bwlimit_ordered",
    ),
    final=("kept", "ended"),
)


def _prepared(_view: View, outcomes: Outcomes) -> Data:
    return SourcePrepared(**{**fields_for(SourcePrepared, outcomes), "warnings": warnings_of(outcomes)})


def _packed(_view: View, outcomes: Outcomes) -> Data:
    return ImagePacked(**fields_for(ImagePacked, outcomes))


def _armed(view: View, outcomes: Outcomes) -> Data:
    return SyncArmed(round=view.round, **fields_for(SyncArmed, outcomes))


def _stopped(_view: View, outcomes: Outcomes) -> Data:
    return SourceStopped(**fields_for(SourceStopped, outcomes))


def _digested(_view: View, outcomes: Outcomes) -> Data:
    return SourceDigested(**fields_for(SourceDigested, outcomes))


def _released(_view: View, outcomes: Outcomes) -> Data:
    return SourceReleased(**fields_for(SourceReleased, outcomes))


def _restored(_view: View, outcomes: Outcomes) -> Data:
    return SourceRestored(**fields_for(SourceRestored, outcomes))


def _carried(_view: View, outcomes: Outcomes) -> Data:
    return CarriedBack(**fields_for(CarriedBack, outcomes))


_GUARD = Step("guard", ("guard_source", "export_trees"))

PLAN = Plan(
    role="source",
    table=TABLE,
    steps={
        "preparing": Step(
            "prepare", ("describe_container", "track_changes", "measure_mounts", "export_trees"), _prepared
        ),
        "packing": Step("pack", ("pack_image",), _packed),
        "arming": Step("arm", ("arm_tracking", "export_trees"), _armed),
        # The target looks at the trees before the stop is ordered; a reboot in between has ended what serves them.
        "armed": Step("serve", ("export_trees",)),
        "stopping": Step("stop", ("vouch_for_tracking", "disarm_restart", "stop_container", "publish_dirty"), _stopped),
        "frozen": _GUARD,
        "yielded": _GUARD,
        "digesting": Step("digest", ("guard_source", "export_trees", "digest_trees"), _digested),
        "digested": _GUARD,
        "releasing": Step("release", ("retire_container",), _released),
        "restoring": Step(
            "restore",
            (
                "guard_source",
                "export_trees",
                "publish_dirty",
                "track_changes",
                # The policy comes back before the container does: a Docker that restarts in between would leave it down.
                "disarm_restart",
                "stop_container",
                "describe_container",
            ),
            _restored,
            undo=True,
        ),
        # Before the target stops, it brings what it lacks, and may have to look at the trees once more. A kept copy that a
        # person has started meanwhile must not run while the target's writes are put into its data.
        "recalling": Step("serve", ("guard_source", "export_trees")),
        "carrying": Step("carry", ("guard_source", "carry_back"), _carried),
        "reviving": Step("revive", ("revive_container", "announce_placement"), _restored),
    },
)
