"""The benchmark's cases that need no Docker hosts, at their smallest: they measure, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchkit import bus, fleet
from benchkit.case import Case, Setting
from benchkit.stage import Stage

pytestmark = pytest.mark.etcd


def no_stage() -> Stage:
    raise AssertionError("this case needs no lab")


@pytest.mark.parametrize("case", [bus.CASE, fleet.CASE], ids=lambda case: case.name)
def test_a_case_without_hosts_measures_and_cleans_up(case: Case) -> None:
    before = set(Path("/var/tmp").glob("cargo-bench-*"))
    result = case.run(Setting("tiny", print, no_stage))
    for table in case.tables(result):
        assert table.rows
        assert all(len(row) == len(table.headings) for row in table.rows)
    case.plots(result)
    assert [found["unseen"] for found in result.get("rates", [])] in ([], [0])
    assert set(Path("/var/tmp").glob("cargo-bench-*")) == before
