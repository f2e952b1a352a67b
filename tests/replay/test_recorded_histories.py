"""Histories that real migrations left behind, one of each outcome, replayed by whatever version this is.

``histories/`` holds what ``cargoctl export`` wrote in a lab. ``expected/`` holds what each machine makes of it, event by
event; ``python -m tests.replay.test_recorded_histories`` writes it anew, to be reviewed as a diff. A version that reads an
old history differently is a broken version: add a history, never change one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from coordinator import archive, lifecycle
from coordinator.audit import audit
from coordinator.recording import Recording
from coordinator.replay import frames, prove
from events import schema
from events.errors import ChainError, SchemaError
from events.schema import decode_event, decode_head
from hostd import source, target

HISTORIES = Path(__file__).parent / "histories"
EXPECTED = Path(__file__).parent / "expected"
NAMES = sorted(file.stem for file in HISTORIES.glob("*.jsonl"))
OUTCOMES = {
    "aborted": "aborted",
    "aborted-after-the-stop": "aborted",
    "aborted-in-pre-copy": "aborted",
    "aborted-in-prepare": "aborted",
    "aborted-while-stopping": "aborted",
    "completed": "completed",
    "discarded": "rolled_back",
    "finalised": "finalised",
    "layer-finalised": "finalised",
    "layer-rolled-back": "rolled_back",
    "paused": "finalised",
    "rejected": "rejected",
    "removed": "finalised",
    "retried": "completed",
    "rolled-back": "rolled_back",
    "rolled-back-finalised": "rolled_back",
    "rolled-back-in-fill": "rolled_back",
    "target-off": "rolled_back",
}


def load(name: str) -> Recording:
    (only,) = archive.read(HISTORIES / f"{name}.jsonl").values()
    return only


def transcript(recorded: Recording) -> str:
    """What every machine makes of a history, as text."""
    rows = [f"{'':>3} {'event':<18} {'coordinator':<14} {'source':<12} {'target':<18}"]
    for frame in frames(recorded.events()):
        states = f"{frame.after.state:<14} {frame.agents[0].state:<12} {frame.agents[1].state:<18}"
        rows.append(f"{frame.event.seq:>3} {frame.event.type:<18} {states}")
    return "\n".join(row.rstrip() for row in rows) + "\n"


def test_there_is_a_history_of_every_outcome() -> None:
    assert set(NAMES) == set(OUTCOMES)
    assert {decode_head(load(name).head or b"").phase for name in NAMES} == set(lifecycle.TABLE.final)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_history_still_leads_to_where_it_led(name: str) -> None:
    """P5: every later version folds it to the recorded head."""
    recorded = load(name)
    *_, last = frames(recorded.events())
    assert prove(last, decode_head(recorded.head or b"")) == []
    assert last.after.state == OUTCOMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_history_leads_every_machine_through_the_same_states(name: str) -> None:
    """P5, A17: event by event, not only at the end."""
    assert transcript(load(name)) == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_agents_own_machines_agree_with_the_copy_that_is_replayed(name: str) -> None:
    """P5: coordinator, source and target code fold one history to the same states."""
    events = load(name).events()
    *_, last = frames(events)
    assert source.PLAN.fold(events).state == last.agents[0].state
    assert target.PLAN.fold(events).state == last.agents[1].state


@pytest.mark.parametrize("name", NAMES)
def test_folding_twice_gives_the_same_canonical_state(name: str) -> None:
    """P5: a fold depends on nothing but the history."""
    events = load(name).events()
    one, two = (msgspec.json.encode(lifecycle.fold(events), order="deterministic") for _ in range(2))
    assert one == two


@pytest.mark.parametrize("name", NAMES)
def test_every_beginning_of_a_recorded_history_folds(name: str) -> None:
    """P5: an agent that reads it half-way stands where it stood then."""
    events = load(name).events()
    for length in range(1, len(events) + 1):
        *_, last = frames(events[:length])
        assert lifecycle.fold(events[:length]) == last.after


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_in_a_recorded_history(name: str) -> None:
    """P6: what real processes wrote is well formed, answers included."""
    assert audit(load(name)) == []


@pytest.mark.parametrize("name", ["layer-finalised", "layer-rolled-back"])
def test_in_a_history_with_a_writable_layer_its_tree_is_listed_compared_and_carried_back_like_any_other(
    name: str,
) -> None:
    """P5: `/` is a tree in every event that speaks of trees."""
    data = {event.type: event.data for event in load(name).events()}
    prepared, stopped, verified = data["source_prepared"], data["source_stopped"], data["verified"]
    assert isinstance(prepared, schema.SourcePrepared)
    assert isinstance(stopped, schema.SourceStopped)
    assert isinstance(verified, schema.Verified)
    trees = [mount.destination for mount in prepared.mounts]
    assert [mount.kind for mount in prepared.mounts if mount.destination == "/"] == ["rootfs"]
    assert [dirty.destination for dirty in stopped.dirty] == trees
    assert sorted(verified.digests) == sorted(trees)
    back = data.get("target_stopped")
    assert (name == "layer-rolled-back") == isinstance(back, schema.TargetStopped)
    if isinstance(back, schema.TargetStopped):
        assert sorted(row.destination for row in back.trees) == sorted(trees)


# --- what must fail --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tampered_copy_is_refused_and_the_event_is_named(name: str) -> None:
    """P6, B15: one word changed, everything else as it was."""
    good = load(name)
    seq, text = good.texts[0]
    assert b'"source":"alpha"' in text or b"alpha" in text
    forged = replace(good, texts=((seq, text.replace(b"alpha", b"gamma", 1)), *good.texts[1:]))
    with pytest.raises(ChainError):
        forged.events()
    assert {finding.seq for finding in audit(forged) if finding.rule in ("chain", "head")} & {1, 2}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rejected"])
def test_an_event_of_another_version_is_refused_and_not_skipped(name: str) -> None:
    """A17: what is not understood stops the reader."""
    good = load(name)
    seq, text = good.texts[-1]
    strange = json.dumps(json.loads(text) | {"type": "container_teleported"}).encode()
    with pytest.raises(SchemaError):
        decode_event(strange)
    assert "schema" in {finding.rule for finding in audit(replace(good, texts=(*good.texts[:-1], (seq, strange))))}


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    """B13: an export without its last lines is no shorter history."""
    lines = (HISTORIES / "completed.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(archive.FileFormatError, match="cut"):
        archive.read(cut)


if __name__ == "__main__":
    for each in NAMES:
        (EXPECTED / f"{each}.txt").write_text(transcript(load(each)))
        print(EXPECTED / f"{each}.txt")
