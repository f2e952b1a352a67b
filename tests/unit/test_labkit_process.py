"""Daemons as objects, with real processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.errors import LabError
from labkit.leftovers import marked_processes
from labkit.process import Process, process_state
from labkit.waiting import wait_until


@pytest.fixture
def made() -> Iterator[list[Process]]:
    """Processes that a test made; ended afterwards."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


def daemon(made: list[Process], directory: Path, *argv: str, ready_seconds: float = 10) -> Process:
    process = Process(
        "sleeper",
        argv or ("sleep", "600"),
        log=directory / "log",
        record=directory / "record.json",
        mark=str(directory),
        ready_seconds=ready_seconds,
    )
    made.append(process)
    return process


def test_it_runs_until_killed_and_is_found_by_its_mark_meanwhile(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path)
    assert process.pid is None
    process.start()
    assert process.running
    assert marked_processes(tmp_path) == [process.pid]
    process.kill()
    assert not process.running
    assert marked_processes(tmp_path) == []


def test_starting_it_again_changes_nothing(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path)
    process.start()
    first = process.pid
    process.start()
    assert process.pid == first


def test_another_object_over_the_same_record_handles_the_same_process(made: list[Process], tmp_path: Path) -> None:
    daemon(made, tmp_path).start()
    other = daemon(made, tmp_path)
    assert other.running
    other.kill()
    assert not made[0].running


def test_a_frozen_process_stands_still_and_goes_on_when_thawed(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path)
    process.start()
    process.freeze()
    pid = process.pid
    assert pid is not None
    assert process_state(pid) == "T"
    process.thaw()
    wait_until(lambda: process_state(pid) == "S", "it does not go on", 10)


def test_one_that_ignores_the_polite_signal_is_killed_and_said_so(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path, "sh", "-c", "trap '' TERM; echo armed; while :; do sleep 600; done")
    process.start()
    wait_until(lambda: "armed" in process.log_tail(), "it does not arm", 10)
    assert process.stop(timeout_seconds=0.2) is False
    assert not process.running


def test_one_that_ends_politely_is_said_to_have(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path)
    process.start()
    assert process.stop() is True


def test_a_command_that_does_not_exist_is_an_error_with_its_name(made: list[Process], tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"could not start no-such-command.*No such file"):
        daemon(made, tmp_path, "no-such-command").start()


def test_a_death_at_the_start_is_told_with_the_end_of_the_log(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path, "sh", "-c", "echo the reason >&2; exit 3")
    process._ready = lambda: False
    with pytest.raises(LabError, match=r"(?s)ended right after its start.*the reason"):
        process.start()


def test_one_that_never_gets_ready_is_told_in_time(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path, ready_seconds=0.2)
    process._ready = lambda: False
    began = time.monotonic()
    with pytest.raises(LabError, match="sleeper is not ready"):
        process.start()
    assert time.monotonic() - began < 10


def test_a_reused_pid_is_not_taken_for_the_process(made: list[Process], tmp_path: Path) -> None:
    process = daemon(made, tmp_path)
    (tmp_path / "record.json").write_text(f'{{"pid": {os.getpid()}, "started_ticks": 1}}')
    assert not process.running
    process.kill()  # must not be us


def test_its_environment_holds_what_was_given_and_nothing_of_the_callers(
    made: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///elsewhere")
    process = daemon(made, tmp_path, "sh", "-c", "env; echo end; exec sleep 600")
    process.env["LASTING"] = "1"
    process.start(env={"ONCE": "2"})
    wait_until(lambda: "end" in process.log_tail(), "it prints nothing", 10)
    lines = process.log_tail().splitlines()
    assert {"LASTING=1", "ONCE=2"} <= set(lines)
    assert not any(line.startswith("DOCKER_HOST") for line in lines)
