"""Deliberate defects, one at a time: the simulator must find each of them (P19).

A ``Bug`` patches the product's own cores, its loop, the store, or one model effect, for as long as its context lasts.
Some of them are defects that the simulator itself has found in the product before; they stay here so that they would
be found again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from coordinator import admission, lifecycle
from coordinator.service import Service
from events.decision import Decision
from events.errors import ConflictError, PermanentError, TransientError
from events.following import Changes, Follower, Item, Snapshot
from events.machine import Table
from events.memory import MemoryFollower
from events.schema import Data, Event, ReleaseOrdered, TargetAssertedOff
from events.store import NoAnswerError, Store
from hostd import source, target
from hostd.plan import Plan, Step
from hostd.turn import Draft, Operation, Perform, Turns
from tests.simulation.effects import lists, source_container, source_data, target_container, target_data
from tests.simulation.effects.base import ROOT, Ctx, Outcome, Performance, nothing, set_policy
from tests.simulation.effects.lists import publish_both, source_layer
from tests.simulation.effects.registry import RUN, UNDO
from tests.simulation.scheduler import Result, run_seed
from tests.simulation.world import WHITEOUT, Tracker, Union

Plant = Callable[[contextlib.ExitStack], None]


@dataclass(frozen=True)
class Bug:
    """One defect and how to plant it."""

    name: str
    words: str
    rules: tuple[str, ...]
    """The invariants that may catch it."""
    plant: Plant
    seed: int = 0
    """One that shows it, as the product is now."""
    aim: Mapping[str, str] = field(default_factory=dict)
    """Rare ones are looked for in worlds in which the moment that matters always comes."""

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The defect is there while this lasts."""
        with contextlib.ExitStack() as stack:
            self.plant(stack)
            yield

    def hunt(self, seeds: range) -> Result | None:
        """The first of ``seeds`` that shows the defect."""
        with self.planted():
            return next((result for seed in seeds if not (result := run_seed(seed, self.aim)).good), None)


def _run(stack: contextlib.ExitStack, **verbs: Callable[[Ctx], Performance]) -> None:
    stack.enter_context(mock.patch.dict(RUN, verbs))


def _step(stack: contextlib.ExitStack, plan: Plan, state: str, step: Step) -> None:
    stack.enter_context(mock.patch.dict(plan.steps, {state: step}))


def _patch(stack: contextlib.ExitStack, where: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(where, name, value))


def _allow(stack: contextlib.ExitStack, table: Table, event: str, states: tuple[str, ...], then: str) -> None:
    """A row too many."""
    original = table.next
    stack.enter_context(
        mock.patch.object(
            table, "next", lambda state, what: then if what == event and state in states else original(state, what)
        )
    )


# --- the defects -----------------------------------------------------------------------------------


def start_before_claim(stack: contextlib.ExitStack) -> None:
    step = target.PLAN.steps["uniting"]
    _step(stack, target.PLAN, "uniting", replace(step, effects=(*step.effects, "start_container")))


def policy_not_disarmed(stack: contextlib.ExitStack) -> None:
    def disarm(ctx: Ctx) -> Performance:
        source_container.note_stop(ctx)
        yield
        return None

    def stop(ctx: Ctx) -> Performance:
        container = ctx.source_container()
        if container is None:
            raise PermanentError("the container is gone")
        yield
        ctx.agent.world_stop(container)
        return {"exit_code": 0, "unclean": False, "stopped_at": "then"}

    _run(stack, disarm_restart=disarm, stop_container=stop)


def failed_sync_is_success(stack: contextlib.ExitStack) -> None:
    real = target_data.pull_round

    def pull(ctx: Ctx) -> Performance:
        try:
            return (yield from real(ctx))
        except TransientError:
            return {"bytes_moved": 0, "files": 0, "duration_seconds": 0.1}

    _run(stack, pull_round=pull)


def watch_resumed_too_far(stack: contextlib.ExitStack) -> None:
    real = MemoryFollower._next

    def skipping(self: MemoryFollower, prefix: str, cursor: int | None) -> Snapshot | Changes | None:
        found = real(self, prefix, cursor)
        if isinstance(found, Changes) and found.revision % 7 == 0:
            self._cursors[prefix] = found.revision + 1
        return found

    _patch(stack, MemoryFollower, "_next", skipping)


