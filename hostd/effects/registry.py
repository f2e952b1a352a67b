"""Every effect by its name: what the machines name is looked up here."""

from __future__ import annotations

from hostd.effects.announce_placement import AnnouncePlacement
from hostd.effects.apply_dirty import ApplyDirty
from hostd.effects.arm_tracking import ArmTracking
from hostd.effects.attach_remote import AttachRemote
from hostd.effects.base import Effect
from hostd.effects.carry_back import CarryBack
from hostd.effects.check_target import CheckTarget
from hostd.effects.connect_source import ConnectSource
from hostd.effects.create_container import CreateContainer
from hostd.effects.create_networks import CreateNetworks
from hostd.effects.create_volumes import CreateVolumes
from hostd.effects.describe_container import DescribeContainer
from hostd.effects.detach_remote import DetachRemote
from hostd.effects.digest_arrived import DigestArrived
from hostd.effects.digest_trees import DigestTrees
from hostd.effects.disarm_restart import DisarmRestart
from hostd.effects.export_trees import ExportTrees
from hostd.effects.fetch_spec import FetchSpec
from hostd.effects.fill_replica import FillReplica
from hostd.effects.fold_union import FoldUnion
from hostd.effects.guard_source import GuardSource
from hostd.effects.list_changes import ListChanges
from hostd.effects.measure_mounts import MeasureMounts
from hostd.effects.mount_union import MountUnion
from hostd.effects.open_layer import OpenLayer
from hostd.effects.open_views import OpenViews
from hostd.effects.pack_image import PackImage
from hostd.effects.provide_image import ProvideImage
from hostd.effects.publish_dirty import PublishDirty
from hostd.effects.pull_round import PullRound
from hostd.effects.recall_container import RecallContainer
from hostd.effects.retire_container import RetireContainer
from hostd.effects.return_policy import ReturnPolicy
from hostd.effects.revive_container import ReviveContainer
from hostd.effects.start_container import StartContainer
from hostd.effects.stop_container import StopContainer
from hostd.effects.supervise_container import SuperviseContainer
from hostd.effects.track_changes import TrackChanges
from hostd.effects.verify_trees import VerifyTrees
from hostd.effects.vouch_for_tracking import VouchForTracking
from hostd.effects.warm_container import WarmContainer
from hostd.effects.watch_health import WatchHealth

_ALL: tuple[Effect, ...] = (
    DescribeContainer(),
    TrackChanges(),
    MeasureMounts(),
    ConnectSource(),
    FetchSpec(),
    CheckTarget(),
    ProvideImage(),
    PackImage(),
    CreateNetworks(),
    CreateVolumes(),
    OpenViews(),
    CreateContainer(),
    OpenLayer(),
    ArmTracking(),
    PullRound(),
    AttachRemote(),
    WarmContainer(),
    VouchForTracking(),
    DisarmRestart(),
    StopContainer(),
    PublishDirty(),
    ApplyDirty(),
    MountUnion(),
    StartContainer(),
    AnnouncePlacement(),
    SuperviseContainer(),
    WatchHealth(),
    FillReplica(),
    DigestTrees(),
    DigestArrived(),
    VerifyTrees(),
    DetachRemote(),
    ExportTrees(),
    RetireContainer(),
    GuardSource(),
    ReviveContainer(),
    RecallContainer(),
    ListChanges(),
    FoldUnion(),
    ReturnPolicy(),
    CarryBack(),
)

EFFECTS: dict[str, Effect] = {effect.name: effect for effect in _ALL}
