"""A whole lab: ``up``, ``down``, ``status``, and its parts as objects.

    with Lab(name="mine", subnet="10.78.5", agents=False) as lab:
        lab.host("alpha").run(["hostname"])

``up`` only adds what is missing, so a second one changes nothing and one after a crash mends. ``down`` asks
neither memory nor state file (see leftovers).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from labkit import fleet, leftovers, probes, requirements, roots
from labkit.errors import LabError, MissingRequirementError
from labkit.etcd import Etcd
from labkit.host import AGENT_SECONDS, Host
from labkit.network import Hub, interface_exists
from labkit.process import Process
from labkit.spec import (
    DEFAULT_NAME,
    DEFAULT_SUBNET,
    HOST_NAMES,
    REPOSITORY,
    LabSpec,
    base_directory,
    load_spec,
    make_hosts,
)
from labkit.trust import write_trust
from labkit.waiting import wait_until


class Lab:
    """A lab by name. Making the object changes nothing; an existing lab is picked up as it was made.

    ``hosts`` are names, or descriptions such as ``gamma=debian13,containerd``. ``agents`` says whether ``up`` also starts coordinator and hostd. ``secure`` gives it
    certificates, roles and signed events, with hosts that have joined by tokens. ``visible`` lists
    further directories of the machine that hosts must see although they lie in /tmp, /root or another place
    that is private to each host.
    """

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        subnet: str | None = None,
        hosts: Sequence[str] | None = None,
        *,
        base: Path | None = None,
        agents: bool | None = None,
        etcd_members: int | None = None,
        etcd_loopback: bool | None = None,
        secure: bool | None = None,
        visible: Sequence[str | Path] = (),
    ) -> None:
        root = (base or base_directory()) / name
        known = load_spec(root)
        if known is None:
            number = subnet or DEFAULT_SUBNET
            known = LabSpec(
                name=name,
                subnet=number,
                root=root,
                hosts=make_hosts(hosts or HOST_NAMES[:2], number),
                agents=True if agents is None else agents,
                etcd_members=etcd_members or 1,
                etcd_loopback=bool(etcd_loopback),
                secure=bool(secure),
                visible=tuple(map(str, visible)),
            )
        else:
            known = self._merge(known, subnet, hosts, etcd_members, etcd_loopback)
            known = known if agents is None else replace(known, agents=agents)
            if secure is not None and secure != known.secure:
                raise LabError(
                    f"the lab {name} exists, and is {'' if known.secure else 'not '}secure; `down` removes it"
                )
        self._adopt(known)

    @staticmethod
    def _merge(
        known: LabSpec,
        subnet: str | None,
        hosts: Sequence[str] | None,
        etcd_members: int | None,
        etcd_loopback: bool | None,
    ) -> LabSpec:
        names = [host.name for host in known.hosts]
        asked = make_hosts(hosts, known.subnet) if hosts else known.hosts
        if (subnet or known.subnet) != known.subnet or asked[: len(names)] != known.hosts:
            raise LabError(
                f"the lab {known.name} exists with subnet {known.subnet} and hosts {', '.join(names)}, which "
                "is not what was asked for; `down` removes it first"
            )
        if (etcd_members or known.etcd_members) != known.etcd_members:
            raise LabError(f"the lab {known.name} exists with another number of etcd members; `down` removes it")
        loopback = known.etcd_loopback if etcd_loopback is None else etcd_loopback
        return replace(known, hosts=asked, etcd_loopback=loopback)

    def _adopt(self, spec: LabSpec) -> None:
        self.spec = spec
        self._hub = Hub(spec)
        self.etcd = Etcd(spec)
        self.coordinator = Process(
            "coordinator",
            [sys.executable, "-m", "coordinator.main", "-c", str(spec.root / "coordinator.cfg")],
            log=spec.logs / "coordinator.log",
            record=spec.records / "coordinator.json",
            mark=str(spec.root),
            cwd=str(REPOSITORY),
            ready=lambda: probes.bus_has(spec, "/cargo/coordinator/leader"),
            ready_seconds=AGENT_SECONDS,
        )
        self.coordinator.env["PYTHONPATH"] = str(REPOSITORY)
        self.hosts = [Host(spec, host, self._hub) for host in spec.hosts]

    @property
    def root(self) -> Path:
        """The lab's directory."""
        return self.spec.root

    def host(self, name: str) -> Host:
        """A host by name. Raises LabError."""
        for host in self.hosts:
            if host.spec.name == name:
                return host
        names = ", ".join(host.spec.name for host in self.hosts)
        raise LabError(f"there is no host {name!r} in the lab {self.spec.name}; it has {names}")

    # --- up and down ---------------------------------------------------------------------------

    def up(self, *, agents: bool | None = None) -> None:
        """Bring up whatever is not up yet. ``agents`` overrides what the lab was made with, and stays.

        Raises MissingRequirementError (nothing was changed) or LabError (what was made stays for a look;
        ``down`` removes it).
        """
        requirements.check(self.spec)
        for root in {host.root for host in self.spec.hosts}:
            roots.layers(root)  # outside of the lock: it may take minutes, once
        if agents is not None and agents != self.spec.agents:
            self._adopt(replace(self.spec, agents=agents))
        with self._locked():
            self._check_ownership()
            self._make_directories()
            self.spec.save()
            self._hub.start()
            if self.spec.secure:
                fleet.make_files(self.spec)
            self.etcd.start(wait=False)
            write_trust(self.spec)
            for host in self.hosts:
                host.power_on()
                host.start_services(wait=False)
            self.etcd.wait_ready()
            for host in self.hosts:
                host.start_services()
            if self.spec.secure:
                fleet.secure(self.spec, self.hosts)
            if self.spec.agents:
                self.start_agents()

    def start_agents(self) -> None:
        """Start the coordinator and every hostd, at the same time, and wait until all have registered."""
        daemons = [self.coordinator, *(host.hostd for host in self.hosts)]
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()

    def _check_ownership(self) -> None:
        """Refuse an interface of our name that belongs to a lab with another directory, or to a lost one."""
        if self._hub.pid is not None or not interface_exists(self.spec.prefix):
            return
        # The kernel takes a namespace's cables away a moment after its last process.
        with contextlib.suppress(LabError):
            wait_until(lambda: not interface_exists(self.spec.prefix), "", timeout_seconds=3)
            return
        if leftovers.marked_processes(self.root):
            raise LabError(f"parts of a lab {self.spec.name} run without its records; `down` removes them")
        raise LabError(
            f"the interface {self.spec.prefix} exists, and its lab is not in {self.root}: take down the lab that "
            "it belongs to, or choose another name"
        )

    def _make_directories(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.spec.logs.mkdir(exist_ok=True)
        self.spec.records.mkdir(exist_ok=True)
        (self.root / "hosts").mkdir(mode=0o700, exist_ok=True)
        for host in self.hosts:
            host.prepare_disks()

    def down(self) -> list[str]:
        """Remove every trace of the lab, however much of it there is. Returns what was found, in words.

        Raises LabError when something resists; what could be removed is gone then.
        """
        if os.geteuid() != 0:
            raise MissingRequirementError(["taking a lab down needs root: use sudo"])
        if not leftovers.describe(self.root, self.spec.prefix):
            return []
        with self._locked():
            return leftovers.remove_all(self.root, self.spec.prefix)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One ``up`` or ``down`` at a time. The lock is on the directory of all labs: it leaves nothing."""
        base = self.root.parent
        while True:
            base.mkdir(parents=True, exist_ok=True)
            fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), base.stat()):
                    break
            os.close(fd)  # a `down` removed it while we waited
        try:
            yield
        finally:
            os.close(fd)
            leftovers.remove_base(base)

    @property
    def exists(self) -> bool:
        """Whether there is anything of it."""
        return bool(leftovers.describe(self.root, self.spec.prefix))

    def status(self) -> dict[str, Any]:
        """What runs, as plain data (the answer of ``lab status --json``)."""

        def daemon(process: Process) -> dict[str, Any]:
            return {"pid": process.pid, "ready": process.ready, "log": str(process.log)}

        hosts = [
            {
                "name": host.spec.name,
                "address": host.spec.address,
                "root": host.spec.root,
                "containerd": host.spec.containerd,
                "liverestore": host.spec.liverestore,
                "running": host.running,
                "pid": host.pid,
                "docker_url": host.docker_url,
                "directory": str(host.directory),
                "cuts": [vars(cut) for cut in host.cuts],
                "sshd": daemon(host.sshd),
                "dockerd": daemon(host.dockerd),
                "hostd": daemon(host.hostd),
            }
            for host in self.hosts
        ]
        services = [self.etcd.members[0], *(d for h in self.hosts for d in (h.sshd, h.dockerd))]
        if self.spec.agents:
            services += [self.coordinator, *(host.hostd for host in self.hosts)]
        return {
            "name": self.spec.name,
            "root": str(self.root),
            "exists": self.exists,
            "up": all(service.ready for service in services),
            "subnet": f"{self.spec.subnet}.0/24",
            "agents": self.spec.agents,
            "etcd": {"endpoints": self.etcd.endpoints, "members": [daemon(m) for m in self.etcd.members]},
            "coordinator": daemon(self.coordinator),
            "hosts": hosts,
        }

    def __enter__(self) -> Lab:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
