"""Logs: JSON by default without a terminal, and never a local variable's value."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from events import logs
from events.settings import LogSettings


@pytest.fixture(autouse=True)
def _own_configuration() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def fail(secret: str) -> None:
    raise RuntimeError("something unexpected")


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_shows_no_values_of_variables(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """F14: a container's environment must not reach a log by way of an error."""
    log = logs.configure(LogSettings(format=form), process="hostd", host="alpha")
    try:
        fail("hunter2" + "hunter2")
    except RuntimeError:
        log.exception("unexpected", migration="m")
    said = capsys.readouterr().err
    assert "something unexpected" in said
    assert "hunter2hunter2" not in said


def test_lines_are_json_with_host_and_process_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(), process="hostd", host="alpha").info("hello", migration="web-7", seq=3)
    line = json.loads(capsys.readouterr().err)
    assert {
        "process": "hostd",
        "host": "alpha",
        "migration": "web-7",
        "seq": 3,
        "event": "hello",
    }.items() <= line.items()


def test_the_level_is_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(level="warning", format="json")).info("quiet")
    assert not capsys.readouterr().err


def test_in_the_journal_a_line_has_its_level_as_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sd-daemon(3) has it; only where standard error is the stream that systemd named, not what has replaced it."""
    journal = tmp_path / "journal"
    with journal.open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        facts = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{facts.st_dev}:{facts.st_ino}")
        log = logs.configure(LogSettings())
        log.info("quiet")
        log.error("loud")
        structlog.reset_defaults()
        monkeypatch.setenv("JOURNAL_STREAM", f"{facts.st_dev}:{facts.st_ino + 1}")
        logs.configure(LogSettings()).error("elsewhere")
    lines = journal.read_text().splitlines()
    assert [line.partition("{")[0] for line in lines] == ["<6>", "<3>", ""]
    assert json.loads(lines[1].removeprefix("<3>"))["event"] == "loud"
