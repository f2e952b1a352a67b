"""The benchmark's verdicts on budgets, and the tables of peers, links and services: made from plain figures alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchkit import budgets, link, outage, page, peers, service
from benchkit.checkpoint import reason
from labkit.postgresql import columns

WARM = "outage of a container that stops at once, warm start"


def load(size: int, files: int, outage: float, total: float = 1.0) -> dict[str, Any]:
    """One data set of the case ``outage``; its restart and its rsync take a second each."""
    return {
        "label": f"{size} in {files}",
        "bytes": size,
        "files": files,
        "restart_seconds": [1.0],
        "rsync_seconds": [1.0],
        "idle_total_seconds": [total],
        "kinds": {"idle, warm": {"outage_seconds": [0.1, outage, 9.0]}},
    }


def verdict(what: str, case: str, result: dict[str, Any], scale: str = "full") -> budgets.Verdict:
    """What is said of one budget when nothing but this is recorded."""
    (said,) = [said for said in budgets.verdicts({case: {"scale": scale, "result": result}}) if said.what == what]
    return said


def test_the_worst_data_set_decides_whether_a_budget_is_reached() -> None:
    good, bad = load(1, 10, 0.4), load(1000, 10, 1.6)
    assert verdict(WARM, "outage", {"loads": [good]}).reached
    said = verdict(WARM, "outage", {"loads": [good, bad]})
    assert said.reached is False
    assert said.measured == "0.40 to 1.60 (1000 in 10, idle); 1 of 2 within"


def test_an_outage_is_flat_when_the_largest_data_sets_take_no_longer_than_the_smallest() -> None:
    what = "the same in bytes and files, warm start"
    small, many = load(1, 10, 0.4), load(400, 100_000, 0.44)
    assert verdict(what, "outage", {"loads": [small, many, load(1000, 10, 0.45)]}).reached
    assert verdict(what, "outage", {"loads": [small, many, load(1000, 10, 0.6)]}).reached is False
    assert verdict(what, "outage", {"loads": [small]}).reached is None


def test_many_small_files_have_a_budget_of_their_own() -> None:
    loads = {"loads": [load(1000, 10, 0.4, total=1.1), load(400, 100_000, 0.4, total=1.1)]}
    assert verdict("whole migration, hybrid, idle container", "outage", loads).reached
    assert verdict("the same with 100,000 small files", "outage", loads).reached is False


def test_a_copy_that_is_compared_too_stands_beside_the_budget_and_does_not_replace_it() -> None:
    """A migration compares everything before it lets go of the source; the budget's rsync does not."""
    loads = {"loads": [{**load(1000, 10, 0.4, total=1.5), "compared_seconds": [1.4]}]}
    said = verdict("for comparison: the same where the copy is compared, too, as a migration is", "outage", loads)
    assert (said.measured, said.reached) == ("1.07 (1000 in 10)", True)
    assert verdict("whole migration, hybrid, idle container", "outage", loads).reached is False
    [kept] = loads["loads"]
    kept |= {"acknowledged_records_lost": 0, "kinds": {}}
    [_, totals, _] = outage.tables(loads)
    assert all(len(row) == len(totals.headings) for row in totals.rows)
    assert totals.rows[0][totals.headings.index("ratio to rsync, compared")] == "1.07"


def test_work_on_the_union_is_judged_by_its_slowest_kind() -> None:
    seen = {
        "read": {"values": [120.0, 60.0, 120.0], "plain": [100.0, 100.0, 20.0, 180.0]},
        "write": {"values": [40.0], "plain": [50.0, 50.0]},
    }
    result = {"phases": {"hybrid": seen}}
    said = verdict("work after the release, `hybrid`", "union", result)
    assert (said.measured, said.reached) == ("0.80 (write) to 1.20; 1 of 2 within", False)


