"""What was opened for a union that did not come about: nothing waits for its end but the cutting of the link."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from structlog.testing import capture_logs

from events.errors import TransientError
from hostd.effects import detach_remote, fill_replica
from hostd.effects.detach_remote import DetachRemote
from hostd.effects.fill_replica import FillReplica


class Held:
    """A plain tree, in whose view somebody's shell stands for so many attempts to take it down."""

    federable = True

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.done: list[str] = []

    def state(self) -> Any:
        return SimpleNamespace(settled=True)

    def put_away(self) -> None:
        if self.attempts:
            self.attempts -= 1
            raise TransientError("the view is in use by pid 17")
        self.done.append("put away")

    def detach_remote(self) -> None:
        self.done.append("detached")


def surroundings(monkeypatch: pytest.MonkeyPatch, held: Held) -> Any:
    for module in (detach_remote, fill_replica):
        monkeypatch.setattr(module, "arrivals", lambda _context: [SimpleNamespace(union=held)])
    monkeypatch.setattr(detach_remote, "peer_of_source", lambda _context: "alpha")
    monkeypatch.setattr(detach_remote, "LOOK_AGAIN_SECONDS", 0.0)
    return SimpleNamespace(
        log=structlog.get_logger(),
        progress=lambda _fields: None,
        check_cancelled=lambda: None,
        cancelled=SimpleNamespace(wait=lambda _seconds: None),
        bench=SimpleNamespace(transport=SimpleNamespace(let_go=lambda _peer: held.done.append("let go"))),
    )


def test_the_fill_of_a_plain_tree_ends_while_somebody_stands_in_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """P12: a way back begins with the same effect, and must not wait for a stranger's shell."""
    held = Held(attempts=1)
    context = surroundings(monkeypatch, held)
    with capture_logs() as logs:
        outcome = FillReplica().run(cast(Any, context))
    assert outcome is not None
    assert outcome["files"] == 0
    assert [line["reason"] for line in logs if line["log_level"] == "warning"] == ["the view is in use by pid 17"]


def test_the_link_is_cut_only_when_it_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """P11: after this the source may be switched off."""
    held = Held(attempts=2)
    context = surroundings(monkeypatch, held)
    DetachRemote().run(cast(Any, context))
    assert held.done == ["put away", "detached", "let go"]


def test_a_link_that_cannot_be_cut_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(attempts=10**9)
    context = surroundings(monkeypatch, held)
    monkeypatch.setattr(detach_remote, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(TransientError, match="pid 17"):
        DetachRemote().run(cast(Any, context))
    assert held.done == []