def blind_retry(stack: contextlib.ExitStack) -> None:
    real = Store.append

    def append(self: Store, migration: str, previous: Event | None, data: Data, **rest: Any) -> Event:
        once = mock.patch.object(self, "_settled", lambda attempt, _read_back, _seconds: attempt())
        for _ in range(5):
            try:
                with once:
                    return real(self, migration, previous, data, **rest)
            except ConflictError:
                raise
            except Exception as error:
                if not isinstance(error.__cause__ or error, NoAnswerError):
                    raise
                with contextlib.suppress(NoAnswerError):
                    events = self.read(migration)
                    previous = events[-1] if events else None
        return real(self, migration, previous, data, **rest)

    _patch(stack, Store, "append", append)


def lost_deletion(stack: contextlib.ExitStack) -> None:
    _patch(stack, lists, "there_now", lambda tree, paths: {path: True for path in sorted(paths) if path in tree})


def stop_before_order(stack: contextlib.ExitStack) -> None:
    _step(stack, source.PLAN, "armed", Step("hasten", ("disarm_restart", "stop_container")))


def stale_epoch(stack: contextlib.ExitStack) -> None:
    real = Store.append

    def unguarded(self: Store, migration: str, previous: Event | None, data: Data, **rest: Any) -> Event:
        return real(self, migration, previous, data, **(rest | {"guard": None}))

    _patch(stack, Store, "append", unguarded)


def tracker_trusted_after_restart(stack: contextlib.ExitStack) -> None:
    def publish(ctx: Ctx) -> Performance:
        tracker, _ = source_data.ensure_tracker(ctx)
        yield
        return {"dirty": publish_both(ctx, "stopped", tracker.marks)}

    _run(stack, vouch_for_tracking=nothing, publish_dirty=publish)


def overflow_ignored(stack: contextlib.ExitStack) -> None:
    def arm(tracker: Tracker, generation: int) -> tuple[set[str], bool]:
        seen, _ = real(tracker, generation)
        return (seen if tracker.before_trusted else set()), True

    real = source_data.tracker_arm
    _patch(stack, source_data, "tracker_arm", arm)


def repeated_arming_trusts_a_new_tracker(stack: contextlib.ExitStack) -> None:
    def arm(ctx: Ctx) -> Performance:
        number = ctx.view.round
        tracker, fresh = source_data.ensure_tracker(ctx)
        yield
        seen, trusted = source_data.tracker_arm(tracker, number)
        if number == 1:
            return {"dirty": ()}
        if fresh or not trusted:
            return {"compare": True, "why": "tracking was lost", "dirty": ()}
        return {"dirty": publish_both(ctx, f"round-{number}", seen)}

    _run(stack, arm_tracking=arm)


def round_without_its_list(stack: contextlib.ExitStack) -> None:
    real = source_data.arm_tracking

    def arm(ctx: Ctx) -> Performance:
        yield from real(ctx)
        return {"dirty": ()}

    _run(stack, arm_tracking=arm)


def release_before_verified(stack: contextlib.ExitStack) -> None:
    _allow(stack, lifecycle.TABLE, "release_ordered", ("verify",), "release")
    real = lifecycle.decide

    def decide(state: lifecycle.Lifecycle) -> Decision:
        return lifecycle._order(state, ReleaseOrdered(), "too early") if state.state == "verify" else real(state)

    _patch(stack, lifecycle, "decide", decide)


def rollback_carries_nothing(stack: contextlib.ExitStack) -> None:
    def carry(_ctx: Ctx) -> Performance:
        yield
        return {"bytes_moved": 0, "files": 0}

    _run(stack, carry_back=carry)


def abort_after_claim(stack: contextlib.ExitStack) -> None:
    _patch(stack, lifecycle, "BEFORE_CLAIM", (*lifecycle.BEFORE_CLAIM, "claimed", "fill"))
    for table, states, then in (
        (lifecycle.TABLE, ("claimed", "fill"), "aborting"),
        (source.TABLE, ("yielded", "digesting", "digested"), "restoring"),
        (target.TABLE, ("starting", "filling", "filling_digested", "filled"), "cleaning"),
    ):
        _allow(stack, table, "abort_ordered", states, then)


