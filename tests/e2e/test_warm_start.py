"""Warm starts on real parts: the container waits at its gate while the source still runs, and goes on after the claim."""

from __future__ import annotations

import json

import pytest

from events.schema import TargetStarted
from labkit.waiting import wait_until
from tests.support.fleet import Fleet, differences

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

WRITER = "trap 'echo last >> log; exit 0' TERM; while :; do echo $((n=n+1)) >> log; sleep 0.02; done"
"""Writes to its working directory, which lies in a mount, and on its way out."""


def started(fleet: Fleet, migration: str) -> TargetStarted:
    return [event.data for event in fleet.events(migration) if isinstance(event.data, TargetStarted)][-1]


def test_a_container_whose_working_directory_is_in_its_data_goes_on_from_its_gate(fleet: Fleet) -> None:
    """Volumes, binds, read-only ones; working directory and entrypoint as Docker would have them."""
    bound = fleet.alpha.directory / "srv/bound"
    bound.mkdir(parents=True, exist_ok=True)
    (bound / "kept").write_text("kept\n")
    shown = fleet.volume("alpha", "shown")
    (shown / "page").write_text("page\n")
    fleet.run(
        "warm",
        command=["sh", "-c", WRITER],
        working_dir="/data",
        volumes={
            "data": {"bind": "/data"},
            "shown": {"bind": "/shown", "mode": "ro"},
            "/srv/bound": {"bind": "/bound"},
        },
    )
    wait_until((fleet.volume("alpha", "data") / "log").exists, "the workload does not begin", 15)
    fleet.migrate("warm-1", "warm")
    said = started(fleet, "warm-1")
    assert (said.start, said.why_cold) == ("warm", "")
    [kept] = fleet.describe("alpha", "/var/lib/docker/volumes/shown/_data")
    [seen] = fleet.describe_seen("beta", "warm", "/shown")
    assert differences(kept, seen) == []
    wrote = fleet.execute("beta", "warm", "cat /data/log; readlink /proc/1/cwd; cat /bound/kept; touch /bound/new")
    before, _, after = wrote.partition("last\n")
    assert before.split() == [str(number + 1) for number in range(len(before.split()))], "nothing lost before the stop"
    assert after.startswith("1\n2\n"), "and its working directory is the tree that it goes on in"
    assert "/data" in after and "kept" in after
    assert fleet.execute("beta", "warm", "touch /shown/x 2>&1 || echo refused").endswith("refused\n")
    assert fleet.gates("beta") == []
    fleet.control("warm-1", "finalise")
    fleet.wait_for("warm-1", "finalised")
    fleet.present("beta", "warm").restart(timeout=2)
    fleet.wait_running("beta", "warm")
    assert "last" in fleet.execute("beta", "warm", "cat log")
    fleet.assert_sound("warm-1")


def test_a_container_that_cannot_wait_starts_cold_and_the_history_says_why(fleet: Fleet) -> None:
    fleet.sleeper("nested", volumes={"outer": {"bind": "/data"}, "inner": {"bind": "/data/inner"}})
    fleet.migrate("nested-1", "nested")
    said = started(fleet, "nested-1")
    assert said.start == "cold"
    assert "/data/inner is mounted inside /data" in said.why_cold
    fleet.sleeper("asked")
    fleet.migrate("asked-1", "asked", start="cold")
    assert (started(fleet, "asked-1").start, started(fleet, "asked-1").why_cold) == ("cold", "the request says so")
    assert "the request says so" in json.dumps([fleet.cargoctl("history", "asked-1", "--json").stdout])
    fleet.assert_sound("nested-1")


def test_an_abort_sends_the_waiting_container_away(fleet: Fleet) -> None:
    """P11: nothing ran, nothing is left."""
    fleet.failpoints("hostd/alpha", "source.stop_container:before_effect=pause")
    fleet.sleeper("waits", volumes={"waits": {"bind": "/data"}})
    fleet.request("waits-1", "waits")
    wait_until(lambda: bool(fleet.gates("beta")), "the container is not warmed", 30)
    fleet.control("waits-1", "abort")
    fleet.wait_for("waits-1", "abort_ordered")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_end("waits-1", "aborted")
    assert fleet.gates("beta") == []
    assert "runc init" not in fleet.beta.run(["ps", "axo", "args"]).stdout
    assert fleet.container("beta", "waits") is None
    fleet.oracle.settle({"waits": {"alpha"}})
    fleet.assert_sound("waits-1")


@pytest.mark.parametrize("point", ["target.apply_dirty:before_effect", "target.start_container:before_effect"])
def test_an_agent_that_dies_while_the_container_waits_starts_it_cold_in_its_next_life(fleet: Fleet, point: str) -> None:
    name = point.replace(":", ".")
    fleet.sleeper(name, volumes={name: {"bind": "/data"}})
    fleet.failpoints("hostd/beta", f"{point}=kill")
    fleet.request(f"{name}-1", name)
    hostd = fleet.beta.hostd
    wait_until(lambda: not hostd.running, f"nobody passes {point}", 30)
    fleet.failpoints("hostd/beta", "")
    hostd.start()
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=80)
    assert started(fleet, f"{name}-1").start == "cold"
    assert fleet.gates("beta") == []
    fleet.oracle.settle({name: {"beta"}})
    fleet.assert_sound(f"{name}-1")


NEVER_CREATES = """#!/bin/sh
case " $* " in *" create "*) touch /run/creating; sleep 600 ;; esac
exec runc "$@"
"""
"""A runtime in which Docker's start stands still between the container's network and its first process."""


def test_a_port_that_a_crash_left_with_docker_is_named_and_is_no_dead_end(fleet: Fleet) -> None:
    """A8, F7: power fails in the middle of a start; Docker then holds the port for nobody."""
    fleet.sleeper("cut", ports={"7777/tcp": 7777})
    configuration, runtime = (fleet.beta.directory / name for name in ("etc/docker/daemon.json", "srv/never-creates"))
    usual = configuration.read_text()
    runtime.write_text(NEVER_CREATES)
    runtime.chmod(0o755)
    configuration.write_text(json.dumps(json.loads(usual) | {"runtimes": {"cargo": {"path": "/srv/never-creates"}}}))
    fleet.at_end(lambda: configuration.write_text(usual))
    fleet.beta.dockerd.restart()
    fleet.oracle.resume("beta")
    fleet.failpoints("hostd/alpha", "source.stop_container:before_effect=pause")
    fleet.request("cut-1", "cut")
    wait_until((fleet.beta.directory / "run/creating").exists, "Docker does not start the container", 30)
    fleet.beta.power_cut()
    fleet.oracle.lost_power("beta")
    configuration.write_text(usual)
    fleet.beta.boot()
    fleet.oracle.resume("beta")
    fleet.failpoints("hostd/alpha", "")
    fleet.wait_for("cut-1", "step_failed", timeout_seconds=60)
    said = fleet.cargoctl("why", "cut-1").stdout
    assert "no container publishes it: Docker holds it" in said
    assert "a rollback needs no restart" in said
    fleet.control("cut-1", "rollback")
    fleet.wait_end("cut-1", "rolled_back")
    fleet.wait_running("alpha", "cut")
    fleet.beta.dockerd.restart()
    fleet.oracle.resume("beta")
    fleet.migrate("cut-2", "cut")
    fleet.oracle.settle({"cut": {"beta"}})
    fleet.assert_sound("cut-1")
    fleet.assert_sound("cut-2")
