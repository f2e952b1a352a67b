"""What the target does about the remainder when it has asked the view of the source for it first."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from events import schema
from hostd.effects import apply_dirty
from hostd.effects.apply_dirty import ApplyDirty
from hostd.manifest import Entry
from hostd.placement import Applied, Placeholder
from hostd.plan import View
from hostd.remainder import AT_HAND_SECONDS
from tests.support.histories import REF
from tests.unit.test_remainder import stale, view

STALE = Entry(path=b"file", kind="f", size=4, stale=True)


class Tree:
    """An arrival with its union; ``apply`` asks for the one stale file."""

    def __init__(self, destination: str = "/data", *, placed: bool = False, settled: bool = False) -> None:
        self.mount = SimpleNamespace(destination=destination, single_file=False)
        self.union = self
        self.layer, self.federable, self.stage = False, True, Path("/stage") / destination.strip("/")
        self._state = SimpleNamespace(placed=placed, settled=settled)
        self.applied: list[tuple[bool, bool]] = []
        """Of each application, whether the view was asked, and whether the file got a placeholder."""

    def state(self) -> Any:
        return self._state

    def apply(self, entries: list[Entry], *, everything: bool, contents: Any = None) -> Applied:
        wanted = [(entry.path, entry.size) for entry in entries if entry.stale]
        given = contents(wanted) if contents is not None and wanted else {}
        holders = [Placeholder(path, size) for path, size in wanted if path not in given]
        self.applied.append((contents is not None, bool(holders)))
        return Applied(placeholders=holders)


class Run:
    """One performance of the effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seen: View, *trees: Tree, gives: bool) -> None:
        self.seconds: list[float] = []
        """What was left for the view, each time it was asked."""
        self.rounds = 0

        def read(_stage: Path, wanted: list[tuple[bytes, int]], deadline: float) -> dict[bytes, bytes]:
            self.seconds.append(deadline - time.monotonic())
            if gives:
                return {path: b"here" for path, _ in wanted}
            while time.monotonic() < deadline:  # it hangs
                pass
            return {}

        def bring(_context: object, _arrival: object, entries: list[Entry]) -> list[Entry]:
            self.rounds += 1
            return [Entry(path=entry.path, kind="f", size=entry.size) for entry in entries]

        for name in ("ensure_layer", "remember_dirty_directories"):
            monkeypatch.setattr(apply_dirty, name, lambda *_: None)
        monkeypatch.setattr(apply_dirty, "arrivals", lambda _context: trees)
        monkeypatch.setattr(apply_dirty, "entries_of", lambda *_: [STALE])
        monkeypatch.setattr(apply_dirty, "read_at_hand", read)
        monkeypatch.setattr(apply_dirty, "_bring", bring)
        context = SimpleNamespace(view=seen, log=structlog.get_logger())
        outcome = ApplyDirty().run(cast(Any, context))
        assert outcome is not None
        self.kind, self.why = outcome["remainder"], outcome["remainder_why"]


def test_what_the_view_gives_in_time_needs_no_union_and_the_history_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree()
    run = Run(monkeypatch, view(stale(4, 1)), tree, gives=True)
    assert (run.kind, run.why) == (
        "finished",
        "4 bytes in 1 files were read through the open view while the container was stopped",
    )
    assert tree.applied == [(True, False)]


def test_what_does_not_come_in_time_is_federated(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree()
    run = Run(monkeypatch, view(stale(4, 1)), tree, gives=False)
    assert (run.kind, run.why) == ("federated", "4 bytes in 1 files follow while the container runs")
    assert tree.applied == [(True, True)]


def test_what_does_not_come_in_time_is_brought_by_a_last_round_where_the_budget_allows_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = Tree()
    seen = view(stale(4, 1), ordered={"downtime_budget_seconds": 10.0})
    run = Run(monkeypatch, seen, tree, gives=False)
    assert (run.kind, "downtime budget" in run.why) == ("finished", True)
    assert tree.applied == [(True, True), (False, False)]
    assert run.rounds == 1


@pytest.mark.parametrize(
    ("seen", "kind", "rounds"),
    [
        (view(stale(4, 1), kib=100), "federated", 0),
        (view(stale(4, 1), strategy="postcopy"), "federated", 0),
        (view(stale(4, 1), strategy="precopy"), "finished", 1),
    ],
)
def test_the_view_is_not_asked_where_it_is_limited_not_wanted_or_not_open(
    monkeypatch: pytest.MonkeyPatch, seen: View, kind: str, rounds: int
) -> None:
    run = Run(monkeypatch, seen, Tree(), gives=True)
    assert (run.kind, run.rounds, run.seconds) == (kind, rounds, [])


def test_a_view_that_hangs_takes_the_moment_that_all_trees_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: or a container with many volumes would be down for as many moments."""
    names = ("/one", "/two", "/three")
    mounts = tuple(schema.Mount(kind="volume", name=n[1:], destination=n, tree=f"/v{n}") for n in names)
    seen = view(*(stale(4, 1, name) for name in names), mounts=mounts)
    run = Run(monkeypatch, seen, *(Tree(name) for name in names), gives=False)
    assert len(run.seconds) == 3
    assert sum(max(0.0, seconds) for seconds in run.seconds) <= AT_HAND_SECONDS
    assert run.kind == "federated"


@pytest.mark.parametrize(("state", "kind"), [({"settled": True}, "finished"), ({"placed": True}, "federated")])
def test_what_was_mounted_before_a_crash_is_left_and_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, bool], kind: str
) -> None:
    """A1: the step is done again; what it came to lies there."""
    tree = Tree(**state)
    run = Run(monkeypatch, view(stale(4, 1)), tree, gives=True)
    assert (run.kind, tree.applied) == (kind, [])


def test_what_a_last_round_has_brought_before_a_crash_is_not_said_to_have_been_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = view(stale(4, 1), ordered={"downtime_budget_seconds": 10.0})
    run = Run(monkeypatch, seen, Tree(settled=True), gives=True)
    assert (run.kind, "downtime budget" in run.why) == ("finished", True)


def test_the_list_of_a_tree_is_needed_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = schema.DirtyManifest(destination="/other", manifest=REF, stale_files=1, stale_bytes=4)
    with pytest.raises(apply_dirty.PermanentError, match="no list of changes of /data"):
        Run(monkeypatch, view(dirty), Tree(), gives=True)
