"""Logs: JSON by default without a terminal, and never a local variable's value."""

import json
from collections.abc import Iterator

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
