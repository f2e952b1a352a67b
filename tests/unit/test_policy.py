"""Which round, which strategy, and the cut-over: for each, by the sequence of rounds that a container would cause."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy import AUTO_BUDGET_SECONDS, CONVERGED_BYTES, Choice, Round, choose, plan_next

MB = 1024 * 1024
rounds = st.lists(st.builds(Round, st.integers(0, 10**13), st.floats(0, 1e6)), max_size=60)


@dataclass
class Busy:
    """A container that dirties its data while it is copied."""

    tree_bytes: int
    link_rate: int
    """Bytes per second that the link carries."""
    write_rate: int
    """Bytes per second that become dirty."""
    working_set: int = 2**62
    """It writes to the same files again and again: no more than this is dirty at any time."""
    fixed_seconds: float = 0.3

    def migrate(self, strategy: str = "hybrid", *, max_rounds: int = 50) -> tuple[list[Round], Choice]:
        """The rounds that are made, and the choice that ends them."""
        done: list[Round] = []
        dirty = self.tree_bytes
        while True:
            choice = plan_next(strategy, tuple(done), max_rounds=max_rounds, mounts=1)  # type: ignore[arg-type]
            if not choice.another_round:
                return done, choice
            seconds = self.fixed_seconds + dirty / self.link_rate
            done.append(Round(dirty, seconds))
            dirty = int(min(self.write_rate * seconds, self.working_set, self.tree_bytes))


def test_the_first_round_copies_everything() -> None:
    assert choose((), max_rounds=5).another_round


def test_a_second_round_brings_what_changed_during_the_first() -> None:
    assert choose((Round(10**9, 10.0),), max_rounds=5).another_round


def test_a_small_round_means_converged() -> None:
    choice = choose((Round(10**9, 10.0), Round(CONVERGED_BYTES, 0.1)), max_rounds=5)
    assert not choice.another_round
    assert "converged" in choice.why


def test_a_shrinking_dirty_set_earns_another_round() -> None:
    assert choose((Round(10**9, 10.0), Round(10**8, 1.0)), max_rounds=5).another_round


def test_a_container_that_writes_as_fast_as_the_link_is_moved_all_the_same() -> None:
    choice = choose((Round(10**9, 10.0), Round(9 * 10**8, 9.0)), max_rounds=5)
    assert not choice.another_round
    assert "not converging" in choice.why


def test_one_round_is_enough_when_the_request_says_so() -> None:
    assert not choose((Round(10**9, 10.0),), max_rounds=1).another_round


@given(rounds, st.integers(1, 50))
def test_every_migration_reaches_the_cut_over_within_its_limit(done: list[Round], limit: int) -> None:
    if len(done) >= limit:
        assert not choose(tuple(done), max_rounds=limit).another_round


# --- containers at work ----------------------------------------------------------------------------


def test_an_idle_container_is_cut_over_after_the_second_round() -> None:
    done, choice = Busy(10_000 * MB, 100 * MB, 0).migrate()
    assert len(done) == 2
    assert "converged" in choice.why


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_rounds_go_on_while_each_leaves_clearly_less_behind(share: float) -> None:
    busy = Busy(10_000 * MB, 100 * MB, int(share * 100 * MB))
    done, _ = busy.migrate()
    # What becomes dirty while a round does no more than connect and compare: no number of rounds gets below that.
    floor = busy.write_rate * busy.fixed_seconds / (1 - share)
    assert done[-1].bytes_moved <= max(CONVERGED_BYTES, 2 * floor)
    assert all(later.bytes_moved < earlier.bytes_moved for earlier, later in itertools.pairwise(done))


@pytest.mark.parametrize("times", [0.8, 1.0, 3.0, 50.0])
def test_a_container_that_writes_faster_than_the_link_costs_two_rounds_and_no_more(times: float) -> None:
    """C6, D11: what remains is left to the union."""
    done, choice = Busy(10_000 * MB, 100 * MB, int(times * 100 * MB)).migrate()
    assert len(done) == 2
    assert "not converging" in choice.why
    assert choice.strategy == "hybrid"


def test_a_hot_working_set_is_not_copied_over_and_over() -> None:
    done, choice = Busy(10_000 * MB, 100 * MB, 500 * MB, working_set=200 * MB).migrate()
    assert [done[0].bytes_moved, done[1].bytes_moved] == [10_000 * MB, 200 * MB]
    assert len(done) == 3, "the third shows that the set does not shrink"
    assert not choice.another_round


@given(st.integers(0, 10**13), st.integers(1, 10**10), st.integers(0, 10**11), st.integers(0, 10**13))
def test_whatever_a_container_does_the_rounds_end_and_their_sum_is_bounded(
    tree: int, link: int, write: int, hot: int
) -> None:
    done, _ = Busy(tree, link, write, working_set=hot).migrate()
    assert len(done) < 50
    # A geometric series: each round but the last two is at most 0.7 of the one before.
    assert sum(each.bytes_moved for each in done[1:]) <= tree * 3.4 + 2 * CONVERGED_BYTES


# --- strategies ------------------------------------------------------------------------------------


def plan(strategy: str, *done: Round, mounts: int = 1, budget: float = 0.0) -> Choice:
    return plan_next(strategy, done, max_rounds=5, mounts=mounts, downtime_budget_seconds=budget)  # type: ignore[arg-type]


BIG, SMALL, SLOW = Round(10**9, 10.0), Round(1000, 0.2), Round(9 * 10**8, 9.0)


def test_cold_makes_no_round_and_says_that_nothing_is_tracked() -> None:
    choice = plan("cold")
    assert (choice.another_round, choice.strategy, choice.tracked) == (False, "cold", False)


def test_postcopy_lays_out_names_once_and_then_cuts_over() -> None:
    first, second = plan("postcopy"), plan("postcopy", Round(0, 1.0))
    assert (first.another_round, first.contents) == (True, False)
    assert (second.another_round, second.strategy, second.tracked) == (False, "postcopy", True)


def test_precopy_makes_the_rounds_of_hybrid_and_leaves_nothing_to_the_union() -> None:
    for done in ((), (BIG,), (BIG, Round(10**8, 1.0))):
        assert plan("precopy", *done) == plan("hybrid", *done)
    assert plan("precopy", BIG, SMALL).strategy == "precopy"
    assert plan("hybrid", BIG, SMALL).strategy == "hybrid"


def test_the_budget_of_a_request_is_passed_on_with_the_order() -> None:
    assert plan("hybrid", BIG, SMALL, budget=2.5).downtime_budget_seconds == 2.5
    assert plan("hybrid", BIG, SMALL).downtime_budget_seconds == 0


def test_auto_says_why_it_chose_and_never_chooses_a_union_for_no_data() -> None:
    assert plan("auto", mounts=0).strategy == "cold"
    small, large = plan("auto", BIG, SMALL), plan("auto", BIG, SLOW)
    assert small.downtime_budget_seconds == large.downtime_budget_seconds == AUTO_BUDGET_SECONDS
    assert "0.20 s" in small.why
    assert "auto chose" in small.why
    assert "9.00 s" in large.why
    assert "not converging" in large.why
    assert plan("auto", BIG, SMALL, budget=3.0).downtime_budget_seconds == 3.0


@given(st.sampled_from(["hybrid", "postcopy", "precopy", "cold", "auto"]), rounds, st.integers(1, 50))
def test_every_strategy_reaches_the_cut_over_within_its_limit(strategy: str, done: list[Round], limit: int) -> None:
    choice = plan_next(strategy, tuple(done), max_rounds=limit, mounts=1)  # type: ignore[arg-type]
    assert choice.why
    if len(done) >= limit:
        assert not choice.another_round
