"""Faults on demand: their notation, and what they do."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import CargoError, TransientError
from events.failpoints import Failpoints, parse


def test_an_unset_point_does_nothing() -> None:
    Failpoints().hit("target.start_container:after_effect")


def test_an_error_is_raised_on_the_nth_pass_only() -> None:
    points = Failpoints("source.stop:before_event=error(no luck)@2")
    points.hit("source.stop:before_event")
    with pytest.raises(TransientError, match="no luck"):
        points.hit("source.stop:before_event")
    points.hit("source.stop:before_event")


def test_kill_ends_the_process_on_the_spot() -> None:
    code = "from events.failpoints import Failpoints; Failpoints('a.b:c=kill').hit('a.b:c'); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL
    assert not done.stdout


def test_a_pause_ends_when_the_failpoint_is_taken_away() -> None:
    points = Failpoints("a.b:c=pause")
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (points.hit("a.b:c"), passed.set()), daemon=True)
    thread.start()
    assert not passed.wait(0.05)
    points.set("")
    assert passed.wait(5)
    thread.join(5)


@pytest.mark.parametrize("text", ["nonsense", "a.b:c=explode", "a.b:c=delay(soon)", "a.b:c=kill@x"])
def test_a_mistake_is_quoted(text: str) -> None:
    with pytest.raises(CargoError, match=r"nonsense|a\.b:c"):
        parse(text)


@given(st.text(max_size=200))
def test_no_specification_crashes_the_parser(text: str) -> None:
    try:
        parse(text)
    except CargoError:
        return
