"""What the agents cost their hosts: at rest, and while a tree of many files moves."""

from __future__ import annotations

import threading
import time

from benchkit.backbone import cpu_seconds, resident_mib
from benchkit.case import Case, Result, Setting
from benchkit.figures import Table
from benchkit.stage import Load, Stage, moment
from labkit.errors import LabError

SAMPLE_SECONDS = 0.1


def pids(stage: Stage) -> dict[str, int]:
    """Of both agents. Raises LabError when one does not run."""
    found = {}
    for host in stage.hosts:
        pid = host.hostd.pid
        if pid is None:
            raise LabError(f"the agent on {host.spec.name} does not run")
        found[host.spec.name] = pid
    return found


class Highest(threading.Thread):
    """The highest memory of some processes while it runs."""

    def __init__(self, of: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._of = of
        self._ended = threading.Event()
        self.mib = dict.fromkeys(of, 0.0)

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            for name, pid in self._of.items():
                self.mib[name] = max(self.mib[name], resident_mib(pid))

    def stop(self) -> None:
        """End."""
        self._ended.set()
        self.join()


def run(setting: Setting) -> Result:
    """Fresh agents at rest; one migration; at rest again."""
    stage = setting.stage()
    rest = setting.pick(1.0, 10.0, 30.0)
    load = setting.pick(Load(10**5, 100), Load(4 * 10**7, 10_000), Load(4 * 10**8, 100_000))
    for host in stage.hosts:
        host.hostd.restart()
    result: Result = {"label": load.label, "agents": {}}
    try:
        stage.fill(load)
        stage.run_idle()
        stage.wait_measured()
        of = pids(stage)
        idle, weight = at_rest(of, rest), {name: resident_mib(pid) for name, pid in of.items()}
        before = {name: cpu_seconds(pid) for name, pid in of.items()}
        highest = Highest(of)
        highest.start()
        name = stage.ask()
        events = stage.wait(name, {"completed"})
        highest.stop()
        stage.arrived()
        after = {name: cpu_seconds(pid) for name, pid in of.items()}
        stage.fold(name)
        stage.wait_measured()
        later = at_rest(of, rest)
        for role, (host, pid) in zip(("source", "target"), of.items(), strict=True):
            result["agents"][role] = {
                "idle_cores": idle[host],
                "idle_mib": weight[host],
                "migration_cpu_seconds": after[host][0] - before[host][0],
                "tools_cpu_seconds": after[host][1] - before[host][1],
                "highest_mib": highest.mib[host],
                "later_cores": later[host],
                "later_mib": resident_mib(pid),
            }
        result["total_seconds"] = moment(events, "completed") - moment(events, "requested")
    finally:
        stage.clear()
    return result


def at_rest(of: dict[str, int], rest: float) -> dict[str, float]:
    """Part of a core that each uses when nothing happens."""
    before, began = {name: cpu_seconds(pid)[0] for name, pid in of.items()}, time.monotonic()
    time.sleep(rest)  # the stretch over which processor time is counted
    passed = time.monotonic() - began
    return {name: (cpu_seconds(pid)[0] - before[name]) / passed for name, pid in of.items()}


def tables(result: Result) -> list[Table]:
    """One row an agent."""
    rows = [
        [
            role,
            f"{found['idle_cores'] * 100:.2f}",
            f"{found['idle_mib']:.0f}",
            f"{found['migration_cpu_seconds']:.1f}",
            f"{found['tools_cpu_seconds']:.1f}",
            f"{found['highest_mib']:.0f}",
            f"{found['later_cores'] * 100:.2f}",
            f"{found['later_mib']:.0f}",
        ]
        for role, found in result["agents"].items()
    ]
    headings = (
        "agent",
        "at rest, % of a core",
        "MiB",
        "migration, CPU s",
        "its tools, CPU s",
        "highest, MiB",
        "at rest afterwards, %",
        "MiB",
    )
    return [Table(f"Agents, and a migration of {result['label']} in {result['total_seconds']:.1f} s", headings, rows)]


CASE = Case(
    name="agent",
    title="The agents",
    about=(
        "Resident memory and processor time of each `cargo-hostd`, freshly started, with one container on the host. *At rest* begins when "
        "the agent has measured how large the container's data is, which it does once when it sees it first (a third of a second of "
        "processor time for 100,000 files). *Its tools* are the rsync, ssh and other processes that it started and that have ended."
    ),
    run=run,
    tables=tables,
    quick_seconds=45,
    full_seconds=120,
)
