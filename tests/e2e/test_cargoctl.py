"""``cargoctl`` beside a real migration: what it prints, for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from labkit.waiting import wait_until
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

DONE, FAILED, USAGE = 0, 1, 2


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """One JSON object a line."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_said(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """Exit code, and one sentence on standard error without a trace."""
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_migrate_follows_a_migration_to_its_end_and_everything_else_tells_of_it(fleet: Fleet) -> None:
    fleet.volume("alpha", "told-data")
    fleet.sleeper("told", volumes={"told-data": {"bind": "/data"}}, ports={"80/tcp": 8099})
    hosts = {row["host"]: row for row in json.loads(fleet.cargoctl("list", "--json").stdout)}
    assert set(hosts) == {"alpha", "beta"}
    assert hosts["alpha"]["address"] == fleet.alpha.spec.address
    assert [container["name"] for container in hosts["alpha"]["containers"]] == ["told"]
    table = fleet.cargoctl("list").stdout
    assert "told" in table
    assert "8099" in table

    moved = fleet.cargoctl("migrate", "told", "alpha", "beta", "--id", "told-1", "--json")
    fleet.adopt("told-1")
    assert moved.returncode == DONE, moved.stderr
    events = lines(moved)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["type"], events[-1]["type"]) == ("requested", "completed")
    assert {event["by"] for event in events} == {"coordinator/c1", "hostd/alpha", "hostd/beta"}

    status = json.loads(fleet.cargoctl("status", "told-1", "--json").stdout)
    assert (status["id"], status["phase"]) == ("told-1", "finalised" if status["seq"] > len(events) else "completed")
    assert "told-1" in fleet.cargoctl("status").stdout
    everything = json.loads(fleet.cargoctl("status", "--json").stdout)
    assert everything["migrations"]["told-1"]["container"] == "told"

    history = fleet.cargoctl("history", "told-1")
    assert history.returncode == DONE
    for word in ("requested", "move told from alpha to beta", "target_claimed", "point of no return", "completed"):
        assert word in history.stdout
    assert lines(fleet.cargoctl("history", "told-1", "--json"))[: len(events)] == events
    again = fleet.cargoctl("migrate", "told", "alpha", "beta", "--id", "told-1")
    assert_said(again, USAGE, "there is a migration told-1 already")


def test_abort_shows_the_answer_and_a_refused_one_fails(fleet: Fleet) -> None:
    fleet.sleeper("held")
    fleet.failpoints("hostd/beta", "target.create_container:before_effect=pause")
    started = fleet.cargoctl("migrate", "held", "alpha", "beta", "--id", "held-1", "--detach")
    fleet.adopt("held-1")
    assert started.returncode == DONE
    fleet.wait_for("held-1", "source_prepared")
    waiting = json.loads(fleet.cargoctl("status", "held-1", "--json").stdout)
    assert waiting["phase"] == "prepare"
    refused = fleet.cargoctl("finalise", "held-1")
    assert refused.returncode == FAILED
    assert "only a completed migration" in refused.stdout
    aborted = fleet.cargoctl("abort", "held-1", "--reason", "not today")
    assert aborted.returncode == DONE, aborted.stderr
    assert "not today" in aborted.stdout
    fleet.failpoints("hostd/beta", "")
    fleet.wait_end("held-1", "aborted")
    followed = fleet.cargoctl("history", "held-1", "--follow")
    assert followed.returncode == FAILED, "it was aborted"


def test_a_request_that_is_rejected_fails_and_says_why(fleet: Fleet) -> None:
    rejected = fleet.cargoctl("migrate", "ghost", "alpha", "omega", "--id", "ghost-1", "--max-rounds", "77")
    assert rejected.returncode == FAILED
    assert "'max_rounds' is 77" in rejected.stdout
    again = fleet.cargoctl("migrate", "ghost", "alpha", "omega", "--id", "ghost-2")
    assert again.returncode == FAILED
    assert "no agent is registered for the target 'omega'" in again.stdout


def test_what_cannot_be_asked_for_is_said_in_one_sentence(fleet: Fleet) -> None:
    for command in ("status", "history", "abort"):
        assert_said(fleet.cargoctl(command, "never-was"), USAGE, "there is no migration never-was")
        assert_said(fleet.cargoctl(command, "two words"), USAGE, "two words")
    assert_said(fleet.cargoctl("migrate", "a", "b", "c", "--id", "../x"), USAGE, "not usable as an id")
    assert_said(fleet.cargoctl("fly"), USAGE, "invalid choice")
    assert_said(fleet.cargoctl("--config", "/nowhere.cfg", "list"), USAGE, "there is no configuration file")
    assert "usage: cargoctl" in fleet.cargoctl("-h").stdout


def test_an_etcd_that_does_not_answer_is_said_in_one_sentence(fleet: Fleet) -> None:
    fleet.lab.etcd.stop()
    fleet.at_end(fleet.lab.etcd.start)
    wait_until(lambda: not fleet.lab.etcd.running, "etcd goes on", 10)
    said = fleet.cargoctl("list")
    assert said.returncode == FAILED
    assert "Traceback" not in said.stderr
    # The lab's etcd is not on loopback, and not secured, which is said first.
    sentences = [line for line in said.stderr.strip().splitlines() if "NOT SECURED" not in line]
    assert len(sentences) == 1, said.stderr
