"""The decision between another pre-copy round and the cut-over."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy import CONVERGED_BYTES, Round, choose

rounds = st.lists(st.builds(Round, st.integers(0, 10**13), st.floats(0, 1e6)), max_size=60)


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
