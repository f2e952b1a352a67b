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
from benchkit.stage import PORT, Load, moment
from labkit.witness import Connection, load_keys

KEYS = 10_000
VALUE_BYTES = 1000
WRITE_SHARE = 0.2
WINDOW_SECONDS = 0.25
PERCENTS = (50, 95, 99)


@dataclass
class Client:
    """Asks one request after the other, a fifth of them writes; remembers when each was answered and how long it took."""

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

    def _run(self) -> None:
        value = b"x" * VALUE_BYTES
        dice = random.Random(1)
        connection: Connection | None = None
        turn = 0
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = Connection(self.addresses[turn % len(self.addresses)], PORT)
                key = b"key:%d" % dice.randrange(KEYS)
                began = time.monotonic()
                if dice.random() < WRITE_SHARE:
                    connection.call(b"SET", key, value)
                else:
                    connection.call(b"GET", key)
                ended = time.monotonic()
                self.answers.append((ended, ended - began))
            except OSError:
                if connection is not None:
                    connection.close()
                connection = None
                turn += 1
                self._stop.wait(0.001)


def run(setting: Setting) -> Result:
    """One migration between two stretches of ordinary work."""
    stage = setting.stage()
    load = setting.pick(Load(10**5, 10), Load(10**8, 500), Load(10**9, 5000))
    calm = setting.pick(0.5, 5.0, 10.0)
    stage.fill(load)
    stage.run_service()
    load_keys(stage.home.spec.address, PORT, KEYS, VALUE_BYTES)
    client = Client(stage.addresses)
    client.start()
    try:
        start = time.monotonic()
        time.sleep(calm)  # the stretch before: its length is what is wanted
        name = stage.ask()
        events = stage.wait(name, {"completed"})
        stage.arrived()
        time.sleep(calm)  # and after
        client.stop()
        stage.fold(name)
    finally:
        client.stop()
        stage.clear()
    offset = time.time() - time.monotonic()
    marks = {
        kind: moment(events, kind) - offset - start
        for kind in ("requested", "cutover_ordered", "target_started", "completed")
    }
    answers = [(at - start, latency) for at, latency in client.answers]
    return {"label": load.label, "marks": marks, "windows": windows(answers), "phases": phases(answers, marks)}


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
    gaps = [second[0] - first[0] for first, second in itertools.pairwise(answers)]
    made.insert(2, {"phase": "cut over", "seconds": max(gaps), "requests_per_second": 0.0, "latency_seconds": {}})
    return made


def tables(result: Result) -> list[Table]:
    """One row a phase."""
    calm = result["phases"][0]["requests_per_second"] or 1.0
    rows = []
    for phase in result["phases"]:
        latency = phase["latency_seconds"]
        rows.append(
            [
                phase["phase"],
                f"{phase['seconds']:.1f}",
                count(phase["requests_per_second"]),
                f"{phase['requests_per_second'] / calm:.2f}",
                *(f"{latency[str(percent)] * 1000:.2f}" if latency else NOTHING for percent in PERCENTS),
            ]
        )
    headings = ("phase", "s", "requests/s", "to before", *(f"p{percent}, ms" for percent in PERCENTS))
    return [
        Table(
            f"Redis with {result['label']} beside it",
            headings,
            rows,
            ["*Cut over* is the longest time without an answer."],
        )
    ]


def plots(result: Result) -> dict[str, str]:
    """Two time lines."""
    windows_of = result["windows"]
    at = windows_of["at_seconds"]
    rate: list[Point] = list(zip(at, windows_of["requests_per_second"], strict=True))
    top = max(windows_of["requests_per_second"])
    marks = {
        kind: [(when, 0.0), (when, top)]
        for kind, when in result["marks"].items()
        if kind in ("requested", "cutover_ordered", "completed")
    }

    def latency(key: str) -> list[Point]:
        values = [value * 1000 for value in windows_of[key]]
        return [(when, value if value else None) for when, value in zip(at, values, strict=True)]

    return {
        "service-rate.svg": lines("Requests per second during a migration", "seconds", {"requests/s": rate, **marks}),
        "service-latency.svg": lines(
            "Latency during a migration (ms, logarithmic)",
            "seconds",
            {"median": latency("p50_seconds"), "99 %": latency("p99_seconds")},
            logarithmic=True,
        ),
    }


CASE = Case(
    name="service",
    title="A service during its migration",
    about=(
        "One client asks a Redis as fast as it can over one connection, four reads to one write of 1 kB, each write fsynced. "
        "Client, both hosts, etcd and all transfers share two cores, so the dent is deeper here than on hosts of their own; "
        "`bwlimit_kib` makes it flatter and longer."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=25,
    full_seconds=45,
)
