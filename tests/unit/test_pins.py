"""The SSH pins of a secured fleet, as its agents keep them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import structlog

from events.errors import StoreUnavailableError
from events.membership import Member
from hostd import pins as keeping
from hostd.pins import HEADER, Pins
from tests.support.records import wait_until


def member(host: str, letter: str) -> Member:
    key = f"ssh-ed25519 {letter * 68}"
    return Member(name=f"hostd/{host}", user="u", signing_key="k", ssh_host_key=key, ssh_client_key=key)


class Fleet:
    def __init__(self) -> None:
        self.all = {one.name: one for one in (member("alpha", "A"), member("beta", "B"))}
        self.all["coordinator/c1"] = Member(name="coordinator/c1", user="c", signing_key="k")
        self.down = False

    def members(self) -> Mapping[str, Member]:
        if self.down:
            raise StoreUnavailableError("etcd is down")
        return self.all


def test_pins_follow_the_members_and_outlive_the_bus(tmp_path: Path) -> None:
    """C8, B14: a removed host is gone from both files; no answer is no reason to forget anybody."""
    fleet, known, authorized = Fleet(), tmp_path / "ssh/known_hosts", tmp_path / "ssh/authorized_keys"
    barred: list[frozenset[str]] = []
    pins = Pins("alpha", fleet.members, known, authorized, structlog.get_logger(), bar=barred.append)
    pins.look()
    assert known.read_text() == f"{HEADER}alpha ssh-ed25519 {'A' * 68}\nbeta ssh-ed25519 {'B' * 68}\n"
    assert authorized.read_text().count("ssh-ed25519") == 1
    assert authorized.stat().st_mode & 0o777 == 0o600
    fleet.down = True
    pins.look()
    assert "beta" in known.read_text()
    fleet.down = False
    fleet.all["hostd/beta"] = Member(name="hostd/beta")
    pins.look()
    assert "beta" not in known.read_text()
    assert authorized.read_text() == HEADER
    assert barred == [frozenset(), frozenset({"beta"})], "what it was admitted to ends, too"
    del fleet.all["hostd/beta"]
    pins.look()
    assert barred[-1] == frozenset(), "that a record is missing is nobody's word"


def test_who_is_told_that_the_members_changed_looks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C8: a host that has just joined is let in; a person who tries it at once is not refused."""
    monkeypatch.setattr(keeping, "LOOK_SECONDS", 3600.0)
    fleet, known = Fleet(), tmp_path / "known_hosts"
    pins = Pins("alpha", fleet.members, known, tmp_path / "authorized_keys", structlog.get_logger())
    pins.start()
    try:
        fleet.all["hostd/gamma"] = member("gamma", "C")
        assert "gamma" not in known.read_text()
        pins.wake()
        wait_until(lambda: "gamma" in known.read_text(), "it does not look")
    finally:
        pins.close()
    assert not pins._thread.is_alive()
