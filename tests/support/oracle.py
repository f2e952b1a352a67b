"""Who ran the container when: the events of several Docker daemons, merged by time.

The oracle listens to every host's dockerd during a test and keeps when each container of interest started and
died. Its verdict is the first promise of the project: no two hosts ever run the container at the same time.
It asks nothing of the product, so the product cannot talk its way out. Containers are recognised by a label,
which travels with them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from labkit import Host
from labkit.waiting import wait_until

LABEL = "e2e"
"""On every container of a test; its value names the container whatever it is called at the moment."""
LISTENING = "oracle-listens"


@dataclass(frozen=True)
class Moment:
    """A container began or ceased to run somewhere. ``at_ns`` is wall-clock time; all hosts share one clock."""

    at_ns: int
    host: str
    what: str
    """The value of the label."""
    runs: bool


def overlaps(moments: Iterable[Moment]) -> list[str]:
    """Every time that a second host ran what another one was still running, in words."""
    running: dict[str, dict[str, int]] = {}
    found = []
    for moment in sorted(moments, key=lambda moment: moment.at_ns):
        here = running.setdefault(moment.what, {})
        if not moment.runs:
            here.pop(moment.host, None)
            continue
        found += [
            f"{moment.what} was started on {moment.host} at {moment.at_ns}, while it ran on {other} since {since}"
            for other, since in here.items()
            if other != moment.host
        ]
        here[moment.host] = moment.at_ns
    return found


class Oracle:
    """Listens to the daemons of ``hosts`` until closed. A host that reboots is listened to again by ``resume``."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._hosts = {host.spec.name: host for host in hosts}
        self._moments: list[Moment] = []
        self._heard_until: dict[str, float] = {}
        """When each host was last listened to from, so that a daemon that was restarted repeats what it did meanwhile."""
        self._listeners: dict[str, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []
        for name in self._hosts:
            self.resume(name)

    def resume(self, name: str) -> None:
        """Listen to a host again, from where listening ended, unless that is so already.

        Hearing something twice does no harm: a moment has one time.
        """
        known = self._listeners.get(name)
        if known is not None and known.poll() is None:
            return
        since = f"{self._heard_until.setdefault(name, time.time()):.9f}"
        line = ["docker", "events", "--since", since, "--format", "{{json .}}", "--filter", "type=container"]
        listener = self._hosts[name].popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._listeners[name] = listener
        thread = threading.Thread(target=self._listen, args=(name, listener), name=f"oracle {name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def lost_power(self, name: str) -> None:
        """Whatever ran on that host has ended now, and no daemon lived to tell."""
        now = time.time_ns()
        for what in {moment.what for moment in self._moments if moment.host == name}:
            self._moments.append(Moment(now, name, what, runs=False))

    def _listen(self, name: str, listener: subprocess.Popen[bytes]) -> None:
        assert listener.stdout is not None
        for line in listener.stdout:
            self._heard_until[name] = time.time()
            with contextlib.suppress(ValueError):
                moment = moment_of(name, json.loads(line))
                if moment is not None:
                    self._moments.append(moment)

    @property
    def moments(self) -> list[Moment]:
        """All that was heard so far, in the order of time."""
        return sorted(self._moments, key=lambda moment: moment.at_ns)

    def settle(self, running: Mapping[str, set[str]]) -> None:
        """Wait until what was heard agrees with who runs at the end: by label value, the hosts that run it."""

        def caught_up() -> bool:
            return all(self._running(what) == hosts for what, hosts in running.items())

        wait_until(caught_up, f"the daemons' events do not lead to {dict(running)}", 10)

    def _running(self, what: str) -> set[str]:
        last = {moment.host: moment.runs for moment in self.moments if moment.what == what}
        return {host for host, runs in last.items() if runs}

    def assert_one_runner(self) -> None:
        """Fail if ever two hosts ran the same container."""
        found = overlaps(self._moments)
        assert not found, "\n".join(found)

    def close(self) -> None:
        """Stop listening."""
        for listener in self._listeners.values():
            listener.kill()
            listener.wait()
        for thread in self._threads:
            thread.join(5)


def moment_of(host: str, event: Mapping[str, object]) -> Moment | None:
    """What one event of a daemon says of a container of interest; None when nothing."""
    actor = event.get("Actor")
    attributes = actor.get("Attributes") if isinstance(actor, dict) else None
    what = attributes.get(LABEL) if isinstance(attributes, dict) else None
    action, at_ns = event.get("Action"), event.get("timeNano")
    if action not in ("start", "die") or not isinstance(what, str) or not isinstance(at_ns, int):
        return None
    return Moment(at_ns, host, what, runs=action == "start")
