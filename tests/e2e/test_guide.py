"""The operator's guide, walked through: every command that it shows is typed, in the situation that it speaks of.

A scene makes a situation on the lab and yields where the page has its next block for it; ``web`` on the page is the
scene's own name here, and addresses are the lab's. What the page shows as answers must come (tests/support/guide.py).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit import Host, Lab, Process
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.e2e.conftest import NAME, SUBNET
from tests.support.fleet import Fleet, bring_up
from tests.support.guide import Block, Command, listed, missing, parse

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

PAGE = REPOSITORY / "docs" / "operators-guide.md"
COMMAND_SECONDS = 120.0
QUOTA_BYTES = 12_000_000
"""Room for a migration or two, and soon full."""

Scene = Callable[[Fleet, str], Iterator[None]]


class Operator:
    """Somebody who types what the page says."""

    def __init__(self, fleet: Fleet, name: str, desk: Path) -> None:
        self.fleet = fleet
        self.name = name
        self.desk = desk
        exported = [command.text for block in parse(PAGE) for command in block.commands]
        self._exports = [line for line in exported if line.startswith("export ")]  # typed once, in force ever after
        programs = desk / "bin"
        programs.mkdir()
        cargoctl = programs / "cargoctl"
        cargoctl.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m coordinator.cargoctl "$@"\n')
        cargoctl.chmod(0o755)
        (desk / "backups").mkdir()
        self._environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(desk),
            "LANG": "C.UTF-8",
        }
        etcd = fleet.lab.etcd
        url = etcd.endpoint.rpartition(":")[0] + ":" + str(int(etcd.endpoint.rpartition(":")[2]) + 1)
        self._words = (
            (r"\bweb\b", name),
            (r"10\.0\.0\.11\b", fleet.alpha.spec.address),
            (r"10\.0\.0\.12\b", fleet.beta.spec.address),
            (r"https://10\.0\.0\.1:2380", f"http://{url}"),
            (r"10\.0\.0\.1:2379", etcd.endpoint),
            (r"\bm1\b", "m0"),
            (r"/var/lib/etcd/cargo\b", str(etcd.data_directory())),
            (r"/var/backups/", f"{desk}/backups/"),
            (r"/var/lib/cargo/archive\b", f"{desk}/archive"),
        )

    def here(self, text: str) -> str:
        """What the page says, in the names of the lab."""
        for pattern, word in self._words:
            text = re.sub(pattern, word, text)
        return text

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        """Type one command where cargoctl is."""
        return self._run("$", self.here(line))

    def type(self, block: Block) -> None:
        """Type every command of the block; fails where the answer is not what the page shows."""
        codes = [self._type(command, block) for command in block.commands]
        assert block.code in codes, f"line {block.line}: no command ends with {block.code}"

    def _type(self, command: Command, block: Block) -> int:
        done = self._run(command.where, self.here(command.text))
        said = done.stdout + done.stderr
        print(f"\n{command.where} {command.text}\n{said}")
        where = f"docs/{PAGE.name}:{block.line}: {command.text}\n"
        assert done.returncode in (0, block.code), f"{where}ended with {done.returncode}:\n{said}"
        lost = missing([self.here(line) for line in command.answer], said)
        assert lost is None, f"{where}never said:\n{lost}\nbut:\n{said}"
        return done.returncode

    def _run(self, where: str, line: str) -> subprocess.CompletedProcess[str]:
        if service := re.fullmatch(r"systemctl (start|stop|restart) ([\w-]+)", line):
            daemon = self._daemon(where, service[2])
            {"start": daemon.start, "stop": daemon.stop, "restart": daemon.restart}[service[1]]()
            return subprocess.CompletedProcess(line, 0, "", "")
        if journal := re.fullmatch(r"journalctl -u ([\w-]+)[^|]*(\|.*)?", line):
            line = f"cat {self._daemon(where, journal[1]).log} {journal[2] or ''}"
        elif where in ("alpha", "beta"):
            entered = self.fleet.lab.host(where).command_line(["bash", "-c", line])
            return self._finish(entered, dict(os.environ))
        return self._finish(["bash", "-c", "\n".join([*map(self.here, self._exports), line])], self._environment)

    def _daemon(self, where: str, unit: str) -> Process:
        lab = self.fleet.lab
        if unit in ("etcd", "cargo-coordinator"):
            return lab.etcd.members[0] if unit == "etcd" else lab.coordinator
        host = lab.host(where)
        return {"ssh": host.sshd, "docker": host.dockerd, "cargo-hostd": host.hostd}[unit]

    def _finish(self, line: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line,
            env=environment,
            cwd=self.desk,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )


def walk(scene: str, fleet: Fleet, desk: Path) -> None:
    """Make the situation, and type each of the page's blocks for it."""
    blocks = [block for block in parse(PAGE) if block.scene == scene]
    operator = Operator(fleet, SHORT[scene], desk)
    told = (SCENES | RUINOUS)[scene](fleet, SHORT[scene])
    for block in blocks:
        next(told)
        operator.type(block)
    assert next(told, "the end") == "the end", "the scene goes on, but the page has no more blocks for it"


