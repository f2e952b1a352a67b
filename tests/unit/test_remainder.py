"""What becomes of contents that have not arrived at the stop: decided from the history alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import schema
from hostd import target
from hostd.effects.fill_replica import BATCH_BYTES, BATCH_FILES, batches
from hostd.placement import Placeholder
from hostd.plan import View
from hostd.remainder import AT_HAND_BYTES, AT_HAND_FILES, Remainder, decide, estimate
from tests.support.histories import REF, REQUEST, History, prepared

MB = 1024 * 1024


def stale(size_bytes: int, files: int, destination: str = "/data") -> schema.DirtyManifest:
    return schema.DirtyManifest(destination=destination, manifest=REF, stale_files=files, stale_bytes=size_bytes)


def finished_round(number: int, size_bytes: int, seconds: float) -> schema.SyncFinished:
    return schema.SyncFinished(round=number, bytes_moved=size_bytes, files=1, duration_seconds=seconds)


def view(
    *dirty: schema.DirtyManifest,
    strategy: str = "hybrid",
    ordered: dict[str, Any] | None = None,
    rounds: tuple[schema.SyncFinished, ...] = (finished_round(1, 100 * MB, 1.0),),
    mounts: tuple[schema.Mount, ...] | None = None,
    kib: int | None = None,
    **request: Any,
) -> View:
    """The target's view right after ``source_stopped``."""
    wish = msgspec.structs.replace(REQUEST, strategy=strategy, **request)
    history = History()
    history.add(schema.Requested(request=wish, container_id="c" * 64))
    history.add("prepare_ordered")
    history.add(prepared() if mounts is None else prepared(mounts=mounts))
    history.add("target_prepared")
    for done in rounds:
        history.add(schema.SyncOrdered(round=done.round, why=""))
        history.add(schema.SyncArmed(round=done.round))
        history.add(done)
    if kib is not None:
        history.add(schema.BwlimitOrdered(kib=kib))
    history.add(schema.CutoverOrdered(why="", **(ordered or {})))
    history.add(schema.SourceStopped(exit_code=0, unclean=False, stopped_at="t", dirty=dirty))
    return target.PLAN.fold(history.events)


def test_without_anything_stale_there_is_no_remainder() -> None:
    assert decide(view(stale(0, 0))).kind == "none"


def test_hybrid_federates_and_says_how_much() -> None:
    words = "5 bytes in 2 files follow while the container runs"
    assert decide(view(stale(5, 2))) == Remainder("federated", words, at_hand=True, amount="5 bytes in 2 files")


@pytest.mark.parametrize(
    ("dirty", "how", "at_hand"),
    [
        (stale(AT_HAND_BYTES, AT_HAND_FILES), {}, True),
        (stale(AT_HAND_BYTES + 1, 1), {}, False),
        (stale(1, AT_HAND_FILES + 1), {}, False),
        (stale(1, 1), {"kib": 100}, False),
        (stale(1, 1), {"bwlimit_kib": 100}, False),
        (stale(1, 1), {"ordered": {"downtime_budget_seconds": 100.0}}, True),
        (stale(1, 1), {"strategy": "postcopy"}, False),
        (stale(1, 1), {"strategy": "precopy"}, False),
        (stale(1, 1), {"strategy": "cold"}, False),
        (stale(0, 0), {}, False),
    ],
)
def test_very_little_is_asked_of_the_view_first_where_one_is_open_and_nothing_limits_it(
    dirty: schema.DirtyManifest, how: dict[str, Any], at_hand: bool
) -> None:
    assert decide(view(dirty, **how)).at_hand == at_hand


@pytest.mark.parametrize(
    ("rounds", "at_hand"),
    [
        ((finished_round(1, 100 * MB, 1.0),), True),
        ((finished_round(1, 100 * MB, 10.0),), False),
        ((finished_round(1, 100 * MB, 10.0), finished_round(2, 10 * MB, 0.1)), True),
        ((finished_round(1, MB, 10.0),), True),
        ((), True),
    ],
)
def test_the_view_is_not_asked_for_what_no_round_could_have_brought_in_time(
    rounds: tuple[schema.SyncFinished, ...], at_hand: bool
) -> None:
    """The best rate counts, of rounds that moved enough to show one."""
    assert decide(view(stale(2 * MB, 1), rounds=rounds)).at_hand == at_hand