def rollback_does_not_stop(stack: contextlib.ExitStack) -> None:
    def recall(ctx: Ctx) -> Performance:
        yield
        return {"exit_code": 0, "address": ctx.host.name}

    _run(stack, recall_container=recall)


def manifest_not_applied(stack: contextlib.ExitStack) -> None:
    _run(stack, apply_dirty=nothing)


def started_without_its_union(stack: contextlib.ExitStack) -> None:
    _patch(stack, target_container, "mount_again", lambda _ctx, _union: None)


def link_cut_too_early(stack: contextlib.ExitStack) -> None:
    def filled(_ctx: Ctx) -> Performance:
        yield
        return {"bytes_moved": 0, "files": 0, "duration_seconds": 0.0}

    def verified(_ctx: Ctx) -> Performance:
        yield
        return {"files": 0, "size_bytes": 0, "changed_by_container": 0}

    def detach(ctx: Ctx) -> Performance:
        yield
        union = ctx.volume().union
        if union is not None:
            union.remote = False
        return None

    _run(stack, fill_replica=filled, verify_trees=verified, detach_remote=detach)


def undo_forgets_too_early(stack: contextlib.ExitStack) -> None:
    def undo(decision: Decision) -> Generator[Operation, Any, dict[str, Any]]:
        outcomes: dict[str, Any] = {}
        failed = False
        for name in decision.effects:
            try:
                outcomes[name] = yield Perform(name, undo=True)
            except TransientError:
                failed = True
        if failed:
            raise TransientError("again")
        return outcomes

    _patch(stack, Turns, "_undo", staticmethod(undo))


def stop_not_noted_before_disarming(stack: contextlib.ExitStack) -> None:
    real = source_container.stop_container

    def stop(ctx: Ctx) -> Performance:
        ctx.files["stopping"] = True
        return (yield from real(ctx))

    _patch(stack, source_container, "note_stop", lambda _ctx: None)
    _run(stack, stop_container=stop)


def rollback_of_what_is_being_removed(stack: contextlib.ExitStack) -> None:
    _patch(
        stack,
        lifecycle.Lifecycle,
        "reversible",
        property(lambda self: self.state in lifecycle.AFTER_CLAIM and self.kept_as is not None),
    )


def union_gone_while_it_is_read(stack: contextlib.ExitStack) -> None:
    step = target.PLAN.steps["yielding"]
    without = tuple(name for name in step.effects if name != "mount_union")
    _step(stack, target.PLAN, "yielding", replace(step, effects=without))
    _step(stack, target.PLAN, "yielded", Step("offer", ("provide_image",)))


def overtaken_step_reports(stack: contextlib.ExitStack) -> None:
    real = Turns.draft

    def draft(self: Turns, data: Data, decision: Decision) -> Draft:
        with mock.patch.object(self, "plan", replace(self.plan, steps={self.view.state: Step(decision.step, ())})):
            return real(self, data, decision)

    _patch(stack, Turns, "draft", draft)


def two_migrations_of_one_container(stack: contextlib.ExitStack) -> None:
    real = admission.examine
    _patch(stack, admission, "examine", lambda key, raw, world: real(key, raw, replace(world, active={})))


def source_revived_too_early(stack: contextlib.ExitStack) -> None:
    _step(stack, source.PLAN, "recalling", Step("hasten", ("revive_container",)))


def finalise_forgets_to_start(stack: contextlib.ExitStack) -> None:
    real = target_container.fold_union

    def fold(ctx: Ctx) -> Performance:
        with mock.patch.object(target_container, "should_run", lambda _ctx, _container: False):
            performance = real(ctx)
            while True:
                try:
                    next(performance)
                except StopIteration as done:
                    outcome: Outcome = done.value
                    return outcome
                ctx.files.pop("folding", None)
                yield

    _run(stack, fold_union=fold)


