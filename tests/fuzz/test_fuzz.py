"""F2: a few thousand inputs of every kind, in every run of the tests. ``scripts/fuzz`` gives as many as one likes."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from events.errors import PermanentError
from tests.fuzz import bus, campaign, hosts, trees, trust
from tests.fuzz.campaign import Report, Target
from tests.fuzz.mutation import make

INPUTS_A_WEIGHT = 150
PEAK_BYTES = 64 * 1024**2
WITHOUT_ROOT = [*bus.TARGETS, *hosts.TARGETS, *trust.TARGETS]


def assert_borne(target: Target, tmp_path: Path) -> None:
    report = campaign.run(target, INPUTS_A_WEIGHT * target.weight, seed=20)
    kept = campaign.keep(report, tmp_path)
    assert not report.findings, f"{report.findings.keys()}; scripts/fuzz --replay {' '.join(map(str, kept))}"
    assert report.inputs == INPUTS_A_WEIGHT * target.weight


@pytest.mark.parametrize("target", WITHOUT_ROOT, ids=lambda target: target.name)
def test_no_input_gets_more_out_of_a_reader_than_an_error_with_words(target: Target, tmp_path: Path) -> None:
    """F2: whoever wrote it."""
    assert_borne(target, tmp_path)


@pytest.mark.root
def test_no_manifest_leads_out_of_the_tree_that_it_is_applied_to(tmp_path: Path) -> None:
    """D19: whatever symlinks, links and devices lie there."""
    assert_borne(trees.TARGETS[0], tmp_path)


def test_the_good_inputs_are_taken() -> None:
    """A target that refuses everything would find nothing."""
    for target in WITHOUT_ROOT:
        assert any(campaign.attempt(target, seed) == (True, "") for seed in target.seeds), target.name


def test_an_input_is_the_same_whenever_it_is_made() -> None:
    target = bus.TARGETS[0]
    once = list(campaign.inputs(target, 5, 40))
    assert once[20:] == list(campaign.inputs(target, 5, 20, first=20))
    assert once != list(campaign.inputs(target, 6, 40))
    assert len(set(once)) > 30


def test_what_is_found_is_kept_and_can_be_given_again(tmp_path: Path) -> None:
    """The campaign itself: a reader with a bug is found out, once for each kind of bug."""

    def fragile(raw: bytes) -> None:
        if len(raw) > 3:
            raise ValueError("too long")
        if not raw:
            raise PermanentError("empty")

    target = Target("fragile", fragile, [b"", b"abc", b"abcdef"])
    report = campaign.run(target, 200)
    assert list(report.findings) == ["ValueError in test_fuzz.py:fragile"]
    [file] = campaign.keep(report, tmp_path)
    assert file.name.startswith("fragile-")
    assert campaign.attempt(target, file.read_bytes())[1] == "ValueError in test_fuzz.py:fragile"
    assert campaign.keep(Report("fragile"), tmp_path / "nothing") == []


@pytest.mark.parametrize("form", ["bytes", "json", "msgpack"])
def test_every_form_of_input_is_changed_in_ways_that_differ(form: str) -> None:
    seeds = {"bytes": b"hello", "json": b'{"a":[1,{"b":"c"}]}', "msgpack": b"\x81\xa1a\x92\x01\xa1b"}
    made = {make([seeds[form]], form, random.Random(number)) for number in range(200)}  # type: ignore[arg-type]
    assert len(made) > 100


@pytest.mark.parametrize("name", ["words", "manifest", "request", "tar", "event"])
def test_an_input_without_end_costs_memory_in_proportion_at_most(name: str) -> None:
    """D13: what is refused for its size is not taken in first."""
    target = next(one for one in WITHOUT_ROOT if one.name == name)
    raw = target.seeds[0] + b"7" * (4 * 1024**2)
    tracemalloc.start()
    try:
        campaign.attempt(target, raw)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