def test_a_small_run_does_not_judge_the_budget_of_a_large_fleet() -> None:
    def level(in_flight: int) -> dict[str, Any]:
        return {
            "in_flight": in_flight,
            "restart_seconds": 2.0,
            "rest_cores": 0.1,
            "resident_mib": 90.0,
            "restarted_mib": 95.0,
        }

    small, large = ({"hosts": 200, "levels": [level(1), level(number)]} for number in (100, 1000))
    assert verdict("coordinator: memory", "fleet", small, "quick").reached is None
    assert "with `--quick`" in verdict("coordinator: memory", "fleet", small, "quick").measured
    said = verdict("coordinator: memory", "fleet", large)
    assert (said.measured, said.reached) == ("95 MiB (1,000 in flight, 200 hosts)", True)


def test_nothing_measured_is_neither_reached_nor_missed() -> None:
    assert {(said.measured, said.reached) for said in budgets.verdicts({})} == {("not measured", None)}
    assert budgets.table({}, measured_only=True).rows == []


def test_a_way_that_cannot_be_tried_here_says_why_in_its_row() -> None:
    kept = peers.begun(peers.FULL[0][0])
    kept["restart_seconds"] = [1.0]
    kept["ways"] = {
        "cargo": {"writing": {"outage_seconds": [0.5], "total_seconds": [4.0], "lost": 0}},
        "original": {
            "writing": {"outage_seconds": [2.0], "total_seconds": [9.0], "lost": 0, "second_outage_seconds": [1.5]}
        },
    }
    (table,) = peers.tables({"loads": [kept], "impossible": {"checkpoint": "no CRIU"}, "versions": {}})
    rows = {row[0]: row[1:] for row in table.rows}
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert rows[peers.WAYS["checkpoint"]][0] == "not possible here: no CRIU"
    assert rows[peers.WAYS["commit"]][0] == "not measured"
    assert rows["Cargo"] == ["500", "-", "0.50", "-", "4.0", "0"]
    assert rows[peers.WAYS["original"]][3] == "1500"
    assert "3500" in peers.plots({"loads": [kept]})["peers.svg"]


def test_a_distance_that_cannot_be_made_says_why_in_its_row() -> None:
    links = [{"megabits": 100, "distance_ms": 20.0, "impossible": "no raw sockets"}]
    (table,) = link.tables({"label": "x", "links": links})
    assert table.rows[0][:2] == ["100 Mbit/s, 20 ms away", "not possible here: no raw sockets"]
    assert len(table.rows[0]) == len(table.headings)


def test_each_service_has_a_table_and_two_plots() -> None:
    answers = [(0.1, 0.001), (0.2, 0.003), (0.9, 0.002), (1.1, 0.002)]
    marks = {"requested": 0.15, "cutover_ordered": 0.25, "target_started": 0.8, "completed": 1.0}
    result = {
        "services": [
            {
                "service": name,
                "label": "x",
                "restart_seconds": 0.4,
                "marks": marks,
                "windows": service.windows(answers),
                "phases": service.phases(answers, marks),
            }
            for name in ("Redis", "PostgreSQL")
        ]
    }
    assert [table.title.split()[0] for table in service.tables(result)] == ["Redis", "PostgreSQL"]
    assert set(service.plots(result)) == {
        f"service-{name}-{kind}.svg" for name in ("redis", "postgresql") for kind in ("rate", "latency")
    }


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Warn: x\nError (criu/cr-dump.c): dumping | failed\nbye\n", "Error (criu/cr-dump.c): dumping / failed"),
        ("first\nlast\n", "last"),
        ("", "nothing"),
    ],
)
def test_the_reason_is_the_line_that_speaks_of_an_error_and_fits_into_a_cell(said: str, told: str) -> None:
    assert reason(said) == told


def test_a_row_of_postgresql_has_its_values_in_order_and_absent_ones_empty() -> None:
    body = b"\0\3" + b"\0\0\0\2" + b"42" + b"\xff\xff\xff\xff" + b"\0\0\0\1" + b"x"
    assert columns(body) == ["42", "", "x"]


def test_what_other_guests_took_of_the_processors_stands_beside_the_figures() -> None:
    assert page.taken_by_others((1000, 100), (3000, 260)) == pytest.approx(0.08)
    assert page.taken_by_others((1000, 100), (1000, 100)) == 0.0
    total, taken = page.processor_times()
    assert 0 <= taken <= total