def policy_given_back_after_the_start(stack: contextlib.ExitStack) -> None:
    def revive(ctx: Ctx) -> Performance:
        prepared = ctx.view.source_prepared
        ctx.agent.guarded.pop(prepared.container_id, None)
        container = ctx.source_container()
        if container is None:
            raise PermanentError("the container is gone")
        container.name = prepared.container_name
        yield
        ctx.agent.world_start(container)
        yield
        ctx.docker()
        set_policy(container, prepared.restart_policy)
        ctx.host.files.pop(ctx.migration, None)
        return {"running": True}

    _run(stack, revive_container=revive)
    step = source.PLAN.steps["restoring"]
    order = [name for name in step.effects if name != "disarm_restart"]
    order.insert(order.index("stop_container") + 1, "disarm_restart")
    _step(stack, source.PLAN, "restoring", replace(step, effects=tuple(order)))


def requests_before_what_is_under_way(stack: contextlib.ExitStack) -> None:
    real = Service._begin

    def begin(self: Service) -> None:
        real(self)
        self._heads_known = True

    _patch(stack, Service, "_begin", begin)


def stop_told_too_early(stack: contextlib.ExitStack) -> None:
    def stop(ctx: Ctx) -> Performance:
        container = ctx.source_container()
        yield
        assert container is not None
        return {"exit_code": 0, "unclean": False, "stopped_at": "then"}

    _run(stack, stop_container=stop)


def changes_listed_before_the_stop(stack: contextlib.ExitStack) -> None:
    step = target.PLAN.steps["yielding"]
    effects_in_order = ("fill_replica", "mount_union", "list_changes", "recall_container")
    _step(stack, target.PLAN, "yielding", replace(step, effects=effects_in_order))


def deletions_not_carried_back(stack: contextlib.ExitStack) -> None:
    real = source_data.carry_back

    def carry(ctx: Ctx) -> Performance:
        before = dict(ctx.volume().files)
        outcome = yield from real(ctx)
        files = ctx.volume().files
        for path in before.keys() - files.keys():
            files[path] = before[path]
        return outcome

    _run(stack, carry_back=carry)


def generation_ends_with_its_round(stack: contextlib.ExitStack) -> None:
    real = target_data.pull_round

    def pull(ctx: Ctx) -> Performance:
        outcome = yield from real(ctx)
        for tracker in ctx.request_source.trackers.values():
            tracker.marks = set()
        return outcome

    _run(stack, pull_round=pull)


def view_of_a_plain_tree_kept(stack: contextlib.ExitStack) -> None:
    def detach(ctx: Ctx) -> Performance:
        yield
        union = ctx.volume().federated
        if union is not None:
            union.remote = False

    def fill(ctx: Ctx) -> Performance:
        union = ctx.volume().union
        kept = union is not None and union.settled and union.remote
        outcome = yield from target_data.fill_replica(ctx)
        if union is not None and kept:
            union.remote = True
        return outcome

    _run(stack, detach_remote=detach, fill_replica=fill)


def whole_list_taken_for_a_part(stack: contextlib.ExitStack) -> None:
    real = target_data.apply_entries

    def apply(union: Union, entries: dict[str, bool], *, everything: bool, **more: Any) -> None:
        real(union, entries, everything=False, **more)

    _patch(stack, target_data, "apply_entries", apply)


def silent_target_given_up(stack: contextlib.ExitStack) -> None:
    real = lifecycle.decide

    def decide(state: lifecycle.Lifecycle) -> Decision:
        if state.state == "rolling_back" and not state.target_stopped and not state.asserted_off:
            return lifecycle._order(state, TargetAssertedOff(who="a timeout"), "it does not answer")
        return real(state)

    _patch(stack, lifecycle, "decide", decide)


def retired_copy_keeps_its_policy(stack: contextlib.ExitStack) -> None:
    real = source_container.retire_container

    def retire(ctx: Ctx) -> Performance:
        outcome = yield from real(ctx)
        container = ctx.source_container()
        if container is not None:
            set_policy(container, ctx.view.source_prepared.restart_policy)
        return outcome

    _run(stack, retire_container=retire)


def policy_returned_before_finalised(stack: contextlib.ExitStack) -> None:
    real = target_container.fold_union

    def fold(ctx: Ctx) -> Performance:
        outcome = yield from real(ctx)
        container = ctx.our_container()
        if container is not None and "policy due" in ctx.files:
            ctx.docker()
            set_policy(container, ctx.view.source_prepared.restart_policy)
            yield
        return outcome

    _run(stack, fold_union=fold)


