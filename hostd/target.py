"""The target agent's machine: the host that a container comes to.

1. Everything that can fail is done before ``target_claimed``: image, container, names, ports, the union
   itself. Up to there an abort costs nothing but time.
2. The union is mounted only after ``source_stopped``: what it shows as lower must never change.
3. What can be ready before the stop is ready before it is ordered: ``target_braced``.
4. The container is started only after ``target_claimed`` is durable.
5. Rolling back, it lists what the container wrote only after it has stopped it, and removes nothing before
   the source runs again.
6. Once the source has failed for good, nothing is claimed: its container may have run, and written, after the stop.
7. ``verified`` is appended only when every entry has been compared and the link to the source is cut.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from events.decision import Outcomes
from events.machine import Row, Table
from events.schema import (
    Data,
    FillFinished,
    Finalised,
    HealthReported,
    ImageWanted,
    SyncFinished,
    TargetBraced,
    TargetClaimed,
    TargetCleaned,
    TargetPrepared,
    TargetStarted,
    TargetStopped,
    Verified,
)
from hostd.plan import Plan, Step, View, fields_for, warnings_of

_AFTER_CLAIM = (
    "starting",
    "filling",
    "filling_digested",
    "filled",
    "verifying",
    "verified",
    "settled",
    "finalising",
    "finalised",
)
_BEFORE_CLAIM = (
    "chosen",
    "waiting",
    "preparing",
    "awaiting_image",
    "prepared",
    "syncing",
    "synced",
    "readying",
    "ready",
    "bracing",
    "uniting",
)

TABLE = Table(
    "target",
    states=(
        "new",
        *_BEFORE_CLAIM,
        "starting",
        "filling",
        "filling_digested",
        "filled",
        "verifying",
        "verified",
        "settled",
        "finalising",
        "finalised",
        "yielding",
        "yielded",
        "clearing",
        "clearing_late",
        "cleared",
        "cleaning",
        "cleaned",
        "ended",
    ),
    initial="new",
    rows=(
        Row("requested", ("new",), "chosen"),
        Row("prepare_ordered", ("chosen",), "waiting"),
        Row("source_prepared", ("waiting",), "preparing"),
        Row("image_wanted", ("preparing",), "awaiting_image"),
        Row("image_packed", ("awaiting_image",), "preparing"),
        Row("target_prepared", ("preparing",), "prepared"),
        Row("sync_ordered", ("prepared", "synced", "ready", "bracing"), "synced"),
        Row("sync_armed", ("synced",), "syncing"),
        Row("sync_finished", ("syncing",), "synced"),
        Row("brace_ordered", ("prepared", "synced"), "readying"),
        Row("target_braced", ("readying",), "ready"),
        # From the others: histories from before a target was asked to get ready.
        Row("cutover_ordered", ("ready", "prepared", "synced"), "bracing"),
        Row("source_stopped", ("bracing",), "uniting"),
        Row("target_claimed", ("uniting",), "starting"),
        Row("target_started", ("starting",), "filling"),
        Row("source_digested", ("filling",), "filling_digested"),
        Row("source_digested", ("filled",), "verifying"),
        Row("fill_finished", ("filling",), "filled"),
        Row("fill_finished", ("filling_digested",), "verifying"),
        Row("verified", ("verifying",), "verified"),
        Row("completed", ("verified",), "settled"),
        Row("finalise_ordered", ("settled",), "finalising"),
        Row("finalised", ("settled", "finalising"), "finalised"),
        Row("rollback_ordered", _AFTER_CLAIM, "yielding"),
        Row("target_asserted_off", ("yielding", "yielded"), "yielded"),
        Row("target_stopped", ("yielding",), "yielded"),
        Row("source_restored", ("yielded",), "clearing"),
        Row("source_restored", ("cleaning",), "cleaning"),
        Row("source_restored", ("cleaned",), "cleaned"),
        Row("target_cleaned", ("clearing",), "cleared"),
        Row("rolled_back", ("clearing",), "clearing_late"),
        Row("target_cleaned", ("clearing_late",), "ended"),
        Row("rolled_back", ("cleared",), "ended"),
        Row("abort_ordered", _BEFORE_CLAIM, "cleaning"),
        Row("target_cleaned", ("cleaning",), "cleaned"),
        Row("aborted", ("cleaned",), "ended"),
    ),
    ignored=(
        "rejected",
        "release_ordered",
        "source_released",
        "carried_back",
        "health_reported",
        "step_failed",
        "step_recovered",
        "control_refused",
        "paused",
        "resumed",
        "bwlimit_ordered",
    ),
    final=("finalised", "ended"),
)


def _prepared(_view: View, outcomes: Outcomes) -> Data:
    wanted = fields_for(ImageWanted, outcomes)
    if wanted:
        return ImageWanted(**wanted)
    return TargetPrepared(**{**fields_for(TargetPrepared, outcomes), "warnings": warnings_of(outcomes)})


def _synced(view: View, outcomes: Outcomes) -> Data:
    return SyncFinished(round=view.round, **fields_for(SyncFinished, outcomes))


def _braced(_view: View, outcomes: Outcomes) -> Data:
    return TargetBraced(**fields_for(TargetBraced, outcomes))


def _claimed(_view: View, outcomes: Outcomes) -> Data:
    return TargetClaimed(**fields_for(TargetClaimed, outcomes))


def _started(_view: View, outcomes: Outcomes) -> Data:
    return TargetStarted(**fields_for(TargetStarted, outcomes))


def _health(outcomes: Outcomes) -> Data | None:
    """What the container's health check said, which ends a step early."""
    fields = fields_for(HealthReported, {"watch_health": outcomes.get("watch_health")})
    return HealthReported(**fields) if fields else None


