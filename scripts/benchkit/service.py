"""What the clients of a service notice before, during and after its migration."""

from __future__ import annotations

import itertools
import random
import threading
import time
from dataclasses import dataclass, field

from benchkit.case import Case, Result, Setting
from benchkit.figures import NOTHING, Table, count, percentile
from benchkit.plots import Point, lines
from benchkit.services import KEYS, POSTGRESQL, REDIS, Service, Session
from benchkit.stage import Load, Stage, moment
from labkit.waiting import wait_until

SERVICES = (REDIS, POSTGRESQL)
WRITE_SHARE = 0.2
WINDOW_SECONDS = 0.25
PERCENTS = (50, 95, 99)
SETTLE_ANSWERS, SETTLE_SECONDS = 30, 60.0


@dataclass
class Client:
    """Asks one request after the other, a fifth of them writes; remembers when each was answered and how long it took."""

    service: Service
    addresses: list[str]
    answers: list[tuple[float, float]] = field(default_factory=list)
    """(monotonic time of the answer, latency), seconds."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join(10)

    def wait_for_more(self) -> None:
        """Until it has had some further answers. Raises LabError."""
        wanted = len(self.answers) + SETTLE_ANSWERS
        wait_until(lambda: len(self.answers) >= wanted, f"{self.service.name} does not answer", SETTLE_SECONDS)

    def _run(self) -> None:
        dice = random.Random(1)
        session: Session | None = None
        turn = 0
        while not self._stop.is_set():
            try:
                if session is None:
                    session = self.service.connect(self.addresses[turn % len(self.addresses)], self.service.port)
                key = dice.randrange(KEYS)
                ask = session.write if dice.random() < WRITE_SHARE else session.read
                began = time.monotonic()
                ask(key)
                ended = time.monotonic()
                self.answers.append((ended, ended - began))
            except OSError:
                if session is not None:
                    session.close()
                session = None
                turn += 1
                self._stop.wait(0.001)
        if session is not None:
            session.close()


def run(setting: Setting) -> Result:
    """One service after the other."""
    return {"services": [measure(setting, service) for service in SERVICES]}


def measure(setting: Setting, service: Service) -> Result:
    """One migration between two stretches of ordinary work."""
    stage = setting.stage()
    load = setting.pick(Load(10**5, 10), Load(10**8, 500), Load(10**9, 5000))
    calm = setting.pick(0.5, 5.0, 10.0)
    try:
        stage.run_service(service)  # before the load: a database is laid out in an empty directory only
        stage.fill(load)
        service.prepare(stage.home.spec.address, service.port)
        restart = restarted(stage, service)
        client = Client(service, stage.addresses)
        client.start()
        try:
            start = time.monotonic()
            time.sleep(calm)  # the stretch before: its length is what is wanted
            name = stage.ask()
            events = stage.wait(name, {"completed"})
            stage.arrived()
            time.sleep(calm)  # and after
        finally:
            client.stop()
        stage.fold(name)
    finally:
        stage.clear()
    offset = time.time() - time.monotonic()
    marks = {
        kind: moment(events, kind) - offset - start
        for kind in ("requested", "cutover_ordered", "target_started", "completed")
    }
    answers = [(at - start, latency) for at, latency in client.answers]
    found = phases(answers, marks)
    setting.say(
        f"{service.name}: {found[0]['requests_per_second']:.0f} requests/s before, {found[2]['seconds']:.2f} s away"
    )
    return {
        "service": service.name,
        "label": load.label,
        "restart_seconds": restart,
        "marks": marks,
        "windows": windows(answers),
        "phases": found,
    }


def restarted(stage: Stage, service: Service) -> float:
    """How long the same client is without an answer when the container is only restarted where it is, in seconds."""
    client = Client(service, [stage.home.spec.address])
    client.start()
    try:
        client.wait_for_more()
        stage.restart()
        client.wait_for_more()
    finally:
        client.stop()
    return longest_gap([at for at, _ in client.answers])


def longest_gap(times: list[float]) -> float:
    """The longest time between two of them, in seconds."""
    return max(second - first for first, second in itertools.pairwise(times))


def windows(answers: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Requests a second and latency percentiles, for each quarter of a second."""
    last = int(answers[-1][0] / WINDOW_SECONDS)
    sorted_in: list[list[float]] = [[] for _ in range(last)]
    for at, latency in answers:
        if 0 <= int(at / WINDOW_SECONDS) < last:
            sorted_in[int(at / WINDOW_SECONDS)].append(latency)
    return {
        "at_seconds": [round(number * WINDOW_SECONDS, 2) for number in range(last)],
        "requests_per_second": [len(found) / WINDOW_SECONDS for found in sorted_in],
        "p50_seconds": [percentile(found, 50) if found else 0.0 for found in sorted_in],
        "p99_seconds": [percentile(found, 99) if found else 0.0 for found in sorted_in],
    }


