"""The checks of the bus against a real etcd: version, health, clock, and permissions with authentication on."""

from __future__ import annotations

from pathlib import Path

import pytest

from events import bus_check
from events.etcd import EtcdAccess, EtcdStore
from events.settings import EtcdSettings
from tests.support.etcd import etcd_cluster
from tests.support.records import wait_until

pytestmark = pytest.mark.etcd


def test_a_real_etcd_tells_version_health_and_time_and_what_a_user_may_do() -> None:
    with etcd_cluster() as etcd:
        [answer] = bus_check.look(EtcdSettings(tuple(etcd.endpoints)), etcd.endpoints)
        assert answer.trouble == ""
        assert answer.version.startswith("3.")
        assert answer.healthy
        assert answer.skew_seconds is not None
        assert abs(answer.skew_seconds) < bus_check.CLOCK_ADVICE_SECONDS
        assert all(finding.level == "ok" for finding in bus_check.judge([answer]))

        for line in (
            "user add root:secret", "role add reader", "role grant-permission --prefix reader read /cargo/",
            "user add alpha:word", "user grant-role alpha reader", "auth enable",
        ):  # fmt: skip
            etcd.etcdctl(*line.split())
        store = EtcdStore(etcd.endpoints, access=EtcdAccess(user="alpha", password="word"))
        try:
            found = bus_check.permissions(store, reads=store.keys.inbox("alpha"), writes=store.keys.host("alpha"))
        finally:
            store.close()
        assert [(finding.about, finding.level) for finding in found] == [("etcd-read", "ok"), ("etcd-write", "problem")]
        assert "permission denied" in found[1].says


def test_what_is_not_there_and_what_is_no_etcd_are_told_in_words(tmp_path: Path) -> None:
    [silent] = bus_check.look(EtcdSettings(("127.0.0.1:1",)), ["127.0.0.1:1"])
    assert "refused" in silent.trouble
    [unreadable] = bus_check.look(EtcdSettings((), ca=tmp_path / "none"), ["127.0.0.1:1"])
    assert "TLS" in unreadable.trouble


def test_a_full_etcd_is_called_unhealthy() -> None:
    """Out of space, it answers reads and refuses writes."""
    with etcd_cluster(arguments=["--quota-backend-bytes=65536"]) as etcd:
        store = EtcdStore(etcd.endpoints)

        def full() -> bool:
            try:
                store.put("/filler", b"x" * 60_000)
            except Exception as error:
                return "space" in str(error)
            return False

        try:
            wait_until(full, "etcd does not fill up")
        finally:
            store.close()
        [answer] = bus_check.look(EtcdSettings(tuple(etcd.endpoints)), etcd.endpoints)
        assert [finding.about for finding in bus_check.judge([answer]) if finding.level == "problem"] == ["etcd-health"]
