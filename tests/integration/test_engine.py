"""The engine adapter against a real dockerd of its own."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from events.errors import PermanentError, RefusedError, TransientError
from hostd.engine import DockerEvent, Engine, MissingError
from hostd.fidelity import dropped
from hostd.inventory import Sizer, container_records, host_record, port_problems, sharers_on
from hostd.spec import ContainerSpec, data_mounts, from_inspect, missing_ports, port_bindings, to_create_body
from hostd.spec_file import read_spec, write_spec
from tests.support.dockerd import PrivateDockerd, private_dockerd
from tests.support.same_container import differences

pytestmark = pytest.mark.lab

IMAGE = "busy:1"
OURS = {"cargo.migration": "m-1", "cargo.source": "alpha"}
DEADLINE_SECONDS = 30.0
OBEYS = ("sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done")


@pytest.fixture(scope="module")
def dockerd() -> Iterator[PrivateDockerd]:
    with private_dockerd() as daemon:
        daemon.import_busybox(
            IMAGE,
            'ENTRYPOINT ["/bin/sh", "-c"]',
            'CMD ["while :; do sleep 1; done"]',
            "ENV FROM_IMAGE=yes",
            "EXPOSE 9000",
            "LABEL from.image=yes",
            "VOLUME /declared",
            "WORKDIR /image",
        )
        yield daemon


@pytest.fixture
def engine(dockerd: PrivateDockerd) -> Iterator[Engine]:
    made = Engine(dockerd.socket, timeout_seconds=30)
    yield made
    for row in made.containers():
        dockerd.docker("rm", "-fv", row.id)
    dockerd.docker("volume", "prune", "-f")
    made.close()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def inspected(engine: Engine, name: str) -> dict[str, Any]:
    raw = engine.inspect(name)
    assert raw is not None
    return raw


def spec_of(engine: Engine, name: str) -> tuple[ContainerSpec, list[str], list[str]]:
    raw = inspected(engine, name)
    image = engine.image_inspect(raw["Image"])
    assert image is not None
    return from_inspect(raw, image, volumes=engine.volumes_of(raw), host_name=engine.info().host_name)


def plain_spec(dockerd: PrivateDockerd, engine: Engine, *options: str) -> ContainerSpec:
    dockerd.run("--name", "original", *options, IMAGE)
    return spec_of(engine, "original")[0]


# --- a container made again ------------------------------------------------------------------------

MANY_OPTIONS = shlex.split(
    "--network web --network-alias front --ip 172.30.0.9 --hostname explicit "
    "-p 127.0.0.1:8081:81 -p 7000-7002:7000-7002 -p 99 -p 8100-8110:80/udp "
    "-v vol-a:/data -v /anonymous --mount type=volume,target=/nameless "
    "--mount type=volume,source=vol-b,target=/vol-b,readonly,volume-nocopy "
    "--tmpfs /scratch:size=1m --shm-size 32m -e SECRET=x -e EMPTY= --user 1:2 --workdir /tmp "
    "--memory 64m --cpus 0.5 --pids-limit 50 --ulimit nofile=100:200 --cap-add SYS_PTRACE --cap-drop CHOWN "
    "--device /dev/null:/dev/nothing --init --stop-signal INT --stop-timeout 3 "
    "--health-interval 3s --restart on-failure:3 --log-opt max-size=1m --dns 192.0.2.1 "
    "--add-host other:192.0.2.2 --label a=b --oom-score-adj 10 --read-only --group-add 7 "
    "--sysctl net.ipv4.ip_unprivileged_port_start=0 --security-opt no-new-privileges"
)

NOT_CARRIED = {
    "Config": {"Labels": "two labels are added"},
    "HostConfig": {
        "RestartPolicy": "is 'no' while a migration runs",
        "PortBindings": "random ports are asked for by number",
        "Binds": "volumes without a name are asked for by their names",
        "Mounts": "as Binds",
    },
}


def test_a_container_with_many_options_is_made_again_as_it_was(
    dockerd: PrivateDockerd, engine: Engine, tmp_path: Path
) -> None:
    """F10: whatever inspect shows comes out the same, but for the listed exceptions."""
    dockerd.docker("network", "create", "--subnet", "172.30.0.0/24", "web")
    dockerd.docker("network", "create", "back")
    (tmp_path / "tree").mkdir()
    (tmp_path / "file").touch()
    binds = ("-v", f"{tmp_path}/tree:/bound:ro", "--mount", f"type=bind,source={tmp_path}/file,target=/file")
    dockerd.run("--name", "rich", *MANY_OPTIONS, *binds, "--health-cmd", "true", IMAGE, "while :; do sleep 0.2; done")
    dockerd.docker("network", "connect", "--alias", "store", "back", "rich")
    before = inspected(engine, "rich")
    spec, warnings, refusals = spec_of(engine, "rich")
    assert refusals == []
    assert warnings == ["the container uses devices of its host: /dev/null"]
    engine.stop("rich")
    dockerd.docker("rename", "rich", "rich-old")

    created = engine.create("rich", spec, labels=OURS)
    engine.set_restart_policy(created, spec.restart_policy, spec.restart_max_retries)
    engine.start(created)
    after = inspected(engine, "rich")

    assert after["Id"] == created != before["Id"]
    for section, exceptions in NOT_CARRIED.items():
        for field in before[section]:
            if field not in exceptions:
                assert after[section][field] == before[section][field], field
    assert after["Config"]["Labels"] == {**before["Config"]["Labels"], **OURS}
    assert after["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    assert after["NetworkSettings"]["Ports"] == before["NetworkSettings"]["Ports"]
    assert missing_ports(spec, after) == []
    assert data_mounts(after) == data_mounts(before)
    assert {mount.destination for mount in data_mounts(after)} == {
        "/data", "/anonymous", "/nameless", "/vol-b", "/bound", "/file", "/declared"
    }  # fmt: skip
    networks = after["NetworkSettings"]["Networks"]
    assert set(networks) == {"web", "back"}
    assert networks["web"]["IPAddress"] == "172.30.0.9"
    assert {"front", created[:12]} <= set(networks["web"]["Aliases"])
    assert {"store", created[:12]} <= set(networks["back"]["Aliases"])
    for name, endpoint in before["NetworkSettings"]["Networks"].items():
        theirs = set(endpoint["Aliases"]) - {before["Id"][:12]}
        assert set(networks[name]["Aliases"]) - {created[:12]} == theirs


PRIVILEGED = shlex.split(
    "--privileged --pid host --uts host --cgroupns host --userns host --device /dev/null:/dev/nothing --cap-drop MKNOD "
    "--security-opt apparmor=unconfined --security-opt systempaths=unconfined --device-cgroup-rule 'c 42:* rmw' "
    "-v vol-a:/data --restart on-failure:2"
)


def test_a_privileged_container_is_described_and_made_again_as_it_was(
    dockerd: PrivateDockerd, engine: Engine, tmp_path: Path
) -> None:
    """F10: created and never started, as a machine without all capabilities can start none; every field is the same."""
    dockerd.docker("create", "--name", "mighty", *PRIVILEGED, IMAGE, "sleep 100")
    before = inspected(engine, "mighty")
    assert before["HostConfig"]["Privileged"] is True
    spec, warnings, refusals = spec_of(engine, "mighty")
    assert refusals == []
    assert "the container is privileged and may depend on the source host in any way" in warnings
    write_spec(tmp_path / "spec", spec)  # the way to the other host
    arrived = read_spec(tmp_path / "spec")
    dockerd.docker("rename", "mighty", "mighty-old")

    created = engine.create("mighty", arrived, labels=OURS)
    engine.set_restart_policy(created, arrived.restart_policy, arrived.restart_max_retries)
    after = inspected(engine, created)
    apart_from = {"HostConfig.Binds": "a volume that the image declares is asked for by its name", "Mounts[1].Mode": ""}
    assert differences(before, after, apart_from=apart_from) == []
    body = to_create_body(arrived, image=arrived.image_id, labels=OURS)
    assert dropped(body, after) == []
    weak = {**after, "HostConfig": {**after["HostConfig"], "Privileged": False}}
    assert [row.name for row in dropped(body, weak)] == ["option:HostConfig.Privileged"]


def test_a_cleared_entrypoint_stays_cleared(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.run("--name", "cleared", "--entrypoint", "", IMAGE, "sleep", "100")
    before = inspected(engine, "cleared")
    created = engine.create("cleared-2", spec_of(engine, "cleared")[0], labels=OURS)
    after = inspected(engine, created)
    assert (before["Path"], before["Args"]) == (after["Path"], after["Args"]) == ("sleep", ["100"])


def test_a_host_name_made_from_the_id_is_not_carried(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.run("--name", "original", IMAGE)
    spec, warnings, _ = spec_of(engine, "original")
    created = engine.create("copy", spec, labels=OURS)
    assert inspected(engine, created)["Config"]["Hostname"] == created[:12]
    assert any("host name" in line for line in warnings)


def test_the_name_of_the_host_is_not_carried_with_the_hosts_network(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.run("--name", "original", "--net", "host", IMAGE)
    spec, warnings, refusals = spec_of(engine, "original")
    assert spec.config["Hostname"] == ""
    assert refusals == []
    assert any("host's network" in line for line in warnings)


def test_ports_published_at_random_keep_their_numbers(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.run("--name", "original", "-P", "-p", "0.0.0.0::82", "-p", "9600-9610:83", IMAGE)
    before = port_bindings(inspected(engine, "original"))
    spec, _, _ = spec_of(engine, "original")
    engine.stop("original", 0)
    created = engine.create("copy", spec, labels=OURS)
    engine.start(created)
    assert port_bindings(inspected(engine, created)) == before
    assert {port.container_port for port in before} == {"82/tcp", "83/tcp", "9000/tcp"}


def test_volumes_from_another_container_become_its_own(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.docker("create", "--name", "holder", "-v", "held:/held", IMAGE)
    dockerd.run("--name", "original", "--volumes-from", "holder:ro", IMAGE)
    spec, warnings, _ = spec_of(engine, "original")
    dockerd.docker("rm", "holder")
    created = engine.create("copy", spec, labels=OURS)
    assert data_mounts(inspected(engine, created)) == data_mounts(inspected(engine, "original"))
    assert any("--volumes-from" in line for line in warnings)


def test_volumes_and_paths_can_be_given_other_places(dockerd: PrivateDockerd, engine: Engine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    dockerd.run(
        "--name", "original", "-v", f"{tmp_path}/one:/bound:ro", "-v", "here:/volume",
        "--mount", "type=volume,source=also,target=/also", IMAGE,
    )  # fmt: skip
    spec, _, _ = spec_of(engine, "original")
    places = {f"{tmp_path}/one": f"{tmp_path}/two", "here": "there", "also": "elsewhere"}
    created = engine.create("copy", spec, labels=OURS, places=places)
    found = {mount.destination: mount for mount in data_mounts(inspected(engine, created))}
    assert found["/bound"].name == f"{tmp_path}/two"
    assert found["/bound"].read_only
    assert found["/volume"].name == "there"
    assert found["/also"].name == "elsewhere"


def test_the_image_is_asked_for_by_id_when_its_tag_has_moved(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F8: a tag that means another image on the target is not used."""
    old = dockerd.import_busybox("moving:1", 'CMD ["sleep", "100"]', "LABEL generation=1")
    dockerd.run("--name", "original", "moving:1")
    spec, _, _ = spec_of(engine, "original")
    dockerd.import_busybox("moving:1", 'CMD ["sleep", "100"]', "LABEL generation=2")
    created = engine.create("copy", spec, labels=OURS)
    assert inspected(engine, created)["Image"] == old


