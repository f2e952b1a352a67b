"""Every effect by its name: what the machines name is looked up here."""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.effects.base import Ctx, Performance, nothing
from tests.simulation.effects.source_container import (
    describe_container,
    describe_container_undo,
    disarm_restart,
    disarm_restart_undo,
    guard_source,
    guard_source_undo,
    retire_container,
    revive_container,
    stop_container,
    stop_container_undo,
)
from tests.simulation.effects.source_data import (
    arm_tracking,
    carry_back,
    digest_trees,
    export_trees,
    export_trees_undo,
    measure_mounts,
    pack_image,
    publish_dirty,
    track_changes,
    track_changes_undo,
    vouch_for_tracking,
)
from tests.simulation.effects.target_container import (
    fold_union,
    recall_container,
    recall_container_undo,
    return_policy,
    start_container,
    supervise_container,
    warm_container,
)
from tests.simulation.effects.target_data import (
    apply_dirty,
    attach_remote,
    connect_source,
    detach_remote,
    digest_arrived,
    fill_replica,
    list_changes,
    mount_union,
    open_layer,
    open_layer_undo,
    open_views,
    pull_round,
    unmount_undo,
    verify_trees,
)
from tests.simulation.effects.target_setup import (
    check_target,
    create_container,
    create_container_undo,
    create_networks,
    create_volumes,
    create_volumes_undo,
    fetch_spec,
    fetch_spec_undo,
    provide_image,
    provide_image_undo,
)

RUN: dict[str, Callable[[Ctx], Performance]] = {
    verb.__name__: verb
    for verb in (
        describe_container, track_changes, measure_mounts, connect_source, fetch_spec, check_target, provide_image, create_volumes, open_views,
        create_container, open_layer, create_networks, pack_image, arm_tracking, pull_round, attach_remote, warm_container, vouch_for_tracking, disarm_restart, stop_container,
        publish_dirty, apply_dirty, mount_union, start_container, supervise_container, fill_replica, digest_trees, digest_arrived,
        verify_trees, detach_remote, retire_container, guard_source, revive_container, recall_container, list_changes,
        fold_union, return_policy, carry_back, export_trees,
    )
}  # fmt: skip
"""What an effect's ``run`` does."""

UNDO: dict[str, Callable[[Ctx], Performance]] = dict.fromkeys(RUN, nothing) | {
    "describe_container": describe_container_undo,
    "track_changes": track_changes_undo,
    "disarm_restart": disarm_restart_undo,
    "stop_container": stop_container_undo,
    "guard_source": guard_source_undo,
    "export_trees": export_trees_undo,
    "create_volumes": create_volumes_undo,
    "create_container": create_container_undo,
    "open_layer": open_layer_undo,
    "attach_remote": unmount_undo,
    "mount_union": unmount_undo,
    "recall_container": recall_container_undo,
    "fetch_spec": fetch_spec_undo,
    "provide_image": provide_image_undo,
}
"""What an effect's ``undo`` does."""