# --- scenes --------------------------------------------------------------------------------------------


def service(fleet: Fleet, name: str, **options: object) -> None:
    """A container with a volume and a port that Docker always restarts, on alpha; it moves only when that is asked for."""
    (fleet.volume("alpha", f"{name}-data") / "goods").write_text("goods\n")
    fleet.adopt(f"{name}-7")
    kept = {"volumes": {f"{name}-data": {"bind": "/data"}}, "restart_policy": {"Name": "always"}}
    fleet.sleeper(name, ports={"80/tcp": 8080}, **(kept | options))


def held(fleet: Fleet, name: str, host: str, point: str, action: str = "pause", **request: object) -> None:
    """A migration that has come to this point, at which the host's agent waits, or fails."""
    service(fleet, name)
    fleet.failpoints(f"hostd/{host}", f"{point}={action}")
    since = fleet.log_size(f"{host}.hostd")
    fleet.request(f"{name}-7", name, **request)
    fleet.wait_step(f"{host}.hostd", f'"point": "{point}"', since, 40)


def go_on(fleet: Fleet, host: str) -> None:
    """Take away what holds the host's agent."""
    fleet.store.delete(fleet.keys.failpoints(f"hostd/{host}"))


def power_cut(fleet: Fleet, host: str) -> None:
    fleet.lab.host(host).power_cut()
    fleet.oracle.lost_power(host)


def boot(fleet: Fleet, host: str) -> None:
    fleet.lab.host(host).boot()
    fleet.oracle.resume(host)


def first(fleet: Fleet, name: str) -> Iterator[None]:
    """A container that was never moved; then what there is to see of its migration."""
    service(fleet, name)
    yield
    yield
    fleet.wait_for(f"{name}-7", "finalised")
    yield
    yield
    yield


def back(fleet: Fleet, name: str) -> Iterator[None]:
    """It was moved, and is not liked there."""
    service(fleet, name)
    fleet.migrate(f"{name}-7", name)
    yield
    assert fleet.running("alpha", name)


def refused(fleet: Fleet, name: str) -> Iterator[None]:
    """Somebody else has the port on beta."""
    service(fleet, name)
    other = fleet.sleeper(f"{name}-other", host="beta", ports={"80/tcp": 8080})
    yield
    assert fleet.running("alpha", name)
    other.remove(force=True)


def union(fleet: Fleet, name: str) -> Iterator[None]:
    """Completed, on a union: all contents came after the start."""
    service(fleet, name)
    fleet.migrate(f"{name}-7", name, strategy="postcopy")
    yield
    assert fleet.execute("beta", name, "cat /data/goods") == "goods\n"


def paused(fleet: Fleet, name: str) -> Iterator[None]:
    """Before the stop, and slow enough for a person to say something."""
    held(fleet, name, "beta", "target.sync:before_event")
    yield
    go_on(fleet, "beta")
    fleet.wait_for(f"{name}-7", "sync_finished")
    yield
    assert fleet.running("beta", name)


def failing(fleet: Fleet, name: str) -> Iterator[None]:
    """The source does not let the target in: its sshd is off."""
    fleet.alpha.sshd.stop()
    service(fleet, name)
    fleet.request(f"{name}-7", name)
    fleet.wait_for(f"{name}-7", "step_failed")
    yield
    assert fleet.running("beta", name)


def unhealthy(fleet: Fleet, name: str) -> Iterator[None]:
    """On beta its own check does not like it."""
    second = 1_000_000_000
    check = {"test": ["CMD-SHELL", "test -e /data/well"], "interval": second, "timeout": 5 * second, "retries": 1}
    service(fleet, name, healthcheck=check)
    fleet.request(f"{name}-7", name)
    fleet.wait_for(f"{name}-7", "health_reported")
    fleet.wait_for(f"{name}-7", "completed")
    yield
    assert fleet.running("alpha", name)


