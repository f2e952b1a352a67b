"""The views of the source, opened beside everything else before the stop."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from events.errors import CancelledError, TransientError
from events.schema import Requested, Strategy
from hostd import target
from hostd.effects import attach_remote
from hostd.effects.attach_remote import AttachRemote
from hostd.effects.base import Context
from hostd.effects.open_views import OpenViews
from hostd.opening import Opening
from tests.support.histories import SAMPLES, History


class Sight:
    """One tree's view: opening it takes until ``may_open`` is set, and may fail so many times first."""

    def __init__(self) -> None:
        self.may_open = threading.Event()
        self.begun = threading.Event()
        self.calls = 0
        self.failures = 0
        self.opened = 0
        self.union = SimpleNamespace(
            federable=True, state=lambda: SimpleNamespace(settled=False, remote=self.opened > 0)
        )

    def attach_remote(self, context: Context) -> None:
        self.calls += 1
        self.begun.set()
        while not self.may_open.wait(0.001):
            context.check_cancelled()
        if self.failures:
            self.failures -= 1
            raise TransientError("the source is away")
        self.opened += 1


@pytest.fixture
def sight(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sight]:
    made = Sight()
    monkeypatch.setattr(attach_remote, "volume_arrivals", lambda _context: [made])
    yield made
    made.may_open.set()


def at(last: str, strategy: Strategy = "hybrid") -> Context:
    """The target after the first event of that type."""
    bench = SimpleNamespace(openings={}, boot="a-life", settings=SimpleNamespace(name="beta"))
    history = History()
    requested = cast(Requested, SAMPLES["requested"])
    history.add(
        msgspec.structs.replace(requested, request=msgspec.structs.replace(requested.request, strategy=strategy))
    )
    for event in History().up_to(last).events[1:]:
        history.add(event.data)
    view = target.PLAN.fold(history.events)
    return Context(
        migration="web-7",
        view=view,
        bench=bench,  # type: ignore[arg-type]
        cancelled=threading.Event(),
        log=structlog.get_logger(),
    )


def beside(context: Context, other: Context) -> Context:
    """``context`` in the same life of the agent as ``other``."""
    return dataclasses.replace(context, bench=other.bench)


def test_the_step_goes_on_while_a_view_is_being_opened_and_the_stop_waits_for_it(sight: Sight) -> None:
    preparing = at("source_prepared")
    assert OpenViews().run(preparing) is None
    assert sight.begun.wait(10) and not sight.opened
    preparing.cancelled.set()  # its step is over: the opening has nothing to do with that
    braced = beside(at("brace_ordered"), preparing)
    waiting = threading.Thread(target=AttachRemote().run, args=(braced,), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and sight.calls == 1, "it waits, and opens nothing itself meanwhile"
    sight.may_open.set()
    waiting.join(10)
    assert not waiting.is_alive() and sight.opened
    assert not braced.bench.openings


def test_what_could_not_be_opened_beside_the_rounds_is_told_and_opened_before_the_stop(sight: Sight) -> None:
    sight.failures = 1
    sight.may_open.set()
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    with capture_logs() as logs:
        AttachRemote().run(beside(at("brace_ordered"), preparing))
    assert sight.opened == 1
    assert [line["reason"] for line in logs if line["log_level"] == "warning"] == ["the source is away"]


def test_a_view_that_cannot_be_opened_at_all_fails_the_step_that_needs_it(sight: Sight) -> None:
    sight.failures = 2
    sight.may_open.set()
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    with pytest.raises(TransientError, match="away"):
        AttachRemote().run(beside(at("brace_ordered"), preparing))


def test_waiting_ends_when_the_step_is_no_longer_wanted(sight: Sight) -> None:
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    braced = beside(at("brace_ordered"), preparing)
    braced.cancelled.set()
    with pytest.raises(CancelledError):
        AttachRemote().run(braced)
    assert preparing.bench.openings, "whoever cleans up must find it"


def test_an_abort_waits_until_nothing_is_being_mounted_any_more(sight: Sight) -> None:
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    opening = preparing.bench.openings["web-7"]
    assert sight.begun.wait(10)
    cleaning = beside(at("source_prepared"), preparing)
    for state in ("cleaning", "clearing", "clearing_late"):
        effects = target.PLAN.steps[state].effects
        assert effects.index(OpenViews.name) < min(map(effects.index, ("mount_union", "attach_remote"))), state
    OpenViews().undo(cleaning)
    assert opening.ended and not sight.opened
    assert not cleaning.bench.openings
    OpenViews().undo(cleaning)


def test_a_step_that_is_repeated_begins_no_second_opening(sight: Sight) -> None:
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    first = preparing.bench.openings["web-7"]
    OpenViews().run(preparing)
    assert preparing.bench.openings["web-7"] is first
    sight.may_open.set()
    first.wait(lambda: None)
    OpenViews().run(preparing)
    assert preparing.bench.openings["web-7"] is not first


@pytest.mark.parametrize("strategy", attach_remote.WITHOUT_UNION)
def test_a_strategy_without_a_union_opens_nothing(sight: Sight, strategy: str) -> None:
    preparing = at("source_prepared", strategy=strategy)
    OpenViews().run(preparing)
    AttachRemote().run(beside(at("brace_ordered", strategy=strategy), preparing))
    assert not preparing.bench.openings and not sight.begun.is_set()


def test_an_order_that_needs_no_view_ends_the_opening_of_one(sight: Sight) -> None:
    preparing = at("source_prepared", "auto")
    OpenViews().run(preparing)
    opening = preparing.bench.openings["web-7"]
    AttachRemote().run(beside(at("brace_ordered", "precopy"), preparing))
    assert opening.ended and not sight.opened and not preparing.bench.openings


def test_whatever_goes_wrong_beside_is_told_to_whoever_waits() -> None:
    def attach(_called_off: threading.Event) -> None:
        raise OSError("no room for a configuration")

    opening = Opening("web-7", attach)
    opening.wait(lambda: None)
    assert isinstance(opening.failure, OSError)


def test_an_opening_that_was_called_off_is_no_failure() -> None:
    begun = threading.Event()

    def attach(called_off: threading.Event) -> None:
        begun.set()
        called_off.wait(10)
        raise CancelledError("not wanted any more")

    opening = Opening("web-7", attach)
    assert begun.wait(10)
    opening.call_off()
    assert opening.ended and opening.failure is None


def test_what_an_opening_has_mounted_goes_with_it(sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_down = []
    sight.union.unmount_all = lambda: taken_down.append(sight)
    monkeypatch.setattr(attach_remote, "existing_arrivals", lambda _context: [sight])
    sight.may_open.set()
    preparing = at("source_prepared")
    OpenViews().run(preparing)
    preparing.bench.openings["web-7"].close(10)
    assert taken_down == [sight]


def test_what_nobody_has_waited_for_is_taken_down_once_nothing_is_being_opened() -> None:
    """An agent that stops in order leaves no view behind that no step has used."""
    begun, done = threading.Event(), list[str]()

    def attach(called_off: threading.Event) -> None:
        begun.set()
        called_off.wait(10)
        done.append("ended")

    opening = Opening("web-7", attach, lambda: done.append("detached"))
    assert begun.wait(10)
    opening.close(10)
    assert done == ["ended", "detached"]


def test_nothing_is_taken_down_under_an_opening_that_goes_on() -> None:
    may_end, detached = threading.Event(), threading.Event()
    opening = Opening("web-7", lambda _called_off: cast(None, may_end.wait(10)), detached.set)
    opening.close(0.01)
    assert not detached.is_set()
    may_end.set()
    opening.close(10)
    assert detached.is_set()
