"""Real services move to and fro under load: no acknowledged record is lost, and their own checks find nothing.

Each is used by a client from outside of the hosts, without a pause, while it moves. After each hop the client goes on
with the service where it is now. docs/real-software.md holds the results of a long run.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from labkit.images import share
from labkit.waiting import wait_until
from labkit.witness import RedisSession, Session, Witness, load_keys
from tests.support.fleet import Fleet
from tests.support.same_container import differences
from tests.support.sessions import HttpSession, LineSession, PostgresqlSession

pytestmark = [pytest.mark.lab]

HOPS = int(os.environ.get("CARGO_REAL_HOPS", "10"))
HOP_SECONDS = 240
"""On a busy machine; a hop takes about ten."""
RECORDS_A_HOP = 150
CLIENTS = 2
STRIDE = 10_000_000
"""Between the numbers of one client and those of the next."""
SERVICES = Path(__file__).parent.parent / "support" / "services"


@dataclass(frozen=True)
class Service:
    """How a service is run, used, filled and checked."""

    image: str
    port: int
    connect: Callable[[str, int], Session]
    data: str
    """Where its volume is mounted; empty when what it serves lies in the container's writable layer."""
    check: Callable[[Fleet, str, str], None]
    """Of the service on that host, by its own tools. Fails when they find anything."""
    options: Mapping[str, Any] = field(default_factory=dict)
    fill: Callable[[Fleet, str], None] = lambda _fleet, _address: None
    """What is there before the first hop."""
    after_hop: Callable[[Fleet, str, str, int], None] = lambda _fleet, _host, _name, _hop: None
    """What is looked at, and done to it, on the host where a hop (from 1 on) has brought it."""
    pause_seconds: float = 0.001
    """Between the records of a client."""


# --- the services ------------------------------------------------------------------------------------


def fill_redis(_fleet: Fleet, address: str) -> None:
    load_keys(address, 6379, 2000, 2000)


