"""The benchmark's arithmetic and page: what people read is made from the recorded figures alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchkit import page
from benchkit.case import Case
from benchkit.cli import CASES, main
from benchkit.figures import Table, percentile, ratio, spread
from benchkit.plots import bars, lines
from benchkit.service import phases, windows
from benchkit.stage import Load, write_load


def test_a_series_is_shown_as_its_median_and_its_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"
    assert spread([2.0]) == "2.0"
    assert spread([]) == "-"


def test_a_ratio_is_of_medians_and_absent_without_a_baseline() -> None:
    assert ratio([1.0, 3.0, 100.0], [2.0, 2.0, 0.1]) == "1.50"
    assert ratio([1.0], []) == ratio([1.0], [0.0]) == "-"


@pytest.mark.parametrize(("percent", "value"), [(50, 2.0), (99, 4.0), (100, 4.0), (1, 1.0)])
def test_a_percentile_is_a_value_that_occurred(percent: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == value


def test_there_is_no_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 50))


def test_a_load_has_the_bytes_and_files_it_says(tmp_path: Path) -> None:
    write_load(tmp_path / "load", Load(1003, 3))
    sizes = [file.stat().st_size for file in (tmp_path / "load").rglob("*") if file.is_file()]
    assert sizes == [334] * 3


def test_a_window_without_answers_shows_as_zero_and_the_longest_gap_as_the_cut_over() -> None:
    answers = [(0.1, 0.001), (0.2, 0.003), (0.9, 0.002), (1.1, 0.002)]
    found = windows(answers)
    assert found["requests_per_second"] == [8.0, 0.0, 0.0, 4.0]
    marks = {"requested": 0.15, "cutover_ordered": 0.25, "target_started": 0.8, "completed": 1.0}
    assert phases(answers, marks)[2]["seconds"] == pytest.approx(0.7)


def test_plots_fetch_nothing_from_elsewhere() -> None:
    for svg in (
        bars("b", ["x"], {"a": [1.0], "none": [None]}),
        lines("l", "s", {"a": [(0, 1.0), (1, None), (2, 3.0)]}),
    ):
        assert svg.lstrip().startswith(("<?xml", "<svg"))
        assert "<script" not in svg
        assert 'href="http' not in svg


def test_a_recorded_case_takes_its_place_on_the_page_and_leaves_the_others(tmp_path: Path) -> None:
    case = Case(
        name="one",
        title="One case",
        about="About it.",
        run=lambda _setting: {},
        tables=lambda result: [Table("Times", ("what", "ms"), [["it", str(result["ms"])]], ["A note."])],
        quick_seconds=60,
        full_seconds=120,
        plots=lambda _result: {"one.svg": "<svg/>"},
    )
    kept = page.recorded(case, "quick", 1.25, {"ms": 7}, page.machine())
    page.write_figures(tmp_path / page.FIGURES, {"other": {"result": {}}, "one": kept})
    page.write([case], tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    assert "| it | 7 |" in text
    assert "`--quick`" in text
    assert (tmp_path / page.PLOTS / "one.svg").read_text() == "<svg/>"
    assert set(json.loads((tmp_path / page.FIGURES).read_text())) == {"other", "one"}


def test_the_page_in_the_documentation_is_what_the_recorded_figures_say() -> None:
    figures = page.read_figures(page.DOCS / page.FIGURES)
    assert (page.DOCS / page.PAGE).read_text() == page.page(CASES, figures), "run: scripts/bench --page"


def test_an_unknown_case_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"]) == 2
    assert "--list" in capsys.readouterr().err


def test_the_whole_benchmark_fits_into_the_time_that_the_page_promises() -> None:
    assert sum(case.full_seconds for case in CASES) <= 35 * 60
    assert sum(case.quick_seconds for case in CASES) <= 8 * 60
