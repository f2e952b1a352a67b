"""The connection to the source, begun while it prepares: it saves time, and decides nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import structlog
from structlog.testing import capture_logs

from events.schema import Requested
from hostd import target
from hostd.effects.base import Context
from hostd.effects.connect_source import ConnectSource
from hostd.opening import Opening
from hostd.peer import Peer
from tests.support.histories import SAMPLES, History

SETTINGS = SimpleNamespace(
    ssh_port=2222, ssh_user="root", ssh_identity=Path("/etc/cargo/key"), ssh_known_hosts=Path("/etc/cargo/known")
)


class Wire:
    """What there is of a transport here: whom it was asked to connect to and to let go, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Peer]] = []
        self.waits = False

    def check(self, peer: Peer, *, cancelled: threading.Event) -> None:
        self.asked.append(("connect", peer))
        if self.waits:
            cancelled.wait()
            self.asked.append(("called off", peer))

    def let_go(self, peer: Peer) -> None:
        self.asked.append(("let go", peer))


def waiting(address: str, wire: Wire, connections: dict[str, Opening] | None = None) -> Context:
    """The target once the migration has begun, whose source was registered with that address."""
    requested = msgspec.structs.replace(cast(Requested, SAMPLES["requested"]), source_address=address)
    history = History()
    history.add(requested)
    history.add("prepare_ordered")
    view = target.PLAN.fold(history.events)
    bench = SimpleNamespace(settings=SETTINGS, transport=wire, connections={} if connections is None else connections)
    step = target.PLAN.steps[view.state]
    assert step.effects == ("connect_source",)
    assert step.conclude is None, "nobody waits for it"
    return cast(Context, SimpleNamespace(migration="web-7", view=view, bench=bench, log=structlog.get_logger()))


def begun(address: str) -> list[Peer]:
    """With whom a connection is begun."""
    wire = Wire()
    context = waiting(address, wire)
    assert ConnectSource().run(context) is None
    for opening in context.bench.connections.values():
        opening.wait(lambda: None)
    return [peer for _, peer in wire.asked]


def test_it_goes_to_the_address_under_which_the_source_was_registered_pinned_by_its_name() -> None:
    [peer] = begun("192.0.2.1")
    assert (peer.host, peer.address, peer.port) == ("alpha", "192.0.2.1", 2222)


def test_without_an_address_it_waits_for_the_source_to_tell() -> None:
    """Histories of a coordinator before this one."""
    assert begun("") == []


@pytest.mark.parametrize("address", ["-oProxyCommand=id", "192.0.2.1 x", "a\nb", '"'])
def test_an_address_that_is_none_is_not_contacted(address: str) -> None:
    """S8: it comes from etcd."""
    with capture_logs() as logs:
        assert begun(address) == []
    assert [line["event"] for line in logs] == ["the source's address cannot be used"]


def test_whoever_cleans_up_calls_it_off_and_lets_the_source_go() -> None:
    """P11: an abort leaves no connection behind, also one that is only being made."""
    wire = Wire()
    wire.waits = True
    context = waiting("192.0.2.1", wire)
    ConnectSource().run(context)
    ConnectSource().undo(context)
    assert [what for what, _ in wire.asked] == ["connect", "called off", "let go"]
    assert not context.bench.connections
    ConnectSource().undo(context)
    assert wire.asked[-1][0] == "let go", "an earlier life of the agent may have made it"


def test_nothing_is_kept_of_a_connection_that_has_been_made() -> None:
    """P13: the next one clears up after the last."""
    context = waiting("192.0.2.1", Wire())
    ConnectSource().run(context)
    context.bench.connections["web-7"].wait(lambda: None)
    later = waiting("192.0.2.1", Wire(), context.bench.connections)
    later.migration = "web-8"
    ConnectSource().run(later)
    assert list(later.bench.connections) == ["web-8"]
