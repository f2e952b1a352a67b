"""A container is stopped for the fold of its union only when the fold will be able to begin."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from events.errors import TransientError
from hostd import mounts
from hostd.effects import fold_union
from hostd.mounts import process_of


def test_a_container_is_not_stopped_for_a_fold_while_another_one_uses_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """F9: it was stopped first, and stayed down until the other one was gone."""
    done: list[str] = []

    def refused(container_id: str) -> None:
        done.append(f"asked for {container_id}")
        raise TransientError("the union is still in use by another container")

    union = SimpleNamespace(federable=True, state=lambda: SimpleNamespace(settled=False), require_alone=refused)
    engine = SimpleNamespace(pid=lambda _id: 17, stop=lambda _id: done.append("stopped"))
    monkeypatch.setattr(fold_union, "arrivals", lambda _context: [SimpleNamespace(union=union)])
    monkeypatch.setattr(fold_union, "our_container", lambda _context: "c")
    monkeypatch.setattr(fold_union, "_ordered", lambda _context: True)
    monkeypatch.setattr(fold_union, "note_our_stop", lambda _context: done.append("noted"))
    context = SimpleNamespace(bench=SimpleNamespace(engine=engine))
    with pytest.raises(TransientError, match="another container"):
        fold_union.FoldUnion().run(cast(Any, context))
    assert done == ["asked for c"]


def test_a_process_is_a_containers_by_its_cgroup_and_one_that_has_ended_is_nobodys_hindrance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that has made a mount namespace of its own inside."""
    monkeypatch.setattr(mounts.Path, "read_text", lambda _path: "0::/system.slice/docker-abc123.scope/init\n")
    assert process_of(17, "abc123")
    assert not process_of(17, "def456")
    monkeypatch.undo()
    assert not process_of(os.getpid(), "abc123")
    assert process_of(2**22 + 1, "abc123")