def test_what_is_at_hand_is_counted_over_all_trees() -> None:
    mounts = tuple(
        schema.Mount(kind="volume", name=name, destination=f"/{name}", tree=f"/v/{name}") for name in ("one", "two")
    )
    half = AT_HAND_BYTES // 2 + 1
    assert decide(view(stale(half, 1, "/one"), mounts=mounts)).at_hand
    assert not decide(view(stale(half, 1, "/one"), stale(half, 1, "/two"), mounts=mounts)).at_hand


@pytest.mark.parametrize("strategy", ["precopy", "cold"])
def test_precopy_and_cold_bring_everything_before_the_start(strategy: str) -> None:
    rounds = () if strategy == "cold" else (finished_round(1, 1, 1000.0),)
    assert decide(view(stale(10**12, 10**6), strategy=strategy, rounds=rounds)).kind == "finished"


def test_postcopy_federates_even_if_nothing_changed_since_the_names_were_laid_out() -> None:
    assert decide(view(stale(0, 0), strategy="postcopy", downtime_budget_seconds=100.0)).kind == "federated"


def test_the_budget_decides_by_the_measured_rate() -> None:
    assert decide(view(stale(50 * MB, 10), downtime_budget_seconds=2.0)).kind == "finished"
    slow = decide(view(stale(500 * MB, 10), downtime_budget_seconds=2.0))
    assert slow.kind == "federated"
    assert "6.01 s" in slow.why
    assert "2 s" in slow.why


def test_many_small_files_take_time_however_small_they_are() -> None:
    assert decide(view(stale(10_000, 10_000), downtime_budget_seconds=2.0)).kind == "federated"


def test_a_rate_that_was_never_measured_promises_nothing() -> None:
    nothing = (finished_round(1, 0, 0.5),)
    assert decide(view(stale(1, 1), rounds=nothing, downtime_budget_seconds=100.0)).kind == "federated"


def test_the_order_has_the_last_word_over_the_request() -> None:
    ordered = {"strategy": "hybrid", "downtime_budget_seconds": 5.0}
    assert decide(view(stale(MB, 1), strategy="auto", ordered=ordered)).kind == "finished"
    assert decide(view(stale(MB, 1), strategy="auto", ordered={"strategy": "cold"})).kind == "finished"


def test_a_limit_that_was_set_meanwhile_counts() -> None:
    assert decide(view(stale(50 * MB, 1), downtime_budget_seconds=5.0)).kind == "finished"
    assert decide(view(stale(50 * MB, 1), downtime_budget_seconds=5.0, kib=1024)).kind == "federated"
    assert decide(view(stale(50 * MB, 1), downtime_budget_seconds=5.0, bwlimit_kib=1024, kib=0)).kind == "finished"


def test_a_mount_of_a_single_file_is_always_brought_and_decides_nothing() -> None:
    mounts = (schema.Mount(kind="bind", name="/f", destination="/f", tree="/f", single_file=True),)
    assert decide(view(stale(10**12, 1, "/f"), mounts=mounts)).kind == "none"


@given(st.integers(0, 10**12), st.integers(0, 10**6), st.integers(1, 10**12), st.floats(0.001, 10**6))
def test_more_to_bring_never_takes_less_time(size_bytes: int, files: int, moved: int, seconds: float) -> None:
    rounds = [finished_round(1, moved, seconds)]
    one = estimate(size_bytes, files, rounds)
    more = estimate(size_bytes + 1, files + 1, rounds)
    assert one is not None and more is not None
    assert 0 < one < more or one == pytest.approx(more)


@given(st.lists(st.integers(1, 2**40), max_size=5000))
def test_a_fill_comes_in_bounded_batches_and_forgets_nothing(sizes: list[int]) -> None:
    holders = [Placeholder(b"%d" % number, size) for number, size in enumerate(sizes)]
    parts = list(batches(holders))
    assert [holder for part in parts for holder in part] == holders
    for part in parts:
        assert 0 < len(part) <= BATCH_FILES
        assert len(part) == 1 or sum(holder.size for holder in part) <= BATCH_BYTES