def contents_left_behind_without_a_union(stack: contextlib.ExitStack) -> None:
    real = target_data.apply_entries

    def apply(union: Union, entries: dict[str, bool], *, everything: bool, brought: bool = False) -> None:
        if brought:
            for path in [path for path, present in entries.items() if present]:
                union.upper.pop(path, None)
        real(union, entries, everything=everything, brought=brought)

    _patch(stack, target_data, "apply_entries", apply)


def new_leader_does_not_look(stack: contextlib.ExitStack) -> None:
    real = Service._take

    def take(self: Service, item: Item, follower: Follower) -> None:
        if isinstance(item, Changes):
            real(self, item, follower)

    _patch(stack, Service, "_take", take)


def list_before_the_stop(stack: contextlib.ExitStack) -> None:
    step = source.PLAN.steps["stopping"]
    _step(
        stack,
        source.PLAN,
        "stopping",
        replace(step, effects=("vouch_for_tracking", "publish_dirty", "disarm_restart", "stop_container")),
    )


def whiteouts_left_behind(stack: contextlib.ExitStack) -> None:
    real = target_data.bring_layer

    def bring(ctx: Ctx, names: list[str]) -> Generator[None, None, int]:
        moved = yield from real(ctx, names)
        tree = ctx.host.layers[ctx.migration].tree
        for path in [path for path, value in tree.items() if value == WHITEOUT]:
            del tree[path]
        return moved

    _patch(stack, target_data, "bring_layer", bring)


def last_changes_of_the_layer_left_behind(stack: contextlib.ExitStack) -> None:
    def apply(ctx: Ctx) -> Generator[None, None, None]:
        with mock.patch.object(target_data, "bring_layer", lambda _ctx, _names: iter(())):
            yield from real(ctx)

    real = target_data.apply_layer
    _patch(stack, target_data, "apply_layer", apply)


def layer_not_carried_back(stack: contextlib.ExitStack) -> None:
    real = target_data.list_changes

    def changes(ctx: Ctx) -> Performance:
        outcome = yield from real(ctx)
        assert outcome is not None
        return outcome | {"trees": tuple(tree for tree in outcome["trees"] if tree.destination != ROOT)}

    _run(stack, list_changes=changes)


def whiteouts_not_carried_back(stack: contextlib.ExitStack) -> None:
    real = source_data.carry_back

    def carry(ctx: Ctx) -> Performance:
        outcome = yield from real(ctx)
        layer = source_layer(ctx)
        for path in [path for path, value in layer.items() if value == WHITEOUT]:
            del layer[path]
        return outcome

    _run(stack, carry_back=carry)


def layers_stage_left_behind(stack: contextlib.ExitStack) -> None:
    stack.enter_context(mock.patch.dict(UNDO, {"open_layer": nothing}))


