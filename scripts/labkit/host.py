"""One lab host: what a machine with Docker is to Cargo, made of namespaces.

Its first process is tini; everything on the host is a descendant of it. Killing that one process is a power
cut: processes, mounts and network go at once, the disks (plain directories under ``<root>/hosts/<name>``)
stay, and ``boot`` starts again from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hostd.gate import RUNTIME
from labkit import leftovers, probes, roots
from labkit.errors import CommandFailedError, LabError
from labkit.network import OUTSIDE, Cut, Hub, command, cut_rules
from labkit.process import MARK, Process, clean_environment, launch, live_pid, write_record
from labkit.spec import OWN_ROOT, PRIVATE_DIRECTORIES, REPOSITORY, HostSpec, LabSpec
from labkit.trust import OPERATOR_IDENTITY, SSH_DIRECTORY, interpreter, write_etc
from labkit.waiting import wait_until

if TYPE_CHECKING:
    import docker

SKELETON = {
    "var/lib/docker": 0o710,
    "var/lib/containerd": 0o711,
    "var/lib/cargo": 0o700,
    "var/log": 0o755,
    "var/cache": 0o755,
    "var/tmp": 0o1777,
    "run/lock": 0o755,
    "run/sshd": 0o755,
    "run/cargo": 0o700,
    "tmp": 0o1777,
    "srv": 0o755,
    "mnt": 0o755,
    "root": 0o700,
    "etc/cargo": 0o755,
    "etc/docker": 0o755,
    "etc.upper": 0o755,
    "etc.work": 0o755,
}
VOLATILE = ("run", "tmp")
"""Empty after every boot, as on a real machine."""

DOCKERD_SECONDS = 60
AGENT_SECONDS = 30

Argument = str | bytes | os.PathLike[str]


class Host:
    """A host of a lab. ``sshd``, ``dockerd`` and ``hostd`` are its daemons."""

    def __init__(self, spec: LabSpec, host: HostSpec, hub: Hub) -> None:
        self.spec = host
        self.directory = spec.host_directory(host.name)
        self._lab = spec
        self._hub = hub
        self._record = spec.records / f"{host.name}.json"
        self._cuts_file = spec.root / "cuts" / f"{host.name}.json"
        self.python = interpreter(host.root)
        """The interpreter that the agent runs on, as a path on the host."""
        library = [] if host.root == OWN_ROOT else [f"/{roots.LIBRARY}"]
        self.python_path = ":".join([str(REPOSITORY), *library])
        self.sshd = self._daemon(
            "sshd",
            ["/usr/sbin/sshd", "-D", "-e", "-f", f"{SSH_DIRECTORY}/sshd_config"],
            ready=lambda: probes.ssh_answers(host.address),
        )
        self.dockerd = self._daemon(
            "dockerd",
            ["dockerd"],
            ready=lambda: probes.docker_answers(self.directory / "run/docker.sock"),
            ready_seconds=DOCKERD_SECONDS,
        )
        self.hostd = self._daemon(
            "hostd",
            [self.python, "-m", "hostd.main", "-c", "/etc/cargo/hostd.cfg"],
            ready=lambda: probes.bus_has(spec, f"/cargo/hosts/{host.name}"),
            ready_seconds=AGENT_SECONDS,
            cwd=str(REPOSITORY),
        )
        self.hostd.env["PYTHONPATH"] = self.python_path

    def _daemon(
        self,
        name: str,
        argv: Sequence[str],
        *,
        ready: Callable[[], bool] | None = None,
        ready_seconds: float = 30,
        cwd: str = "/",
    ) -> Process:
        label = f"{self.spec.name}.{name}"
        return Process(
            label,
            argv,
            log=self._lab.logs / f"{label}.log",
            record=self._lab.records / f"{label}.json",
            mark=str(self._lab.root),
            cwd=cwd,
            inside=self._require_pid,
            ready=ready,
            ready_seconds=ready_seconds,
        )

    @property
    def pid(self) -> int | None:
        """Of its first process, as the machine sees it; None when the host is off."""
        return live_pid(self._record)

    @property
    def running(self) -> bool:
        """Whether it is switched on."""
        return self.pid is not None

    @property
    def docker_url(self) -> str:
        """For DOCKER_HOST or the docker SDK, from outside."""
        return f"unix://{self.directory}/run/docker.sock"

    def docker_client(self, timeout_seconds: int = 60) -> docker.DockerClient:
        """A new docker SDK client; close it after use."""
        import docker as sdk  # noqa: PLC0415 - the rest of the lab works without it

        return sdk.DockerClient(base_url=self.docker_url, timeout=timeout_seconds)

    def load_image(self, name: str) -> str:
        """Make sure that the lab's image ``name`` (``busybox``, ``redis``) is there; returns its tag."""
        from labkit import images  # noqa: PLC0415 - as above

        return images.load(self, name)

    def path(self, inside: str | bytes) -> Path:
        """Where a file of the host lies as seen from outside: only what is in its private directories.

        Mounts made within the host are not seen there. Raises LabError for any other path.
        """
        text = os.fsdecode(inside)
        relative = os.path.normpath(text).lstrip("/")
        if text.startswith("/") and any(
            relative == place or relative.startswith(place + "/") for place in PRIVATE_DIRECTORIES
        ):
            return self.directory / relative
        raise LabError(f"{text!r} is not in a private directory of {self.spec.name}: {PRIVATE_DIRECTORIES}")

    # --- power ---------------------------------------------------------------------------------

    def prepare_disks(self) -> None:
        """Make its directories, unless they are there."""
        for relative, mode in SKELETON.items():
            place = self.directory / relative
            if not place.is_dir():
                place.mkdir(parents=True)
                place.chmod(mode)
        for relative, target in (("var/run", "/run"), ("var/lock", "/run/lock")):
            link = self.directory / relative
            if not link.is_symlink():
                link.symlink_to(target)
        configuration = self.directory / "etc/docker/daemon.json"
        if not configuration.exists():  # a test may have written its own
            configuration.write_text(json.dumps(self._docker_options(), indent=2) + "\n")
        if self.spec.root != OWN_ROOT:
            for relative in ("root.upper", "root.work", "root.point"):
                (self.directory / relative).mkdir(exist_ok=True)

    def _docker_options(self) -> dict[str, Any]:
        """daemon.json."""
        store: dict[str, Any] = {"storage-driver": "overlay2"}
        if self.spec.containerd:
            store = {"storage-driver": "overlayfs", "features": {"containerd-snapshotter": True}}
        # What `cargo-hostd-runtime install` would add.
        warm = {"runtimes": {RUNTIME: {"path": str(REPOSITORY / "hostd/runtime/cargo-runc")}}}
        return {
            **(warm if self.spec.root == OWN_ROOT else {}),
            "hosts": ["unix:///run/docker.sock"],
            **store,
            "live-restore": self.spec.liverestore,
            "insecure-registries": [f"{self._lab.subnet}.0/24"],  # one that a host of the lab runs, without TLS
            # the same on cgroup v1 and v2, and without a systemd to ask
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": self._lab.cgroup(self.spec.name),
        }

    def power_on(self) -> None:
        """Make its namespaces and plug its cable, unless it runs. Starts no service."""
        pid = self.pid
        if pid is not None:
            if not self._hub.is_plugged(self.spec.name):  # somebody ended the hub, and the cables with it
                self._hub.plug(self.spec.name, self.spec.address, pid)
            return
        leftovers.remove_cgroups(self._lab.cgroup(self.spec.name).lstrip("/"))
        for relative in VOLATILE:
            if (self.directory / relative).exists():
                shutil.rmtree(self.directory / relative)
        self.prepare_disks()
        layers = roots.layers(self.spec.root)
        write_etc(self._lab, self.spec.name, layers[-1] if layers else Path("/"))
        order = {
            "kind": "boot",
            "namespaces": ["net", "mnt", "pid", "uts", "ipc"],
            "hostname": self.spec.name,
            "directory": str(self.directory),
            "private": {f"/{place}": str(self.directory / place) for place in PRIVATE_DIRECTORIES},
            "visible": self._visible(),
            "root": [str(layer) for layer in layers],
            "argv": ["tini", "--", "sleep", "infinity"],
            "env": clean_environment() | {MARK: str(self._lab.root)},
            "log": str(self._lab.logs / f"{self.spec.name}.boot.log"),
        }
        pid = launch(order)
        write_record(self._record, pid)
        try:
            self._hub.plug(self.spec.name, self.spec.address, pid)
            if self.cuts:
                self._apply_cuts()
        except LabError:
            self.power_cut()
            raise

    def _visible(self) -> list[str]:
        """Directories that agents need, wherever they lie: the project, its Python, what one asked for."""
        wanted = {str(REPOSITORY), *self._lab.visible}
        if self.spec.root == OWN_ROOT:
            wanted |= {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
        ordered = sorted(wanted)
        return [
            path
            for path in ordered
            if not any(other != path and path.startswith(other.rstrip("/") + "/") for other in ordered)
        ]

    def start_services(self, *, wait: bool = True) -> None:
        """Start sshd and dockerd, at the same time."""
        for daemon in (self.sshd, self.dockerd):
            daemon.start(wait=False)
        if wait:
            for daemon in (self.sshd, self.dockerd):
                daemon.wait_ready()

    def boot(self, *, agents: bool | None = None) -> None:
        """Switch it on with the disks as they are and start its services; hostd too if the lab has agents."""
        self.power_on()
        self.start_services()
        if self._lab.agents if agents is None else agents:
            self.hostd.start()

    def power_cut(self) -> None:
        """All on the host ends in the same moment, unheard: the cable goes first. Harmless when off."""
        pid = self.pid
        if pid is None:
            return
        self._hub.unplug(self.spec.name)
        # The kernel kills a PID namespace with its first process, which is not gone before the rest is.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.pid is None, f"{self.spec.name} did not go off", 30)

    # --- processes -----------------------------------------------------------------------------

    def _require_pid(self) -> int:
        pid = self.pid
        if pid is None:
            raise LabError(f"the host {self.spec.name} is off; `up` or boot() starts it")
        return pid

    def command_line(self, argv: Sequence[Argument], *, cwd: str | None = None) -> list[str]:
        """``argv`` as a command that enters all of the host's namespaces first.

        What runs there is killed when the command that entered is.
        """
        enter = ["nsenter", "-t", str(self._require_pid()), "-m", "-u", "-i", "-n", "-p", "--"]
        place = [] if cwd is None else ["env", "-C", cwd, "--"]
        return [*enter, "setpriv", "--pdeathsig", "KILL", "--", *place, *map(os.fsdecode, argv)]

    def run(
        self,
        argv: Sequence[Argument],
        *,
        check: bool = True,
        given: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_seconds: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host and wait. Working directory is ``/``; use absolute paths.

        Output is text with undecodable bytes kept (surrogateescape). Raises CommandFailedError when ``check``
        and the exit status is not 0, LabError after ``timeout_seconds`` (the command is then killed).
        """
        line = self.command_line(argv, cwd=cwd)
        text = os.fsdecode(given) if given is not None else None
        stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        try:
            done = subprocess.run(
                line,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                env=clean_environment() | dict(env or {}),
                timeout=timeout_seconds,
                check=False,
                **stdin,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{line[-1]!r} on {self.spec.name} took over {timeout_seconds} s") from None
        if check and done.returncode != 0:
            raise CommandFailedError([*map(os.fsdecode, argv)], done.returncode, done.stdout, done.stderr)
        return done

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """A command on the host as a child of the caller; killing that child kills what runs on the host."""
        return subprocess.Popen(
            self.command_line(argv, cwd=cwd),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=clean_environment() | dict(env or {}),
        )

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        ready: Callable[[], bool] | None = None,
        ready_seconds: float = 30,
    ) -> Process:
        """Start another daemon on the host, with its log in ``<host>.<name>.log``. It outlives the caller."""
        process = self._daemon(name, argv, ready=ready, ready_seconds=ready_seconds, cwd=cwd)
        process.start(env=env)
        return process

    def ssh(
        self, other: Host, argv: Sequence[str], *, check: bool = True, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on ``other`` by ssh from this host, with a person's key and the pinned host keys."""
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={SSH_DIRECTORY}/known_hosts",
            "GlobalKnownHostsFile=/dev/null",
            "IdentitiesOnly=yes",
            "ConnectTimeout=5",
        ]
        line = ["ssh", "-i", OPERATOR_IDENTITY]
        for option in options:
            line += ["-o", option]
        line += [f"root@{other.spec.address}", shlex.join(argv)]
        return self.run(line, check=check, timeout_seconds=timeout_seconds)

    # --- partitions ----------------------------------------------------------------------------

    @property
    def cuts(self) -> list[Cut]:
        """The partitions in force; they belong to the network and outlast a power cut of the host."""
        try:
            return [Cut(**cut) for cut in json.loads(self._cuts_file.read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def cut(self, other: Host | str, *, one_way: bool = False) -> None:
        """Stop all traffic between this host and ``other``: a host, its name, ``etcd``, or ``outside``.

        ``outside`` is the machine's own namespace, where the client, etcd and the coordinator live. Packets
        are dropped, containers' included; nobody is told. With ``one_way`` only what this host sends is lost.
        """
        name = other.spec.name if isinstance(other, Host) else other
        known = {host.name for host in self._lab.hosts} - {self.spec.name} | {"etcd", OUTSIDE}
        if name not in known:
            raise LabError(f"cannot cut {self.spec.name} from {name!r}: choose from {', '.join(sorted(known))}")
        self._set_cuts([cut for cut in self.cuts if cut.peer != name] + [Cut(name, one_way)])

    def heal(self, other: Host | str | None = None) -> None:
        """End the partition from ``other``, or all that this host has."""
        name = other.spec.name if isinstance(other, Host) else other
        self._set_cuts([] if name is None else [cut for cut in self.cuts if cut.peer != name])

    def _set_cuts(self, cuts: list[Cut]) -> None:
        self._cuts_file.parent.mkdir(exist_ok=True)
        self._cuts_file.write_text(json.dumps([vars(cut) for cut in cuts]) + "\n")
        if self.running:
            self._apply_cuts()

    def _apply_cuts(self) -> None:
        addresses = {host.name: host.address for host in self._lab.hosts}
        rules = cut_rules(self.cuts, addresses, self._lab.gateway)
        command(["nsenter", "-t", str(self._require_pid()), "-n", "nft", "-f", "-"], given=rules)

    def __repr__(self) -> str:
        return f"<Host {self.spec.name} {self.spec.address} {'on' if self.running else 'off'}>"
