"""P19: the simulator finds deliberate defects."""

import pytest

from tests.simulation.planted import BUGS, Bug
from tests.simulation.scheduler import run_seed

MAX_SEEDS = 3000
"""Within which each is to be found. The seed that found it last is tried first."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_defect_is_caught(bug: Bug) -> None:
    """P19: ..., by one of the invariants that it breaks."""
    found = bug.hunt(range(bug.seed, bug.seed + 1)) or bug.hunt(range(MAX_SEEDS))
    assert found is not None, f"{bug.words}: not noticed in {MAX_SEEDS} worlds"
    assert found.rule in bug.rules, found.words
    assert found.transcript


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_without_the_defect_the_same_world_is_sound(bug: Bug) -> None:
    assert run_seed(bug.seed, bug.aim).good