def check_redis(fleet: Fleet, host: str, name: str) -> None:
    """The append-only file, which nobody writes any more, by Redis' own tool."""
    log = fleet.volume_path(host, f"{name}-data", "appendonly.aof")
    manifest = fleet.volume_path(host, f"{name}-data", "appendonlydir/appendonly.aof.manifest")
    line = ["redis-check-aof", str(manifest if manifest.exists() else log)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "valid" in done.stdout, done.stdout
    assert "not valid" not in done.stdout, done.stdout


def fill_postgresql(_fleet: Fleet, address: str) -> None:
    session = PostgresqlSession(address, 5432)
    for statement in PostgresqlSession.SCHEMA:
        session.query(statement)
    session.close()


def check_postgresql(fleet: Fleet, host: str, name: str) -> None:
    said = fleet.execute(
        host, name, "pg_amcheck --heapallindexed --parent-check postgres 2>&1; pg_dump -f /dev/null postgres"
    )
    assert not said.strip(), said
    session = PostgresqlSession(fleet.lab.host(host).spec.address, 5432)
    [[total]] = session.query("SELECT sum(balance) FROM accounts")
    [[fsync]], [[full]] = session.query("SHOW fsync"), session.query("SHOW synchronous_commit")
    session.close()
    assert int(total) == 1000 * PostgresqlSession.ACCOUNTS
    assert (fsync, full) == ("on", "on")


CHECK_SQLITE = """
import sqlite3
ledger = sqlite3.connect("/data/ledger.sqlite", timeout=30)
print(ledger.execute("PRAGMA integrity_check").fetchall(), ledger.execute("PRAGMA journal_mode").fetchall(),
      ledger.execute("SELECT sum(balance) FROM accounts").fetchall())
"""


def check_sqlite(fleet: Fleet, host: str, name: str) -> None:
    code, said = fleet.present(host, name).exec_run(["python3.11", "-c", CHECK_SQLITE])
    assert code == 0, said
    assert said.split() == b"[('ok',)] [('wal',)] [(2000000,)]".split(), said


def check_mapped(fleet: Fleet, host: str, name: str) -> None:
    """Every slot is whole (the service looks itself), and the files are still those that are mapped."""
    maps = fleet.execute(host, name, "cat /proc/1/maps").splitlines()
    assert len([line for line in maps if "/data/maps/" in line and " rw-s " in line]) == 300
    assert not [line for line in maps if line.endswith("(deleted)")]


def fill_nginx(fleet: Fleet, _address: str) -> None:
    pages = fleet.volume_path("alpha", "nginx-data", "pages")
    pages.mkdir()
    for number in range(HttpSession.PAGES):
        (pages / f"{number}.html").write_bytes(HttpSession.page(number))


IMAGES_OWN = ("/etc/nsswitch.conf", "/etc/nginx/lab.conf", "/var/log")
"""What nginx' image has and its container removes, changes, and makes anew, in its writable layer."""


def fill_nginx_layer(fleet: Fleet, _address: str) -> None:
    """The site, put into the running container as ``docker cp`` does it; and files of the image gone or changed."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for number in range(HttpSession.PAGES):
            row = tarfile.TarInfo(f"pages/{number}.html")
            row.size, row.mode = len(HttpSession.page(number)), 0o644
            tar.addfile(row, io.BytesIO(HttpSession.page(number)))
    assert fleet.present("alpha", "nginx-layer").put_archive("/site", held.getvalue())
    gone, changed, replaced = IMAGES_OWN
    script = f"rm {gone}; echo '# mine' >> {changed}; rm -r {replaced}; mkdir {replaced}; echo 0 > {replaced}/hop"
    fleet.execute("alpha", "nginx-layer", script)


def after_hop_nginx_layer(fleet: Fleet, host: str, name: str, number: int) -> None:
    """The layer's deletions and replacements hold, and a file of the image comes and goes with every second hop."""
    gone, changed, replaced = IMAGES_OWN
    absent = "!" if number % 2 == 1 else ""
    script = f"[ {absent} -e {gone} ]; tail -n 1 {changed}; cat {replaced}/hop; ls -A {replaced}; ls -A /site"
    said = fleet.execute(host, name, script).split()
    assert said == ["#", "mine", str(number - 1), "hop", "incoming", "pages", "records"]
    act = "echo back >" if number % 2 == 1 else "rm"
    fleet.execute(host, name, f"{act} {gone}; echo {number} > {replaced}/hop")


def check_nginx_layer(fleet: Fleet, host: str, name: str) -> None:
    assert fleet.present(host, name).attrs["Mounts"] == []
    check_nginx(fleet, host, name)


def check_nginx(fleet: Fleet, host: str, name: str) -> None:
    session = HttpSession(fleet.lab.host(host).spec.address, 8080)
    for number in range(HttpSession.PAGES):
        assert session.fetch(f"/pages/{number}.html") == HttpSession.page(number)
    for folder in range(HttpSession.FOLDERS):
        for row in json.loads(session.fetch(f"/records/{folder}/"))[:200]:
            record = HttpSession.record(int(row["name"]))
            assert session.fetch(f"/records/{folder}/{row['name']}") == record
    session.close()
    assert fleet.execute(host, name, "ls /site/incoming | wc -l").strip() in ("0", "1", "2")


def python_service(file: str) -> dict[str, Any]:
    return {"command": ["python3.11", "-u", "-c", (SERVICES / file).read_text()]}


ALL = {
    "redis": Service("redis", 6379, RedisSession, "/data", check_redis, fill=fill_redis),
    "nginx": Service(
        "nginx",
        8080,
        HttpSession,
        "/site",
        check_nginx,
        {"stop_signal": "SIGQUIT"},
        fill=fill_nginx,
        pause_seconds=0.01,
    ),
    "nginx-layer": Service(
        "nginx",
        8080,
        HttpSession,
        "",
        check_nginx_layer,
        {"stop_signal": "SIGQUIT"},
        fill=fill_nginx_layer,
        after_hop=after_hop_nginx_layer,
        pause_seconds=0.01,
    ),
    "postgresql": Service(
        "postgresql",
        5432,
        PostgresqlSession,
        "/data",
        check_postgresql,
        {"shm_size": "128m", "stop_signal": "SIGINT"},
        fill=fill_postgresql,
    ),
    "sqlite": Service("python", 7000, LineSession, "/data", check_sqlite, python_service("sqlite_service.py")),
    "mapped": Service("python", 7000, LineSession, "/data", check_mapped, python_service("mapped_service.py")),
}


# --- to and fro --------------------------------------------------------------------------------------


def begin(fleet: Fleet, name: str) -> list[Witness]:
    """The service on alpha, with clients that use it; returns those."""
    service = ALL[name]
    if service.image not in fleet.images:
        fleet.images = {**fleet.images, service.image: share(service.image, fleet.lab.hosts)}
    fleet.run(
        name,
        image=service.image,
        ports={f"{service.port}/tcp": service.port},
        volumes={f"{name}-data": {"bind": service.data}} if service.data else {},
        restart_policy={"Name": "unless-stopped"},
        **service.options,
    )
    addresses = [fleet.alpha.spec.address, fleet.beta.spec.address]

    def answers() -> bool:
        try:
            service.connect(addresses[0], service.port).close()
        except OSError:
            return False
        return True

    wait_until(answers, f"{name} does not answer", 30)
    service.fill(fleet, addresses[0])
    clients = []
    for number in range(CLIENTS):
        client = Witness(
            addresses,
            service.port,
            pause_seconds=service.pause_seconds,
            attempted=number * STRIDE,
            connect=service.connect,
        )
        client.start()
        fleet.at_end(client.stop)
        clients.append(client)
    return clients


def hop(fleet: Fleet, name: str, number: int, clients: list[Witness]) -> dict[str, Any]:
    """Move the service to the other host under load; returns what the clients saw of it."""
    source, target = ("alpha", "beta") if number % 2 == 1 else ("beta", "alpha")
    for client in clients:
        client.wait_for_more(RECORDS_A_HOP)
    fleet.wait_listed(source, name)
    before, began = fleet.present(source, name).attrs, time.monotonic()
    migration = f"{name}-{number}"
    fleet.request(migration, name, source, target, on_release="remove")
    fleet.wait_end(migration, "completed", timeout_seconds=HOP_SECONDS)
    for client in clients:
        client.wait_for_more(RECORDS_A_HOP)
    outage = max(change_of_host(client, began) for client in clients)
    assert {client.answers[-1].address for client in clients} == {fleet.lab.host(target).spec.address}
    fleet.control(migration, "finalise")
    fleet.wait_for(migration, "finalised", timeout_seconds=HOP_SECONDS)
    fleet.wait_running(target, name)
    fleet.wait_policy(target, name, "unless-stopped")
    for client in clients:
        client.wait_for_more(1)
    assert differences(before, fleet.present(target, name).attrs) == []
    ALL[name].after_hop(fleet, target, name, number)
    return {"hop": number, "to": target, "outage_seconds": round(outage, 3)}


def change_of_host(client: Witness, since: float) -> float:
    """Seconds between the last answer from one host and the first from the other, since then (monotonic)."""
    answers = [answer for answer in list(client.answers) if answer.at >= since]
    [gap] = [
        later.at - earlier.at for earlier, later in itertools.pairwise(answers) if earlier.address != later.address
    ]
    return gap


def sound(fleet: Fleet, name: str, host: str, clients: list[Witness]) -> int:
    """Every acknowledged record is there, exactly once, and the service's own checks are clean; how many records."""
    for client in clients:
        client.stop()
    missing = [number for client in clients for number in client.missing_from(fleet.lab.host(host).spec.address)]
    assert missing == []
    ALL[name].check(fleet, host, name)
    return sum(len(client.answers) for client in clients)


def to_and_fro(fleet: Fleet, name: str, hops: int) -> None:
    clients = begin(fleet, name)
    rows = []
    for number in range(1, hops + 1):
        rows.append(hop(fleet, name, number, clients))
        fleet.assert_sound(f"{name}-{number}")
    records = sound(fleet, name, "alpha" if hops % 2 == 0 else "beta", clients)
    report({"service": name, "hops": rows, "records": records})


def report(result: Mapping[str, Any]) -> None:
    """Add a line to the file that ``CARGO_REAL_RESULTS`` names, if it does."""
    place = os.environ.get("CARGO_REAL_RESULTS")
    if place:
        with open(place, "a") as file:
            file.write(json.dumps(result) + "\n")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["postgresql", "sqlite"])
def test_a_database_moves_there_and_back_under_load(fleet: Fleet, name: str) -> None:
    """P2: acknowledged transactions, WAL, shared memory files, sockets and lock files survive both ways."""
    to_and_fro(fleet, name, 2)


@pytest.mark.timeout(300)
def test_a_site_in_the_writable_layer_moves_there_and_back_under_load(fleet: Fleet) -> None:
    """P2: no volume at all; files that come by the dozen a second, and what the image had and the container removed."""
    to_and_fro(fleet, "nginx-layer", 2)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(ALL))
def test_a_service_moves_to_and_fro_ten_times_under_load(fleet: Fleet, name: str) -> None:
    """P2: nothing adds up over many moves."""
    to_and_fro(fleet, name, HOPS)