BUGS = (
    Bug(
        "start_before_claim", "the target starts the container before target_claimed", ("P8", "P1"), start_before_claim
    ),
    Bug(
        "policy_not_disarmed",
        "the source's restart policy stays",
        ("P10", "P1"),
        policy_not_disarmed,
        seed=6,
        aim={"policy": "always", "trouble_at": "source_stopped"},
    ),
    Bug(
        "failed_sync_is_success",
        "a pre-copy round that failed counts as done",
        ("P2", "P13"),
        failed_sync_is_success,
        seed=53,
    ),
    Bug(
        "view_of_a_plain_tree_kept",
        "what was opened to read the source through is not taken down where no union came of it",
        ("P11",),
        view_of_a_plain_tree_kept,
    ),
    Bug("watch_resumed_too_far", "a watch goes on one revision too far", ("E13", "P13"), watch_resumed_too_far),
    Bug("blind_retry", "an append whose reply was lost is repeated without looking", ("P6",), blind_retry, seed=3),
    Bug("lost_deletion", "what the container deleted is left out of the dirty set", ("P2", "P13"), lost_deletion),
    Bug("stop_before_order", "the source stops before cutover_ordered", ("P8",), stop_before_order),
    Bug(
        "stale_epoch",
        "appends are not guarded by leadership, and a stale leader is obeyed",
        ("P9", "P6"),
        stale_epoch,
        seed=22,
    ),
    Bug(
        "tracker_trusted_after_restart",
        "a tracker that died with its agent is trusted",
        ("P2", "P13"),
        tracker_trusted_after_restart,
        seed=12,
    ),
    Bug(
        "overflow_ignored",
        "an overflow of the tracker's queue is taken for silence",
        ("P2", "P13"),
        overflow_ignored,
        seed=6,
    ),
    Bug(
        "round_without_its_list",
        "a round copies without the list it was armed with",
        ("P2", "P13"),
        round_without_its_list,
        seed=6,
    ),
    Bug(
        "release_before_verified",
        "the release is ordered before verified",
        ("P6", "P8"),
        release_before_verified,
        seed=2,
    ),
    Bug("rollback_carries_nothing", "a roll-back skips carry_back", ("P2",), rollback_carries_nothing),
    Bug(
        "abort_after_claim",
        "an abort is allowed after target_claimed",
        ("P6", "P1"),
        abort_after_claim,
        seed=9,
        aim={"control": "abort", "control_at": "target_claimed", "mood": "leave it"},
    ),
    Bug(
        "rollback_does_not_stop",
        "a roll-back does not stop the target's container",
        ("P1", "P2", "P13"),
        rollback_does_not_stop,
    ),
    Bug("manifest_not_applied", "the dirty manifest is not applied", ("P2", "P13"), manifest_not_applied),
    Bug(
        "started_without_its_union",
        "after a reboot the container starts on the bare place",
        ("P2", "P10"),
        started_without_its_union,
        seed=2,
        aim={"strategy": "hybrid", "trouble_at": "target_started", "trouble": "reboot", "mood": "leave it"},
    ),
    Bug(
        "link_cut_too_early", "the link is cut although contents are missing", ("P2", "P4"), link_cut_too_early, seed=7
    ),
    Bug(
        "overtaken_step_reports",
        "the outcome of a step that nobody asks for any more is appended",
        ("P6",),
        overtaken_step_reports,
    ),
    Bug(
        "two_migrations_of_one_container",
        "a container that is being moved is admitted again",
        ("P16",),
        two_migrations_of_one_container,
        seed=2,
    ),
    Bug(
        "source_revived_too_early",
        "the source starts before the target has stopped",
        ("P8", "P1"),
        source_revived_too_early,
    ),
    Bug(
        "undo_forgets_too_early",
        "a failed undo loses the evidence that the others need (a former defect)",
        ("P11",),
        undo_forgets_too_early,
        seed=302,
        aim={
            "control": "abort",
            "control_at": "source_stopped",
            "trouble_at": "undo track_changes",
            "trouble": "fail",
            "mood": "leave it",
        },
    ),
    Bug(
        "stop_not_noted_before_disarming",
        "a reboot between disarming and stop leaves the container down (a former defect)",
        ("P11",),
        stop_not_noted_before_disarming,
        seed=6,
        aim={"policy": "always", "trouble_at": "disarm_restart"},
    ),
    Bug(
        "rollback_of_what_is_being_removed",
        "a roll-back is accepted while the source removes its copy (a former defect)",
        ("P13", "P2"),
        rollback_of_what_is_being_removed,
        seed=9,
        aim={"on_release": "remove", "control": "rollback", "control_at": "release_ordered", "mood": "leave it"},
    ),
    Bug(
        "union_gone_while_it_is_read",
        "a target that reboots during a roll-back shows an empty place (a former defect)",
        ("P13", "P2"),
        union_gone_while_it_is_read,
        seed=36,
        aim={
            "control": "rollback",
            "control_at": "target_started",
            "trouble_at": "target_stopped",
            "trouble": "reboot",
            "mood": "leave it",
        },
    ),
    Bug(
        "finalise_forgets_to_start",
        "a crash while finalising leaves the container down (a former defect)",
        ("P13",),
        finalise_forgets_to_start,
        seed=36,
        aim={"control": "finalise", "control_at": "completed", "trouble_at": "fold_union", "mood": "leave it"},
    ),
    Bug(
        "repeated_arming_trusts_a_new_tracker",
        "an arming that is repeated takes the tracker of its first attempt for the one that died (a former defect)",
        ("P2", "P13"),
        repeated_arming_trusts_a_new_tracker,
        seed=2,
        aim={"trouble_at": "sync_finished", "trouble": "fresh_start", "mood": "leave it"},
    ),
    Bug(
        "policy_given_back_after_the_start",
        "Docker restarts between a container's start on the source and the return of its policy (a former defect)",
        ("P11",),
        policy_given_back_after_the_start,
        seed=22,
        aim={
            "policy": "always",
            "control": "rollback",
            "control_at": "target_started",
            "trouble_at": "revive_container",
            "trouble": "docker_restart",
            "mood": "leave it",
        },
    ),
    Bug(
        "requests_before_what_is_under_way",
        "a new leader admits requests before it has read which migrations are under way (a former defect)",
        ("P16",),
        requests_before_what_is_under_way,
        seed=38,
    ),
    Bug(
        "stop_told_too_early",
        "source_stopped is told before the container stands still",
        ("P1", "P2", "P3"),
        stop_told_too_early,
        seed=2,
    ),
    Bug(
        "list_before_the_stop",
        "the last list of changes is made before the container stands still",
        ("P2", "P13"),
        list_before_the_stop,
    ),
    Bug(
        "changes_listed_before_the_stop",
        "a roll-back lists the target's changes before it stops the container",
        ("P2", "P13"),
        changes_listed_before_the_stop,
        seed=6,
    ),
    Bug("deletions_not_carried_back", "a roll-back does not carry deletions back", ("P2",), deletions_not_carried_back),
    Bug(
        "generation_ends_with_its_round",
        "what changes during a round counts as copied by it",
        ("P2", "P13"),
        generation_ends_with_its_round,
        seed=10,
    ),
    Bug(
        "whole_list_taken_for_a_part",
        "what a list of the whole tree lacks is not removed",
        ("P2", "P13"),
        whole_list_taken_for_a_part,
        seed=2,
    ),
    Bug(
        "silent_target_given_up",
        "a target that does not answer is given up without a person's word",
        ("P1", "P2"),
        silent_target_given_up,
    ),
    Bug(
        "retired_copy_keeps_its_policy",
        "the released copy gets its restart policy back",
        ("P1", "P10"),
        retired_copy_keeps_its_policy,
        seed=19,
        aim={
            "policy": "always",
            "on_release": "keep",
            "trouble_at": "source_released",
            "trouble": "reboot",
            "mood": "leave it",
        },
    ),
    Bug(
        "policy_returned_before_finalised",
        "the target's container gets its restart policy back before finalised is durable (a former defect)",
        ("P1",),
        policy_returned_before_finalised,
        seed=198,
        aim={
            "policy": "always",
            "control": "rollback",
            "control_at": "fold_union",
            "trouble_at": "fold_union",
            "trouble": "reboot",
            "mood": "go back",
        },
    ),
    Bug(
        "contents_left_behind_without_a_union",
        "without a union, the last changes are not brought before the start",
        ("P2", "P13"),
        contents_left_behind_without_a_union,
        aim={"strategy": "precopy"},
    ),
    Bug(
        "new_leader_does_not_look",
        "a new leader waits for news instead of looking at what is under way",
        ("P13", "P6"),
        new_leader_does_not_look,
        seed=7,
    ),
    Bug(
        "whiteouts_left_behind",
        "what the container removed of its image is there again on the target",
        ("P2", "P13"),
        whiteouts_left_behind,
        seed=2,
    ),
    Bug(
        "last_changes_of_the_layer_left_behind",
        "what changed in the writable layer after the last round is not brought before the start",
        ("P2", "P13"),
        last_changes_of_the_layer_left_behind,
        seed=2,
    ),
    Bug(
        "layer_not_carried_back",
        "a roll-back leaves what the container wrote into its layer on the target",
        ("P2",),
        layer_not_carried_back,
        seed=2,
        aim={"control": "rollback", "control_at": "target_started", "mood": "leave it"},
    ),
    Bug(
        "whiteouts_not_carried_back",
        "a roll-back brings back what the container removed of its image on the target",
        ("P2",),
        whiteouts_not_carried_back,
        seed=2,
        aim={"control": "rollback", "control_at": "target_started", "mood": "leave it"},
    ),
    Bug(
        "layers_stage_left_behind",
        "an abort leaves the place where the layer arrives",
        ("P11",),
        layers_stage_left_behind,
        seed=2,
        aim={"control": "abort", "control_at": "target_prepared", "mood": "leave it"},
    ),
)