def by_hand(fleet: Fleet, name: str) -> Iterator[None]:
    """During the fill; it runs twice for a moment, so the oracle does not look."""
    point = "target.fill_replica:before_effect"
    options = {"volumes": {f"{name}-data": {"bind": "/data"}}, "restart_policy": {"Name": "always"}}
    sleep = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]
    fleet.docker["alpha"].containers.run(fleet.images["busybox"], sleep, name=name, detach=True, **options)
    fleet.wait_listed("alpha", name)
    fleet.failpoints("hostd/beta", f"{point}=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-7", name, strategy="postcopy")
    fleet.wait_step("beta.hostd", f'"point": "{point}"', since, 40)
    yield
    fleet.wait_for(f"{name}-7", "step_failed")
    yield
    go_on(fleet, "beta")
    fleet.wait_end(f"{name}-7", "completed")


def source_before(fleet: Fleet, name: str) -> Iterator[None]:
    held(fleet, name, "beta", "target.pull_round:before_effect")
    power_cut(fleet, "alpha")
    go_on(fleet, "beta")
    yield
    boot(fleet, "alpha")
    fleet.wait_end(f"{name}-7", "aborted")
    yield
    assert fleet.policy("alpha", name) == "always"


def source_after(fleet: Fleet, name: str) -> Iterator[None]:
    held(fleet, name, "beta", "target.apply_dirty:before_effect", "error(no link)")
    power_cut(fleet, "alpha")
    fleet.wait_for(f"{name}-7", "step_failed")
    yield
    go_on(fleet, "beta")
    boot(fleet, "alpha")
    fleet.wait_end(f"{name}-7", "aborted")
    assert fleet.policy("alpha", name) == "always"


def source_fill(fleet: Fleet, name: str) -> Iterator[None]:
    held(fleet, name, "beta", "target.fill_replica:before_effect", strategy="postcopy")
    power_cut(fleet, "alpha")
    go_on(fleet, "beta")
    fleet.wait_for(f"{name}-7", "step_failed", timeout_seconds=90)
    yield
    boot(fleet, "alpha")
    fleet.wait_end(f"{name}-7", "completed", timeout_seconds=120)
    yield
    assert fleet.running("beta", name)


def target_before(fleet: Fleet, name: str) -> Iterator[None]:
    held(fleet, name, "beta", "target.apply_dirty:before_effect")
    power_cut(fleet, "beta")
    go_on(fleet, "beta")
    yield
    fleet.wait_running("alpha", name)
    yield
    boot(fleet, "beta")
    fleet.wait_end(f"{name}-7", "aborted")
    yield
    fleet.oracle.resume("beta")
    fleet.beta.run(["sh", "-c", "! ss -ltn | grep :8080"])
    fleet.assert_clean("beta", f"{name}-7")


def target_after(fleet: Fleet, name: str) -> Iterator[None]:
    held(fleet, name, "beta", "target.fill_replica:before_effect")
    power_cut(fleet, "beta")
    go_on(fleet, "beta")
    yield
    yield
    fleet.wait_end(f"{name}-7", "rolled_back")
    assert fleet.running("alpha", name)
    boot(fleet, "beta")
    wait_until(lambda: "target_cleaned" in fleet.types(f"{name}-7"), "beta does not clean up", 40)
    assert not fleet.running("beta", name)


def small_disk(fleet: Fleet, host: Host, place: str, size: str) -> None:
    """A file system of its own there, until the test ends."""
    host.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", place])
    fleet.at_end(lambda: host.run(["umount", "-l", place], check=False) and None)


def target_full(fleet: Fleet, name: str) -> Iterator[None]:
    """Its data does not fit on beta."""
    service(fleet, name, volumes={f"/srv/{name}-data": {"bind": "/data"}})
    (fleet.alpha.path(f"/srv/{name}-data") / "more").write_bytes(os.urandom(4_000_000))
    small_disk(fleet, fleet.beta, "/srv", "2m")
    yield
    assert fleet.running("alpha", name)


def target_fills(fleet: Fleet, name: str) -> Iterator[None]:
    """There was room on beta, until somebody else took it during the fill."""
    small_disk(fleet, fleet.beta, "/srv", "24m")
    service(fleet, name, volumes={f"/srv/{name}-data": {"bind": "/data"}})
    (fleet.alpha.path(f"/srv/{name}-data") / "more").write_bytes(os.urandom(8_000_000))
    point = "target.fill_replica:before_effect"
    fleet.failpoints("hostd/beta", f"{point}=pause")
    since = fleet.log_size("beta.hostd")
    fleet.request(f"{name}-7", name, strategy="postcopy")
    fleet.wait_step("beta.hostd", f'"point": "{point}"', since, 40)
    fleet.beta.run(["dd", "if=/dev/zero", "of=/srv/other", "bs=1M"], check=False)
    go_on(fleet, "beta")
    fleet.wait_for(f"{name}-7", "step_failed")
    yield
    fleet.wait_end(f"{name}-7", "completed")
    assert fleet.execute("beta", name, "wc -c < /data/more").strip() == "8000000"


