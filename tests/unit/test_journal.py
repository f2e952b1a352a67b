"""B13: a host notices that the bus went back in time."""

from pathlib import Path

import pytest

from events.errors import ChainError
from hostd.journal import Journal
from tests.support.histories import History


def test_a_history_that_goes_on_is_accepted(tmp_path: Path) -> None:
    journal, history = Journal(tmp_path), History().up_to("source_prepared")
    journal.check("m", history.events)
    journal.note("m", history.events[-1])
    history.add("target_prepared")
    journal.check("m", history.events)


def test_a_history_that_lost_its_tail_is_not_acted_upon(tmp_path: Path) -> None:
    """B13, E26: restored from an older snapshot."""
    journal, history = Journal(tmp_path), History().up_to("target_started")
    journal.note("m", history.events[-1])
    with pytest.raises(ChainError, match="older state"):
        journal.check("m", history.events[:4])


def test_a_history_that_was_written_anew_is_not_acted_upon(tmp_path: Path) -> None:
    """B13: the same length, another content."""
    journal = Journal(tmp_path)
    journal.note("m", History().up_to("source_stopped").events[-1])
    other = History()
    for name in History().up_to("source_stopped").events:
        other.add(name.data, boot="another")
    with pytest.raises(ChainError):
        journal.check("m", other.events)


def test_a_forgotten_or_damaged_note_costs_only_the_check(tmp_path: Path) -> None:
    journal, history = Journal(tmp_path), History().up_to("target_started")
    journal.note("m", history.events[-1])
    (tmp_path / "m.json").write_bytes(b"{")
    journal.check("m", history.events[:2])
    journal.forget("m")
    journal.forget("m")
