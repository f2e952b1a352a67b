"""The list of faults and tests is made from what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from coveragekit.__main__ import MARK, ROWS, catalogue, checks_in, known_rows, last_results, page, results_in

SUITE = '''
def test_one():
    """D12: an overflow compares."""

def test_two():
    """P6, B15: two rows."""

class TestMore:
    def test_three(self):
        """Says P6 later, which does not count."""
'''


@pytest.mark.parametrize(
    ("docstring", "rows"), [("D12: x", "D12"), ("P6, B15: x", "P6, B15"), ("D15 D16: x", "D15 D16"), ("D1 to D3", None)]
)
def test_a_docstring_names_rows_only_before_its_first_colon(docstring: str, rows: str | None) -> None:
    found = MARK.match(docstring)
    assert (found[1] if found else None) == rows


def test_tests_are_listed_under_the_rows_that_they_name(tmp_path: Path) -> None:
    suite = tmp_path / "tests"
    suite.mkdir()
    (suite / "test_x.py").write_text(SUITE)
    tests = checks_in(suite)
    assert {test.name: test.rows for test in tests} == {
        "test_one": ("D12",),
        "test_two": ("P6", "B15"),
        "test_three": (),
    }
    text = page(
        {"P6": "well formed", "D12": "overflow", "D13": "many files"},
        tests,
        {("tests/test_x.py", "test_one"): "failed"},
    )
    assert "2 of 3 rows" in text
    assert "| D12 | overflow | `test_x.py` one | 1 failed |" in text
    assert "| D13 | many files | - |" in text
    assert "in no row: B15" in text


def test_a_catalogue_is_read_row_by_row(tmp_path: Path) -> None:
    file = tmp_path / "FAULTS.md"
    file.write_text("# x\n| # | Fault | Expected |\n|---|---|---|\n| A1 | **SIGKILL** of `x` | y |\n| P19 | z | w |\n")
    assert catalogue(file) == {"A1": "SIGKILL of x", "P19": "z"}


def test_the_worst_case_of_a_test_counts(tmp_path: Path) -> None:
    file = tmp_path / "r.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="tests.unit.test_x" name="test_a[1]"/>'
        '<testcase classname="tests.unit.test_x" name="test_a[2]"><failure/></testcase></testsuite></testsuites>'
    )
    assert results_in(file) == {("tests/unit/test_x.py", "test_a"): "failed"}


def test_the_list_of_rows_is_complete_without_the_catalogue() -> None:
    assert ROWS.exists()
    assert len(known_rows()) > 120


def test_what_ran_last_counts_and_a_run_of_a_part_leaves_the_rest(tmp_path: Path) -> None:
    case = '<testsuite><testcase classname="tests.unit.test_x" name="{}">{}</testcase></testsuite>'
    runs = [("test_a", "<failure/>"), ("test_b", ""), ("test_a", "")]
    files = [tmp_path / f"{number}.xml" for number in range(len(runs))]
    for file, (name, outcome) in zip(files, runs, strict=True):
        file.write_text(case.format(name, outcome))
    assert last_results(files) == {("tests/unit/test_x.py", name): "passed" for name in ("test_a", "test_b")}