def source_full(fleet: Fleet, name: str) -> Iterator[None]:
    """The source's agent has no room for its lists."""
    fleet.alpha.run(["mkdir", "-p", "/var/lib/cargo/migrations"])
    small_disk(fleet, fleet.alpha, "/var/lib/cargo/migrations", "64k")
    fleet.alpha.run(["dd", "if=/dev/zero", "of=/var/lib/cargo/migrations/full", "bs=4k"], check=False)
    service(fleet, name)
    yield
    assert fleet.running("alpha", name)


def etcd_full(fleet: Fleet, name: str) -> Iterator[None]:
    """Something has filled etcd while a migration is under way."""
    held(fleet, name, "beta", "target.apply_dirty:before_effect")
    junk = b"x" * 1_000_000

    def refused() -> bool:
        try:
            fleet.etcdctl("put", "/junk", given=junk)
        except subprocess.CalledProcessError as error:
            return b"space exceeded" in error.stderr
        return False

    wait_until(refused, "etcd does not get full", 60)
    yield
    fleet.etcdctl("del", "/junk")
    yield
    go_on(fleet, "beta")
    fleet.wait_end(f"{name}-7", "completed")


def etcd_lost(fleet: Fleet, name: str) -> Iterator[None]:
    """Its disk is gone, but not the snapshot; nothing has happened since."""
    service(fleet, name)
    fleet.migrate(f"{name}-7", name, strategy="postcopy")
    yield
    fleet.lab.etcd.kill()
    lose(fleet)
    yield
    assert fleet.execute("beta", name, "cat /data/goods") == "goods\n"


def lose(fleet: Fleet) -> None:
    data = fleet.lab.etcd.data_directory()
    data.rename(data.with_name("lost"))


def past(fleet: Fleet, name: str, point: str, **request: object) -> Path:
    """An older etcd has come back in the place of the newer one: the history ends at beta's first round."""
    held(fleet, name, "beta", "target.pull_round:before_effect", **request)
    saved = fleet.lab.root / "older.db"
    fleet.etcdctl("snapshot", "save", str(saved))
    if point:
        fleet.failpoints("hostd/alpha", f"{point}=pause")
    go_on(fleet, "beta")
    return saved


def come_back(fleet: Fleet, saved: Path) -> None:
    fleet.lab.etcd.stop()
    lose(fleet)
    member = fleet.lab.etcd.members[0]
    flags = [flag for flag in member.argv if flag.startswith(("--name", "--data-dir", "--initial-"))]
    fleet.etcdctl("snapshot", "restore", str(saved), *flags)
    fleet.lab.etcd.start()
    for log in ("coordinator", "alpha.hostd", "beta.hostd"):
        fleet.wait_step(log, "Nothing is done for any migration", 0, 60)


def past_target(fleet: Fleet, name: str) -> Iterator[None]:
    """The container has moved since."""
    saved = past(fleet, name, "", strategy="postcopy")
    fleet.wait_end(f"{name}-7", "completed")
    come_back(fleet, saved)
    yield
    for host in ("alpha", "beta"):
        fleet.wait_step(f"{host}.hostd", "history that has lost its end", 0, 30)
    yield
    yield
    assert not fleet.running("alpha", name)
    assert fleet.execute("beta", name, "cat /data/goods") == "goods\n"
    power_cut(fleet, "beta")
    boot(fleet, "beta")
    fleet.wait_running("beta", name)
    assert fleet.execute("beta", name, "cat /data/goods") == "goods\n"
    assert fleet.mounts("beta") == []


def past_source(fleet: Fleet, name: str) -> Iterator[None]:
    """It went on a little since, but nothing was claimed."""
    point = "source.disarm_restart:before_effect"
    saved = past(fleet, name, point)
    fleet.wait_step("alpha.hostd", f'"point": "{point}"', 0, 40)
    come_back(fleet, saved)
    for daemon in (fleet.lab.coordinator, fleet.alpha.hostd, fleet.beta.hostd):
        daemon.kill()
        daemon.start(wait=False)
    fleet.lab.start_agents()
    for host in ("alpha", "beta"):
        fleet.etcdctl("del", fleet.keys.failpoints(f"hostd/{host}"))  # the fleet's own view of etcd holds as well
    for host in ("alpha", "beta"):
        fleet.wait_step(f"{host}.hostd", "history that has lost its end", 0, 30)
    yield
    assert fleet.running("alpha", name)
    assert fleet.policy("alpha", name) == "always"
    fleet.assert_clean("beta", f"{name}-7")


