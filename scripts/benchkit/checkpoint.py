"""Checkpoint and restore (``docker checkpoint``, CRIU), on two further hosts of the lab, where this machine can do it.

The machine's own Debian 12 has a CRIU that is too old for newer kernels, and a Docker whose restore is broken; so the hosts are of Debian
13, dockerd is told to be experimental, and CRIU itself comes from Debian's unstable suite: older ones than 4.2 cannot dump a
TCP socket on Linux 6.16 or newer (https://github.com/checkpoint-restore/criu/issues/2705). Whatever of that cannot be had is a
LabError with the reason, which the page shows in the place of figures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchkit.services import REDIS
from benchkit.stage import CONTAINER, END_SECONDS, TREE, VOLUME, Load, Stage
from labkit import roots
from labkit.errors import LabError
from labkit.host import Host
from labkit.lab import Lab
from labkit.spec import CACHE

NAMES = ("gamma", "delta")
ROOT = "debian13"
SUITE = "sid"
PACKAGES = ("criu", "libcompel1", "libnet9", "libnl-3-200")
"""Of that suite; what else CRIU needs comes from the hosts' own."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
FETCH_SECONDS = 300.0
CHECKPOINT = "moving"
RUNC_CONF = "tcp-close\n"
"""For CRIU under runc: connections that clients have open do not survive a change of address; without this it refuses."""


class CheckpointStage(Stage):
    """A stage of two hosts that can checkpoint. Its container always moves from the first to the second, and is put back."""

    def __init__(self, lab: Lab) -> None:
        """Raises LabError with why it cannot be done here."""
        names = [host.spec.name for host in lab.hosts if host.spec.name not in NAMES]
        hosts = [*names, *(f"{name}={ROOT}" for name in NAMES)]
        wider = Lab(lab.spec.name, hosts=hosts, base=lab.root.parent)
        wider.up(agents=False)
        super().__init__(wider, NAMES)
        try:
            self.versions = " and ".join(sorted({_enable(host) for host in self.hosts}))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Switch the hosts off: what comes next is measured without them."""
        super().close()
        for host in self.hosts:
            host.power_cut()

    def wait_listed(self) -> None:
        """No agent runs on these hosts."""

    def begin(self, load: Load) -> None:
        """The service with ``load`` beside it."""
        self.fill(load)
        self.create(self.home, restart_policy={"Name": "no"}).start()
        REDIS.wait_until_answering(self.home.spec.address)

    def move(self) -> float:
        """rsync while it runs, checkpoint, rsync of the rest and of the checkpoint, restore. Returns seconds in all."""
        source, target = self.home, self.away
        target.docker_client().volumes.create(VOLUME)
        made = self.create(target, restart_policy={"Name": "no"})
        began = time.monotonic()
        self.rsync(TREE)
        source.run(["docker", "checkpoint", "create", CONTAINER, CHECKPOINT])
        self.rsync(TREE)
        here = source.docker_client().containers.get(CONTAINER)
        places = [f"/var/lib/docker/containers/{container.id}/checkpoints/{CHECKPOINT}/" for container in (here, made)]
        target.run(["mkdir", "-p", places[1]])
        line = ["rsync", "-a", "-e", " ".join(self.ssh_line()), f"root@{source.spec.address}:{places[0]}", places[1]]
        target.run(line, timeout_seconds=END_SECONDS)
        target.run(["docker", "start", "--checkpoint", CHECKPOINT, CONTAINER])
        REDIS.wait_until_answering(target.spec.address)
        return time.monotonic() - began

    def put_back(self) -> None:
        """Remove what arrived, and start where it was."""
        docker = self.away.docker_client()
        docker.containers.get(CONTAINER).remove(force=True)
        docker.volumes.get(VOLUME).remove(force=True)
        self.home.run(["docker", "checkpoint", "rm", CONTAINER, CHECKPOINT])
        self.home.run(["docker", "start", CONTAINER])
        REDIS.wait_until_answering(self.home.spec.address)


def _enable(host: Host) -> str:
    """Let the host checkpoint; returns what it does that with, in words."""
    place = host.directory / "etc/docker/daemon.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "experimental": True}))
    host.dockerd.restart()
    tree = criu_tree()
    given = subprocess.Popen(["tar", "-C", str(tree), "-cf", "-", "."], stdout=subprocess.PIPE)
    taken = host.popen(["tar", "-C", "/", "--keep-directory-symlink", "-xf", "-"], stdin=given.stdout)
    assert given.stdout is not None
    given.stdout.close()
    if taken.wait(FETCH_SECONDS) != 0 or given.wait(FETCH_SECONDS) != 0:
        raise LabError(f"CRIU could not be unpacked on {host.spec.name}")
    host.run(["ldconfig"])
    host.run(["mkdir", "-p", "/etc/criu"])
    host.run(["tee", "/etc/criu/runc.conf"], given=RUNC_CONF)
    checked = host.run(["criu", "check"], check=False)
    if checked.returncode != 0:
        raise LabError(f"`criu check` says: {reason(checked.stderr)}")
    criu = host.run(["criu", "--version"]).stdout.splitlines()[0].removeprefix("Version: ")
    return f"Docker {host.docker_client().version()['Version'].partition('+')[0]}, CRIU {criu}"


def criu_tree() -> Path:
    """CRIU's files, and those libraries that the hosts' root tree lacks; fetched once and cached. Raises LabError."""
    system = roots.layers(ROOT)[-1]
    place = CACHE / f"criu-{SUITE}-{system.name}"
    if place.is_dir():
        return place
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise LabError("there is no apt-get here to fetch CRIU with")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".criu-") as name:
        scratch = Path(name)
        for part in ("lists/partial", "cache/archives/partial", "tree"):
            (scratch / part).mkdir(parents=True)
        mirror = os.environ.get(roots.MIRROR_VARIABLE) or roots.MIRROR
        own = roots.RECIPES[ROOT].suite
        sources = "".join(f"deb {mirror} {suite} main\n" for suite in (own, SUITE))
        (scratch / "sources.list").write_text(sources)
        settings = {  # the machine's own lists, caches and packages are neither asked nor changed
            "Dir::Etc::sourcelist": scratch / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": scratch / "lists",
            "Dir::State::status": system / "var/lib/dpkg/status",
            "Dir::Cache": scratch / "cache",
            "APT::Default-Release": own,
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-q", "-y", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
        _fetched([*apt, "update"])
        wanted = [f"{package}/{SUITE}" for package in PACKAGES]
        _fetched([*apt, "--no-install-recommends", "--download-only", "install", *wanted])
        for package in sorted((scratch / "cache/archives").glob("*.deb")):
            _fetched(["dpkg-deb", "-x", str(package), str(scratch / "tree")])
        for part in ("usr/sbin", LIBRARIES):
            shutil.copytree(scratch / "tree" / part, scratch / "wanted" / part, symlinks=True)
        (scratch / "wanted").replace(place)
    return place


def _fetched(line: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, errors="replace", check=False, timeout=FETCH_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"CRIU cannot be fetched: {error}") from error
    if done.returncode != 0:
        raise LabError(f"CRIU cannot be fetched: {reason(done.stderr)}")


def reason(said: str) -> str:
    """The last line of what a tool said that speaks of an error, fit for a table's cell."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line or line.startswith("E:")] or lines
    return telling[-1].replace("|", "/")[:300] if telling else "nothing"