def phases(answers: list[tuple[float, float]], marks: dict[str, float]) -> list[Result]:
    """The same for each phase of the migration."""
    edges = {
        "before": (0.0, marks["requested"]),
        "prepare and pre-copy": (marks["requested"], marks["cutover_ordered"]),
        "fill, verify, release": (marks["target_started"], marks["completed"]),
        "after": (marks["completed"], answers[-1][0]),
    }
    made = []
    for name, (begin, end) in edges.items():
        latencies = [latency for at, latency in answers if begin <= at < end]
        made.append(
            {
                "phase": name,
                "seconds": end - begin,
                "requests_per_second": len(latencies) / (end - begin) if end > begin else 0.0,
                "latency_seconds": {str(percent): percentile(latencies, percent) for percent in PERCENTS}
                if latencies
                else {},
            }
        )
    away = longest_gap([at for at, _ in answers])
    made.insert(2, {"phase": "cut over", "seconds": away, "requests_per_second": 0.0, "latency_seconds": {}})
    return made


def tables(result: Result) -> list[Table]:
    """One table a service, one row a phase."""
    return [_table(found) for found in result["services"]]


def _table(found: Result) -> Table:
    calm = found["phases"][0]["requests_per_second"] or 1.0
    rows = []
    for phase in found["phases"]:
        latency = phase["latency_seconds"]
        rows.append(
            [
                phase["phase"],
                f"{phase['seconds']:.2f}",
                count(phase["requests_per_second"]),
                f"{phase['requests_per_second'] / calm:.2f}",
                *(f"{latency[str(percent)] * 1000:.2f}" if latency else NOTHING for percent in PERCENTS),
            ]
        )
    headings = ("phase", "s", "requests/s", "to before", *(f"p{percent}, ms" for percent in PERCENTS))
    note = (
        "*Cut over* is the longest time without an answer, the service's own start included; with a `docker restart` of the same "
        f"container just before it was {found['restart_seconds']:.2f} s."
    )
    return Table(f"{found['service']} with {found['label']} beside it", headings, rows, [note])


def plots(result: Result) -> dict[str, str]:
    """Two time lines a service."""
    made: dict[str, str] = {}
    for found in result["services"]:
        made |= _plots(found)
    return made


def _plots(found: Result) -> dict[str, str]:
    windows_of, service = found["windows"], found["service"]
    at = windows_of["at_seconds"]
    rate: list[Point] = list(zip(at, windows_of["requests_per_second"], strict=True))
    top = max(windows_of["requests_per_second"])
    marks = {
        kind: [(when, 0.0), (when, top)]
        for kind, when in found["marks"].items()
        if kind in ("requested", "cutover_ordered", "completed")
    }

    def latency(key: str) -> list[Point]:
        values = [value * 1000 for value in windows_of[key]]
        return [(when, value if value else None) for when, value in zip(at, values, strict=True)]

    return {
        f"service-{service.lower()}-rate.svg": lines(
            f"{service}: requests per second during a migration", "seconds", {"requests/s": rate, **marks}
        ),
        f"service-{service.lower()}-latency.svg": lines(
            f"{service}: latency during a migration (ms, logarithmic)",
            "seconds",
            {"median": latency("p50_seconds"), "99 %": latency("p99_seconds")},
            logarithmic=True,
        ),
    }


CASE = Case(
    name="service",
    title="A service during its migration",
    about=(
        "One client asks a Redis, then a PostgreSQL, as fast as it can over one connection, four reads to one write of 1 kB; each write "
        "is fsynced before it is acknowledged, and in PostgreSQL it is a transaction. "
        "Client, both hosts, etcd and all transfers share two cores, so the dent is deeper here than on hosts of their own; "
        "`bwlimit_kib` makes it flatter and longer."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=45,
    full_seconds=100,
)