SCENES: dict[str, Scene] = {
    "first": first,
    "back": back,
    "refused": refused,
    "union": union,
    "paused": paused,
    "failing": failing,
    "unhealthy": unhealthy,
    "by-hand": by_hand,
    "source-before": source_before,
    "source-after": source_after,
    "source-fill": source_fill,
    "target-before": target_before,
    "target-after": target_after,
    "target-full": target_full,
    "target-fills": target_fills,
    "source-full": source_full,
}
OFTEN = ("first", "failing", "target-full")
"""Walked in every run; the others are long."""
RUINOUS: dict[str, Scene] = {
    "etcd-full": etcd_full,
    "etcd-lost": etcd_lost,
    "past-target": past_target,
    "past-source": past_source,
}
"""Each on a lab of its own: what is done to etcd there is not undone."""
SHORT = {scene: f"g{scene.replace('-', '')}" for scene in (*SCENES, *RUINOUS)}
"""What ``web`` is called in a scene: names of histories are not used twice in a lab."""


@pytest.mark.parametrize(
    "scene", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in SCENES]
)
def test_the_commands_of_the_guide_do_what_it_says(fleet: Fleet, scene: str, tmp_path: Path) -> None:
    walk(scene, fleet, tmp_path)


README = REPOSITORY / "README.md"
ELSEWHERE = {
    "cargo-hostd check -c hostd.cfg": "integration/test_packages.py",
    "cargo-coordinator check -c coordinator.cfg": "integration/test_packages.py",
    "cargo-hostd-runtime install": "unit/test_gate.py",
    "cargo-coordinator -c coordinator.cfg": "e2e/test_daemons.py",
    "cargo-hostd -c hostd.cfg": "e2e/test_daemons.py",
    "cargoctl fleet": "integration/test_fleet_commands.py",
}
"""How commands begin that the README shows and another test runs, on a machine or a tree of its own."""


@pytest.mark.long
def test_every_command_that_the_readme_shows_is_one(fleet: Fleet, tmp_path: Path) -> None:
    """Typed as they stand there, against a migration that was asked for as it says."""
    commands = listed(README)
    assert len(commands) > 25
    operator = Operator(fleet, "greadme", tmp_path)
    service(fleet, "greadme")
    fleet.sleeper("greadmetoo")
    request = next(command for command in commands if "/cargo/requests/" in command)
    asked = next(command for command in commands if command.startswith("cargoctl migrate"))
    elsewhere = {command: begun for command in commands for begun in ELSEWHERE if command.startswith(begun)}
    later = [command for command in commands if command not in (request, asked, *elsewhere)]
    assert operator.run(request).returncode == 0
    fleet.wait_end("greadme-7", "completed")
    assert operator.run(asked.replace("web", "greadmetoo")).returncode == 0
    for command in later:
        line = command.replace("FILE", "kept.jsonl").replace("DIRECTORY", "kept").removeprefix("sudo ")
        if line.startswith("scripts/"):
            line = f"{REPOSITORY}/{line} --help"
        done = operator.run(line)
        refused = " control_refused " in done.stdout  # it has been understood, and comes too late
        assert done.returncode == (1 if refused else 0), f"{command}\n{done.stdout}{done.stderr}"
        if "/cargo/failpoints/" in command:
            go_on(fleet, "beta")
    assert set(ELSEWHERE) == set(elsewhere.values())
    for test in ELSEWHERE.values():
        assert (REPOSITORY / "tests" / test).exists(), test


@pytest.fixture
def lone() -> Iterator[Fleet]:
    """Two hosts and one small etcd, of which nothing is used again."""
    beginning, _, number = SUBNET.rpartition(".")
    name = f"{NAME[:7]}x1"
    Lab(name).down()
    lab = Lab(name, f"{beginning}.{(int(number) + 60) % 250}")
    lab.etcd.members[0].env["ETCD_QUOTA_BACKEND_BYTES"] = str(QUOTA_BYTES)
    try:
        yield Fleet(lab, bring_up(lab))
    finally:
        lab.down()


@pytest.mark.long
@pytest.mark.parametrize("scene", RUINOUS)
def test_the_commands_of_the_guide_bring_back_an_etcd(lone: Fleet, scene: str, tmp_path: Path) -> None:
    """B7, B13, E9, E26: full, lost, and back from an older state."""
    walk(scene, lone, tmp_path)
