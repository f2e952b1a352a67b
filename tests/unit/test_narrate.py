"""Words for people: every event has some, and none of them can steer a terminal."""

from __future__ import annotations

import math

import msgspec
import pytest

from coordinator.narrate import doing, duration, progress, seconds_between, size, words
from coordinator.timeline import line_of, printable
from events import schema
from events.agent_tables import AGENTS
from tests.support import played
from tests.support.histories import SAMPLES, History

SAY_NOTHING = frozenset(
    {"prepare_ordered", "release_ordered", "completed", "aborted", "rolled_back", "target_cleaned", "paused", "resumed"}
    | {"finalise_ordered"}
)
"""Their names say it all; a person's words are shown where there are any."""


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - SAY_NOTHING))
def test_an_event_with_something_to_say_says_it(name: str) -> None:
    assert words(SAMPLES[name])


def test_a_persons_words_are_shown() -> None:
    assert "vacation" in words(schema.Paused(by_person="vacation"))
    assert "there is room now" in words(schema.Resumed(by_person="there is room now"))
    assert "ada" in words(SAMPLES["target_asserted_off"])


def test_the_timeline_shows_number_time_author_type_and_words() -> None:
    events = played.completed().events
    line = line_of(events[3], events[0]).plain
    assert line.split()[:6] == ["4", "+3.000", "s", "hostd/beta", "target_prepared", "container"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, äöü, 漢字", "plain, äöü, 漢字"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\u202eright to left", "\\u202eright to left"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_could_steer_a_terminal_is_written_out(text: str, shown: str) -> None:
    """D19: names and messages from other hosts are data, also on a terminal."""
    assert printable(text) == shown


def test_an_event_from_a_hostile_host_stays_on_its_line() -> None:
    """D19: no event can forge another line of the timeline."""
    history = History().up_to("prepare_ordered")
    failed = SAMPLES["step_failed"]
    history.add(msgspec.structs.replace(failed, reason="\n   9 completed \x1b[2J [/bold]"), by="hostd/beta")  # type: ignore[call-overload]
    line = line_of(history.events[-1], history.events[0]).plain
    assert "\n" not in line
    assert "\x1b" not in line


def test_times_that_cannot_be_read_do_not_hurt() -> None:
    """Clocks are for people; a strange one is shown as such."""
    events = played.completed().events
    strange = msgspec.structs.replace(events[1], at="yesterday")
    assert math.isnan(seconds_between(events[0], strange))
    assert "?" in line_of(strange, events[0]).plain


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (412_000_000, "412 MB"), (5e15, "5000.0 TB")]
)
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(1, "1 s"), (240, "4 min"), (7300, "2 h"), (864000, "10 days")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize("step", sorted({step.name for agent in AGENTS.values() for step in agent.steps.values()}))
def test_every_step_of_an_agent_is_told_in_words(step: str) -> None:
    assert doing(f"{step}: and what it does") != f"{step}: and what it does"


def test_progress_is_told_in_words_and_what_is_not_known_is_shown_as_it_is() -> None:
    fields = {
        "step": "fill",
        "mount": "/data",
        "bytes": 12_000_000,
        "rate_bytes_per_second": 4_000_000,
        "remaining_seconds": 5.0,
        "safe_to_switch_off_source": False,
        "mood": "good",
    }
    assert progress(fields) == "fill, /data, 12.0 MB moved, 4.0 MB/s, about 5 s left, mood good"
    assert progress({"safe_to_switch_off_source": True}) == "the source may be switched off"


@pytest.mark.parametrize("value", [None, "many", [1], {"a": 1}, math.nan, math.inf, 10**400, -1])
def test_progress_of_a_strange_kind_does_not_hurt(value: object) -> None:
    assert progress({"bytes": value, "remaining_seconds": value})
