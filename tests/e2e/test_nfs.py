"""Asking for NFS where the kernel has no client: refused in ``prepare``, and the source serves nobody any more.

What follows where it has one is tested in a guest with a kernel of its own (tests/integration/test_nfs_guest.py).
"""

from __future__ import annotations

import pytest

from events import schema
from hostd.nfs_client import client_problem
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def test_a_target_that_cannot_mount_by_nfs_refuses_before_the_stop_and_the_export_is_withdrawn(fleet: Fleet) -> None:
    """P11, P17: the source serves from ``prepare`` on, and after the abort nothing is left."""
    (fleet.volume("alpha", "nf-data") / "goods").write_text("goods")
    fleet.sleeper("nf", volumes={"nf-data": {"bind": "/data"}}, restart_policy={"Name": "always"})
    fleet.failpoints("hostd/beta", "target.fetch_spec:before_effect=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request("nf-1", "nf", remote="nfs")
    prepared = fleet.wait_for("nf-1", "source_prepared").data
    assert isinstance(prepared, schema.SourcePrepared)
    assert (prepared.remote, prepared.remote_port >= 20490) == ("nfs", True)
    assert [tool for tool in fleet.tools("alpha") if "ganesha" in tool], "the export is there from prepare on"
    fleet.wait_step("beta.hostd", '"point": "target.fetch_spec:before_effect"', since)
    if not client_problem():
        pytest.fail("this kernel has an NFS client; let this test go through to the end")
    fleet.failpoints("hostd/beta", "")
    events = fleet.wait_end("nf-1", "aborted")
    reason = next(event.data.reason for event in events if isinstance(event.data, schema.AbortOrdered))
    assert "no NFS client" in reason
    assert "ask for remote sshfs" in reason
    assert "source_stopped" not in [event.type for event in events]
    for host in ("alpha", "beta"):
        fleet.assert_clean(host, "nf-1")
    assert fleet.running("alpha", "nf")