def _filled(_view: View, outcomes: Outcomes) -> Data:
    if (health := _health(outcomes)) is not None:
        return health
    return FillFinished(**fields_for(FillFinished, outcomes))


def _verified(_view: View, outcomes: Outcomes) -> Data:
    if (health := _health(outcomes)) is not None:
        return health
    return Verified(**fields_for(Verified, outcomes))


def _cleaned(_view: View, _outcomes: Outcomes) -> Data:
    return TargetCleaned()


def _finalised(_view: View, outcomes: Outcomes) -> Data | None:
    if (health := _health(outcomes)) is not None:
        return health
    fields = fields_for(Finalised, outcomes)
    return Finalised(**fields) if fields else None


def _stopped(_view: View, outcomes: Outcomes) -> Data:
    return TargetStopped(**fields_for(TargetStopped, outcomes))


_FILL = Step("fill", ("announce_placement", "supervise_container", "watch_health", "fill_replica"), _filled)

_LEFT_BEHIND = (
    "open_views",
    "warm_container",
    "create_container",
    "open_layer",
    "mount_union",
    "attach_remote",
    "create_volumes",
    "create_networks",
    "provide_image",
    "fetch_spec",
    "connect_source",
)
"""Whatever a migration may have left on this host, newest first: the order in which it is undone."""
_CLEAR = Step("clear", ("recall_container", *_LEFT_BEHIND), _cleaned, undo=True)

PLAN = Plan(
    role="target",
    table=TABLE,
    heeding=frozenset({"uniting"}),
    supervised=frozenset({"filling", "filling_digested", "filled", "verifying", "verified", "settled"}),
    steps={
        "waiting": Step("connect", ("connect_source",)),
        "preparing": Step(
            "prepare",
            (
                "fetch_spec",
                "check_target",
                "provide_image",
                "create_networks",
                "create_volumes",
                "open_views",
                "create_container",
                "open_layer",
            ),
            _prepared,
        ),
        "syncing": Step("sync", ("pull_round",), _synced),
        # What takes longest has begun before the rounds, and is waited for at the end.
        "readying": Step("get_ready", ("warm_container", "attach_remote"), _braced),
        # Done already, but for an agent that was started anew: nobody else could open the gate of its earlier life.
        "ready": Step("brace", ("warm_container", "attach_remote")),
        "bracing": Step("brace", ("warm_container", "attach_remote")),
        "uniting": Step("unite", ("attach_remote", "apply_dirty", "mount_union"), _claimed),
        "starting": Step("start", ("start_container",), _started),
        "filling": _FILL,
        "filling_digested": _FILL,
        "filled": Step("supervise", ("announce_placement", "supervise_container", "digest_arrived")),
        "verifying": Step(
            "verify",
            ("announce_placement", "supervise_container", "watch_health", "verify_trees", "detach_remote"),
            _verified,
        ),
        "verified": Step("supervise", ("announce_placement", "supervise_container")),
        "settled": Step(
            "settle", ("announce_placement", "supervise_container", "watch_health", "fold_union"), _finalised
        ),
        "finalising": Step("finalise", ("fold_union", "announce_placement"), _finalised),
        # Only now is the container Docker's to start; a rollback can still be ordered, and takes that back.
        "finalised": Step("hand_over", ("return_policy",)),
        # A reboot has taken the union away: what the source is to fetch must be there to be read.
        "yielding": Step("yield", ("fill_replica", "recall_container", "mount_union", "list_changes"), _stopped),
        "yielded": Step("offer", ("mount_union",)),
        "clearing": _CLEAR,
        "clearing_late": _CLEAR,
        "cleaning": Step("clean", _LEFT_BEHIND, _cleaned, undo=True),
    },
)