# --- names that are taken ----------------------------------------------------------------------------


def test_creating_twice_gives_the_same_container(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F6: what carries our labels is adopted."""
    spec = plain_spec(dockerd, engine)
    first = engine.create("copy", spec, labels=OURS)
    assert engine.create("copy", spec, labels=OURS) == first
    assert [row.id for row in engine.find_by_label("cargo.migration", "m-1")] == [first]


def test_a_name_that_somebody_else_has_is_refused(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F6: somebody else's container is left alone, also one of another migration."""
    spec = plain_spec(dockerd, engine)
    other = engine.create("copy", spec, labels={**OURS, "cargo.migration": "m-2"})
    with pytest.raises(RefusedError, match="'copy'"):
        engine.create("copy", spec, labels=OURS)
    with pytest.raises(RefusedError, match="'original'"):
        engine.create("original", spec, labels=OURS)
    with pytest.raises(RefusedError, match="taken"):
        engine.rename(other, "original")
    assert inspected(engine, "copy")["Id"] == other


def test_a_reply_lost_after_the_creation_is_looked_up(dockerd: PrivateDockerd, engine: Engine) -> None:
    """A4: the container exists, its id never arrived."""
    spec = plain_spec(dockerd, engine)
    send = engine._send
    lost: list[str] = []

    def losing(method: str, path: str, *arguments: Any, **options: Any) -> Any:
        reply = send(method, path, *arguments, **options)
        if path == "/containers/create":
            lost.append(reply.json()["Id"])
            raise TimeoutError("the reply was lost")
        return reply

    engine._send = losing  # type: ignore[method-assign]
    assert [engine.create("copy", spec, labels=OURS)] == lost


def test_a_creation_that_never_happened_may_be_tried_again(dockerd: PrivateDockerd, engine: Engine) -> None:
    spec = plain_spec(dockerd, engine)
    send = engine._send

    def failing(method: str, path: str, *arguments: Any, **options: Any) -> Any:
        if path == "/containers/create":
            raise TimeoutError("the request was lost")
        return send(method, path, *arguments, **options)

    engine._send = failing  # type: ignore[method-assign]
    with pytest.raises(TransientError, match="creating the container 'copy'"):
        engine.create("copy", spec, labels=OURS)
    engine._send = send  # type: ignore[method-assign]
    assert engine.create("copy", spec, labels=OURS)


def test_a_container_without_the_label_of_a_migration_is_not_created(dockerd: PrivateDockerd, engine: Engine) -> None:
    with pytest.raises(PermanentError, match="the label"):
        engine.create("copy", plain_spec(dockerd, engine), labels={})


def test_a_missing_image_and_a_missing_network_are_said_to_be_missing(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F8: the container is not created from something else."""
    spec = plain_spec(dockerd, engine)
    with pytest.raises(MissingError, match="image"):
        engine.create("copy", spec, labels=OURS, image="sha256:" + "0" * 64)
    assert engine.inspect("copy") is None
    with pytest.raises(PermanentError, match="not a name"):
        engine.image_inspect("../containers/original")


# --- the life of a container -------------------------------------------------------------------------


def test_a_stop_reports_the_exit_code_and_can_be_repeated(dockerd: PrivateDockerd, engine: Engine) -> None:
    running = dockerd.run("--name", "polite", "--entrypoint", OBEYS[0], IMAGE, *OBEYS[1:])
    until(lambda: engine.pid(running))
    first = engine.stop(running, 20)
    assert (first.exit_code, first.unclean) == (7, False)
    assert engine.stop(running, 20) == first
    assert engine.wait_exit(running, 5) == first
    assert engine.pid(running) is None


def test_a_container_that_ignores_the_stop_is_killed_and_that_is_said(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F13: the grace is the caller's, or the container's own."""
    stubborn = dockerd.run("--name", "stubborn", "--stop-timeout", "1", "--entrypoint", "sleep", IMAGE, "1000")
    began = time.monotonic()
    ended = engine.stop(stubborn)
    assert (ended.exit_code, ended.unclean) == (137, True)
    assert 0.9 < time.monotonic() - began < 9
    assert ended.finished_at.startswith("20")


def test_an_early_stop_waits_for_docker_where_processes_cannot_be_seen(dockerd: PrivateDockerd, engine: Engine) -> None:
    """P3: Docker counts processes in a namespace of its own here, so their numbers mean others to this process."""
    running = dockerd.run("--name", "early", "--entrypoint", OBEYS[0], IMAGE, *OBEYS[1:])
    until(lambda: engine.pid(running))
    ended = engine.stop_early(running, 20)
    assert ended is not None
    assert (ended.exit_code, ended.unclean) == (7, False)
    assert engine.stop_early(running, 20) == ended


def test_waiting_for_an_end_that_does_not_come_gives_nothing(dockerd: PrivateDockerd, engine: Engine) -> None:
    running = dockerd.run(IMAGE)
    assert engine.wait_exit(running, 0.3) is None
    dockerd.docker("kill", running)
    ended = engine.wait_exit(running, 10)
    assert ended is not None
    assert ended.exit_code == 137


def test_a_stop_of_something_gone_says_so(engine: Engine) -> None:
    """F4: the container was removed by somebody."""
    with pytest.raises(MissingError):
        engine.stop("0" * 64, 1)


def test_the_restart_policy_is_read_back(dockerd: PrivateDockerd, engine: Engine) -> None:
    """A14: and what Docker does not show is not believed."""
    running = dockerd.run("--restart", "always", IMAGE)
    engine.set_restart_policy(running, "no")
    assert inspected(engine, running)["HostConfig"]["RestartPolicy"]["Name"] == "no"
    engine.set_restart_policy(running, "on-failure", 4)
    assert inspected(engine, running)["HostConfig"]["RestartPolicy"]["MaximumRetryCount"] == 4
    send = engine._send

    def deaf(method: str, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("/update"):
            return send("GET", "/_ping", (), timeout_seconds=5)
        return send(method, path, *arguments, **options)

    engine._send = deaf  # type: ignore[method-assign]
    with pytest.raises(TransientError, match="not stopped"):
        engine.set_restart_policy(running, "no")


def test_a_container_stopped_with_policy_no_stays_down_after_a_reboot() -> None:
    """P10: whatever policy it had before."""
    with private_dockerd() as daemon:
        daemon.import_busybox(IMAGE, 'CMD ["sleep", "1000"]')
        disarmed = daemon.run("--restart", "always", IMAGE)
        revived = daemon.run("--restart", "always", IMAGE)
        engine = Engine(daemon.url)
        engine.set_restart_policy(disarmed, "no")
        engine.stop(disarmed, 0)
        daemon.restart()
        until(lambda: engine.pid(revived))
        assert engine.pid(disarmed) is None
        engine.close()


def test_starting_pausing_renaming_and_removing_can_be_repeated(dockerd: PrivateDockerd, engine: Engine) -> None:
    """P7: doing it twice is harmless."""
    created = engine.create("copy", plain_spec(dockerd, engine), labels=OURS)
    for _ in range(2):
        engine.start(created)
    for _ in range(2):
        engine.pause(created)
    assert inspected(engine, created)["State"]["Paused"]
    for _ in range(2):
        engine.unpause(created)
    with pytest.raises(PermanentError, match="removing"):
        engine.remove(created)
    engine.stop(created, 0)
    for _ in range(2):
        engine.rename(created, "kept")
    for _ in range(2):
        engine.remove(created)
    assert engine.inspect("kept") is None
    assert engine.inspect("original") is not None


def test_the_beginning_of_an_id_finds_nothing(dockerd: PrivateDockerd, engine: Engine) -> None:
    running = dockerd.run(IMAGE)
    assert engine.inspect(running[:12]) is None
    assert inspected(engine, running)["Id"] == running


def test_changes_outside_of_the_mounts_are_listed(dockerd: PrivateDockerd, engine: Engine) -> None:
    running = dockerd.run("-v", "vol-a:/data", IMAGE, "touch /written /data/not-this; sleep 100")
    until(lambda: "/written" in engine.writable_layer_changes(running))
    assert "/data/not-this" not in engine.writable_layer_changes(running)


def test_a_taken_port_is_said_to_be_for_good(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F7: before the start the probe finds it, at the start it is no transient error."""
    spec = plain_spec(dockerd, engine, "-p", "7700:80")
    created = engine.create("copy", spec, labels=OURS)
    assert port_problems(engine, spec.ports) == ["port 7700/tcp is taken by the container 'original'"]
    with pytest.raises(PermanentError, match="allocated"):
        engine.start(created)
    assert missing_ports(spec, inspected(engine, created)) == ["port 7700 for 80/tcp"] * 2


# --- volumes, images, the engine -----------------------------------------------------------------------


def test_a_volume_of_ours_is_adopted_and_another_refused(dockerd: PrivateDockerd, engine: Engine) -> None:
    first = engine.volume_create("mine", OURS)
    assert engine.volume_create("mine", OURS)["CreatedAt"] == first["CreatedAt"]
    dockerd.docker("volume", "create", "theirs")
    with pytest.raises(RefusedError, match="'theirs'"):
        engine.volume_create("theirs", OURS)
    assert {row["Name"] for row in engine.volumes()} == {"mine", "theirs"}
    dockerd.run("--name", "user", "-v", "mine:/theirs", IMAGE)
    assert [row.name for row in engine.containers_using_volume("mine")] == ["user"]
    assert engine.containers_using_volume("/theirs") == []
    with pytest.raises(PermanentError, match="in use"):
        engine.volume_remove("mine")
    for _ in range(2):
        engine.volume_remove("theirs")
    assert engine.volume_inspect("theirs") is None


def test_an_image_is_carried_as_a_stream(dockerd: PrivateDockerd, engine: Engine) -> None:
    dockerd.import_busybox("carried:1", "LABEL carried=1")
    before = engine.image_inspect("carried:1")
    assert before is not None
    archive = list(engine.save_image(["carried:1"]))
    dockerd.docker("rmi", "carried:1")
    assert engine.image_inspect("carried:1") is None
    engine.load_image(iter(archive))
    after = engine.image_inspect("carried:1")
    assert after is not None
    assert after["Id"] == before["Id"]
    with pytest.raises((PermanentError, TransientError), match="loading an image"):
        engine.load_image([b"".join(archive)[:-5000]])
    with pytest.raises(MissingError):
        list(engine.save_image(["no-such:1"]))


def test_an_error_of_whoever_brings_the_image_comes_through(engine: Engine) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 1000
        raise RefusedError(["the link was cut"])

    with pytest.raises(RefusedError, match="the link was cut"):
        engine.load_image(broken())


def test_the_engine_describes_itself(dockerd: PrivateDockerd, engine: Engine) -> None:
    engine.ping()
    info = engine.info()
    assert info.data_root == str(dockerd.root / "data")
    assert (info.storage_driver, info.live_restore, info.containerd_snapshotter) == ("overlay2", False, False)
    assert "runc" in info.runtimes
    assert engine.disk_free().free_bytes > 0
    assert {"bridge", "host", "none"} <= set(engine.networks())


def test_an_engine_that_is_away_is_a_passing_error_for_every_thread(tmp_path: Path) -> None:
    """A13: the caller tries again."""
    absent = Engine(tmp_path / "no.sock")
    failures: list[type[Exception]] = []

    def ask() -> None:
        try:
            absent.ping()
        except TransientError:
            failures.append(TransientError)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [TransientError] * 3


def test_threads_that_come_and_go_leave_no_connection_behind(engine: Engine) -> None:
    """A13: an agent works for months, with a thread for each migration that has something to do."""

    def ask_in_a_thread() -> int:
        thread = threading.Thread(target=engine.ping)
        thread.start()
        thread.join()
        return len(os.listdir("/proc/self/fd"))

    first = ask_in_a_thread()
    assert [ask_in_a_thread() for _ in range(5)] == [first] * 5


# --- events ----------------------------------------------------------------------------------------------


class Listener:
    """Collects an engine's events in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[DockerEvent] = []
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(engine,))
        self._thread.start()

    def _listen(self, engine: Engine) -> None:
        self.seen.extend(engine.events(self.stop))

    def end(self) -> None:
        self.stop.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()


def test_events_wake_and_end_when_told(dockerd: PrivateDockerd, engine: Engine) -> None:
    listener = Listener(engine)
    until(lambda: listener.seen)
    assert listener.seen[0].kind == "resync"
    made = dockerd.run("--name", "noticed", IMAGE)
    until(lambda: any((e.action, e.id, e.name) == ("start", made, "noticed") for e in listener.seen))
    listener.end()


def test_events_go_on_after_the_engine_was_away() -> None:
    """A12: with a resync, because something may have been missed."""
    with private_dockerd() as daemon:
        daemon.import_busybox(IMAGE, 'CMD ["sleep", "1000"]')
        engine = Engine(daemon.url)
        listener = Listener(engine)
        until(lambda: listener.seen)
        daemon.restart()
        until(lambda: sum(event.kind == "resync" for event in listener.seen) >= 2)
        daemon.run("--name", "later", IMAGE)
        until(lambda: any(event.action == "start" and event.name == "later" for event in listener.seen))
        listener.end()
        engine.close()


# --- inventory ---------------------------------------------------------------------------------------------


def test_the_inventory_describes_what_runs_here(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F9, F14: shared data is named, secrets are not."""
    sizer = Sizer()
    dockerd.run("--name", "web", "-e", "TOKEN=hush", "-p", "7800:80", "-v", "shared:/data", IMAGE)
    dockerd.run("--name", "peer", "-v", "shared:/other", IMAGE)
    container_records(engine, sizer)
    while sizer.measure_due():
        pass
    records = {record.name: record for record in container_records(engine, sizer)}
    web = records["web"]
    assert web.running
    assert {port.host_port for port in web.ports} == {7800}
    (shared,) = (mount for mount in web.mounts if mount.name == "shared")
    assert shared.shared_with == ("peer",)
    assert shared.size_bytes is not None
    assert "hush" not in str(records)
    assert web.refusals == ()
    mounts = data_mounts(inspected(engine, "web"))
    assert sharers_on(engine, mounts, "web") == {"/data": ("peer",)}
    host = host_record(
        engine, engine.info(), host="alpha", address="192.0.2.1", ssh_port=22, agent_version="1", boot="b"
    )
    assert "shared" in host.volumes
    assert "bridge" in host.networks
    assert "overlay" in host.capabilities
    assert host.free_bytes > 0


def test_a_volume_with_mount_options_is_refused(dockerd: PrivateDockerd, engine: Engine) -> None:
    """F9: an NFS volume is not copied as if it were local."""
    options = ("--opt", "type=nfs", "--opt", "device=:/x", "--opt", "o=addr=192.0.2.1")
    dockerd.docker("volume", "create", *options, "remote")
    dockerd.docker("create", "--name", "original", "-v", "remote:/data", IMAGE)
    _, _, refusals = spec_of(engine, "original")
    assert len(refusals) == 1
    assert "of the type 'nfs'" in refusals[0]


def test_the_specification_survives_its_file(dockerd: PrivateDockerd, engine: Engine, tmp_path: Path) -> None:
    """F14: nobody else can read it."""
    spec = plain_spec(dockerd, engine, "-e", "TOKEN=hush")
    reference = write_spec(tmp_path / "spec.json", spec)
    assert (tmp_path / "spec.json").stat().st_mode & 0o777 == 0o600
    assert read_spec(tmp_path / "spec.json", reference) == spec
    assert "TOKEN=hush" in json.dumps(spec.config)
    assert "hush" not in repr(spec)
