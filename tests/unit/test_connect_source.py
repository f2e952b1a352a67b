"""The connection to the source, begun while it prepares: it saves time, and decides nothing."""

from __future__ import annotations

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
from hostd.peer import Peer
from tests.support.histories import SAMPLES, History

SETTINGS = SimpleNamespace(
    ssh_port=2222, ssh_user="root", ssh_identity=Path("/etc/cargo/key"), ssh_known_hosts=Path("/etc/cargo/known")
)


def begun(address: str) -> list[Peer]:
    """With whom a connection is begun, if the source was registered with that address."""
    peers: list[Peer] = []
    requested = msgspec.structs.replace(cast(Requested, SAMPLES["requested"]), source_address=address)
    history = History()
    history.add(requested)
    history.add("prepare_ordered")
    view = target.PLAN.fold(history.events)
    bench = SimpleNamespace(settings=SETTINGS, transport=SimpleNamespace(connect_ahead=peers.append))
    context = SimpleNamespace(view=view, bench=bench, log=structlog.get_logger())
    step = target.PLAN.steps[view.state]
    assert step.effects == ("connect_source",)
    assert step.conclude is None, "nobody waits for it"
    assert ConnectSource().run(cast(Context, context)) is None
    return peers


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
